"""Trains a tiny model for a few steps, in however many processes it is launched with, and writes what came out.

    torchrun --nproc_per_node 2 tests/helpers/distributed_run.py OUT.pt --batch 4

Used by test_distributed.py and test_sharded_runs.py; every process count must give the same weights, queues and logs.
"""

import argparse
import gc
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from modeling_cots import (
    COTSConfig,
    COTSForPreTraining,
    COTSTrainer,
    COTSTrainingArguments,
    ScenesDataset,
    modeling_cots_pretraining,
)
from modeling_cots.data.videos import VideoDataset
from modeling_cots.scripts.factory import build_image_tokenizer, build_processor, build_tokenizer
from modeling_cots.training import trainer as trainer_file
from modeling_cots.training.layer_compiling import compile_layers
from modeling_cots.training.sharding import full_tensor

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


def parse(argv: list[str]) -> argparse.Namespace:
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
    parser.add_argument("--split_passes", action="store_true", help="the masked pass after the unmasked one")
    parser.add_argument("--videos", action="store_true", help="in place of scenes")
    parser.add_argument("--compile", help="a back end for the layers")
    parser.add_argument("--export", help="a folder for the model; evaluates before training, too")
    parser.add_argument("--set", nargs=2, action="append", default=[], help="another argument of training, as JSON")
    return parser.parse_args(argv)


def main() -> None:
    """Several runs in one launch stand behind one another, with `--then` between them."""
    torch.set_num_threads(1)
    argv, runs = [*sys.argv[1:], "--then"], []
    while argv:
        end = argv.index("--then")
        runs.append(parse(argv[:end]))
        argv = argv[end + 1 :]
    trainer = None
    for options in runs:
        if trainer is not None and trainer.sharding is not None:  # what was compiled is kept, and keeps the model
            trainer.sharding.release_processes(trainer.model)
        trainer = None
        gc.collect()
        trainer = run(options)
    trainer.end()
    check_nothing_runs_on()


def run(options: argparse.Namespace) -> COTSTrainer:
    others = {name: json.loads(value) for name, value in options.set}
    # Weights are taken from the first process: the others may have forgotten the seed.
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    if options.compile is not None:
        others["compile_layers"] = True
        trainer_file.compile_layers = partial(compile_layers, backend=options.compile)
    modeling_cots_pretraining.MAX_JOINED_POSITIONS = 0 if options.split_passes else 1024
    config = COTSConfig(
        text_config={**ENCODER, "vocab_size": 150, "max_position_embeddings": 40},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_vocab_size=50,
    )
    scenes = SomeBroken("train", options.images, 32)
    tokenizer = build_tokenizer(None, None, scenes.iter_captions(), 32, 150)
    processor = build_processor(config, tokenizer, None)
    config.text_config.vocab_size = len(tokenizer)
    Failing.fault = options.fault
    trainer = Failing(
        model=COTSForPreTraining(config),
        args=build_arguments(options, others),
        train_dataset=write_videos(options.output) if options.videos else scenes,
        eval_dataset=ScenesDataset("validation", 9, 32),
        processing_class=processor,
        image_tokenizer=build_image_tokenizer("random", processor, 50),
        max_text_length=32,
    )
    before = trainer.evaluate() if options.export else None
    trainer.train(resume_from_checkpoint=options.resume)
    metrics = trainer.evaluate()
    whole = trainer._whole_model()
    momentum = {name: full_tensor(tensor) for name, tensor in trainer.momentum_state.state_dict().items()}
    if options.export:
        trainer.export_model(options.export)
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
        state = {"model": whole.state_dict(), "momentum": momentum, "before": before}
        torch.save({**state, "logs": logs, "metrics": metrics}, options.output)
    return trainer


def write_videos(output: str) -> VideoDataset:
    """24 videos of six frames, each of another gray; every process writes its own."""
    from video_files import write_video  # which needs av

    folder = Path(f"{output}.videos_{os.environ.get('RANK', 0)}")
    folder.mkdir()
    paths = [write_video(folder / f"{number}.mp4", range(number, number + 6)) for number in range(24)]
    return VideoDataset([f"video{number}" for number in range(24)], paths, [[f"gray {n}"] for n in range(24)])


def build_arguments(options: argparse.Namespace, others: dict) -> COTSTrainingArguments:
    others = {"logging_steps": 1, **others}
    return COTSTrainingArguments(
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
        save_strategy="no" if options.save_steps is None else "steps",
        save_steps=options.save_steps or 500,
        disable_tqdm=True,
        use_cpu=True,
        ddp_timeout=options.timeout,
        fsdp="full_shard" if options.fsdp else None,
        **others,
    )


def check_nothing_runs_on() -> None:
    """A thread of gloo that is still there may abort this process while its interpreter shuts down."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in names):
        raise RuntimeError(f"The process group is still there: {names}.")


if __name__ == "__main__":
    main()
