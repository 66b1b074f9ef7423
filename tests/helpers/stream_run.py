"""Trains a tiny model on a stream in however many processes it is launched with, and writes what each was given.

    torchrun --nproc_per_node 2 tests/helpers/stream_run.py SHARDS/ OUT/

Used by test_stream_loading.py.
"""

import argparse
import json
from pathlib import Path

from distributed_run import ENCODER

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, COTSTrainingArguments
from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.scripts.factory import build_image_tokenizer, build_processor, build_tokenizer


class Witness(COTSTrainer):
    """Keeps the pair ids of every batch that is trained on."""

    def compute_loss(self, model, inputs, **options):
        self.seen = [*getattr(self, "seen", []), inputs["pair_ids"].tolist()]
        return super().compute_loss(model, inputs, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("output")
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
            dataloader_num_workers=1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=open_stream(options.shards, "train", shuffle_buffer=3),
        processing_class=processor,
        image_tokenizer=build_image_tokenizer("random", processor, 50),
        max_text_length=32,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
    written = {"seen": trainer.seen, "skipped_shards": logs[-1]["skipped_shards"]}
    Path(options.output, f"{trainer.args.process_index}.json").write_text(json.dumps(written))
    trainer.end()


if __name__ == "__main__":
    main()
