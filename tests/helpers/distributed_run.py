"""Trains a tiny model for a few steps, in however many processes it is launched with, and writes what came out.

    torchrun --nproc_per_node 2 tests/helpers/distributed_run.py OUT.pt --batch 4

Used by test_distributed.py; every process count must give the same weights, queues and logs.
"""

import argparse
import os
import signal
from pathlib import Path

import torch

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, COTSTrainingArguments, ScenesDataset
from modeling_cots.scripts.factory import build_image_tokenizer, build_processor, build_tokenizer

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}
# With batches of 4: those of a process of three in its first batch, of two in its second, and one alone.
BROKEN = (4, 5, 6, 7, 17)


class SomeBroken(ScenesDataset):
    """Scenes of which some cannot be read, so that there is a process which keeps nothing of a batch."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "image": b"broken"} if index in BROKEN else item


class Failing(COTSTrainer):
    """One process fails while the others wait for it."""

    fault: str | None = None

    def compute_loss(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 2:
            if self.fault == "raise":
                raise OSError("the storage is gone")
            if self.fault in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
            if self.fault == "nan":
                with torch.no_grad():
                    args[1]["pixel_values"][0] = float("nan")
        return super().compute_loss(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--batch", type=int, required=True, help="of one process")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--queue_size", type=int, default=12)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--fault", choices=("raise", "kill", "stop", "nan"))
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--save_steps", type=int)
    parser.add_argument("--resume", help="a checkpoint, or `latest`")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--freeze", default="none", help="of both encoders")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = COTSConfig(
        text_config={**ENCODER, "vocab_size": 150, "max_position_embeddings": 40},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_vocab_size=50,
    )
    train_dataset = SomeBroken("train", options.images, 32)
    tokenizer = build_tokenizer(None, None, train_dataset.iter_captions(), 32, 150)
    processor = build_processor(config, tokenizer, None)
    config.text_config.vocab_size = len(tokenizer)
    Failing.fault = options.fault
    trainer = Failing(
        model=COTSForPreTraining(config),
        args=COTSTrainingArguments(
            output_dir=options.output + ".run",
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            train_sampling_strategy="random" if options.shuffle else "sequential",
            num_train_epochs=2,
            max_steps=options.max_steps,
            lr_hold_epochs=0,
            lr_scheduler_type="constant" if options.max_steps == 1 else "linear",
            learning_rate=options.learning_rate,
            optim=options.optim,
            # A softmax does not see key biases: their gradient is rounding, of which a small epsilon makes steps.
            adam_epsilon=1e-5,
            queue_size=options.queue_size,
            freeze_vision=options.freeze,
            freeze_text=options.freeze,
            filter_num_std=0.5,
            filter_log=options.output + ".filter_log",
            logging_steps=1,
            save_strategy="no" if options.save_steps is None else "steps",
            save_steps=options.save_steps or 500,
            disable_tqdm=True,
            use_cpu=True,
            ddp_timeout=options.timeout,
            fsdp="full_shard" if options.fsdp else None,
        ),
        train_dataset=train_dataset,
        eval_dataset=ScenesDataset("validation", 9, 32),
        processing_class=processor,
        image_tokenizer=build_image_tokenizer("random", processor, 50),
        max_text_length=32,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
        state = {"model": trainer.model.state_dict(), "momentum": trainer.momentum_state.state_dict()}
        torch.save({**state, "logs": logs, "metrics": metrics}, options.output)
    trainer.end()
    check_nothing_runs_on()


def check_nothing_runs_on() -> None:
    """A thread of gloo that is still there may abort this process while its interpreter shuts down."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in names):
        raise RuntimeError(f"The process group is still there: {names}.")


if __name__ == "__main__":
    main()
