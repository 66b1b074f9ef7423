"""Trains a tiny model on a stream in however many processes it is launched with, and writes what each was given.

    torchrun --nproc_per_node 2 tests/helpers/stream_run.py SHARDS/ OUT/

Used by test_stream_loading.py.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from distributed_run import ENCODER
from trainer_states import state_of

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, COTSTrainingArguments
from modeling_cots.data.streaming.dataset import PairStream, open_stream
from modeling_cots.data.streaming.mixture import is_mixture, open_mixture
from modeling_cots.scripts.factory import build_image_tokenizer, build_processor, build_tokenizer


class Witness(COTSTrainer):
    """Keeps the pair ids of every batch that is trained on."""

    def compute_loss(self, model, inputs, **options):
        self.seen = [*getattr(self, "seen", []), inputs["pair_ids"].tolist()]
        return super().compute_loss(model, inputs, **options)


def open_stream_or_mixture(dataset: str) -> PairStream:
    if is_mixture(dataset):
        return open_mixture(dataset, "train", shuffle_buffer=6)
    return open_stream(dataset, "train", shuffle_buffer=3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("output")
    parser.add_argument("--save", action="store_true", help="a checkpoint after each step")
    parser.add_argument("--resume", help="a checkpoint")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    config = COTSConfig(
        text_config={**ENCODER, "vocab_size": 150, "max_position_embeddings": 40},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_vocab_size=50,
    )
    tokenizer = build_tokenizer(None, None, [f"caption {number}" for number in range(100)], 32, 150)
    processor = build_processor(config, tokenizer, None)
    config.text_config.vocab_size = len(tokenizer)
    trainer = Witness(
        model=COTSForPreTraining(config),
        args=COTSTrainingArguments(
            output_dir=options.output,
            per_device_train_batch_size=2,
            max_steps=8,
            queue_size=12,
            dataloader_num_workers=options.workers,
            logging_steps=1,
            save_strategy="steps" if options.save else "no",
            save_steps=1,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=open_stream_or_mixture(options.shards),
        processing_class=processor,
        image_tokenizer=build_image_tokenizer("random", processor, 50),
        max_text_length=32,
    )
    trainer.train(resume_from_checkpoint=options.resume)
    logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
    digests = {
        name: hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in state_of(trainer).items()
    }
    written = {"seen": trainer.seen, "skipped_shards": logs[-1]["skipped_shards"], "logs": logs, "state": digests}
    Path(options.output, f"{trainer.args.process_index}.json").write_text(json.dumps(written))
    trainer.end()


if __name__ == "__main__":
    main()
