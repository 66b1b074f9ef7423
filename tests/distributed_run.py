"""Trains a tiny model for a few steps, in however many processes it is launched with, and writes what came out.

    torchrun --nproc_per_node 2 tests/distributed_run.py OUT.pt --batch 4

Used by test_distributed.py; every process count must give the same weights, queues and logs.
"""

import argparse

import torch

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, COTSTrainingArguments, ScenesDataset
from modeling_cots.building import build_image_tokenizer, build_processor, build_tokenizer

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}


class SomeBroken(ScenesDataset):
    """Scenes of which those of one process's first batch cannot be read, so that it keeps nothing."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "image": b"broken"} if index in (4, 5, 6, 7, 17) else item


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--batch", type=int, required=True, help="of one process")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = COTSConfig(
        text_config={**ENCODER, "vocab_size": 150, "max_position_embeddings": 40},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_vocab_size=50,
    )
    train_dataset = SomeBroken("train", 40, 32)
    tokenizer = build_tokenizer(None, None, train_dataset.iter_captions(), 32, 150)
    processor = build_processor(config, tokenizer, None)
    config.text_config.vocab_size = len(tokenizer)
    trainer = COTSTrainer(
        model=COTSForPreTraining(config),
        args=COTSTrainingArguments(
            output_dir=options.output + ".run",
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
            num_train_epochs=2,
            lr_hold_epochs=0,
            learning_rate=1e-3,
            queue_size=12,
            filter_num_std=0.5,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train_dataset,
        eval_dataset=ScenesDataset("validation", 9, 32),
        processing_class=processor,
        image_tokenizer=build_image_tokenizer("random", processor, 50),
        max_text_length=32,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
        state = {"model": trainer.model.state_dict(), "momentum": trainer.momentum_state.state_dict()}
        torch.save({**state, "logs": logs, "metrics": metrics}, options.output)


if __name__ == "__main__":
    main()
