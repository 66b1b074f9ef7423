"""Evaluates an untrained tiny model in however many processes it is launched with, and writes what process 0 found.

    torchrun --nproc_per_node 3 tests/helpers/evaluation_run.py OUT.pt

Used by tests/evaluation/test_several_processes.py; every process count must give the same bits.
"""

import functools
import sys

import torch
from distributed_run import ENCODER

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, COTSTrainingArguments, ScenesDataset
from modeling_cots.evaluation import embedding, retrieval_metrics, text_encoding
from modeling_cots.scripts.factory import build_image_tokenizer, build_processor, build_tokenizer


class Uneven(ScenesDataset):
    """From one caption an image to five, of very different lengths; two images in a row cannot be read."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        captions = [caption + " and a red star" * index for caption in item["captions"][: 1 + index % 5]]
        return {**item, "captions": captions, "image": b"broken" if index in (4, 5) else item["image"]}


class Repeated(ScenesDataset):
    """Three images over and over, so that most candidates tie."""

    def __getitem__(self, index: int) -> dict:
        return {**super().__getitem__(index % 3), "pair_id": index}


DATASETS = {
    "uneven": Uneven("validation", 11, 32),
    "ties": Repeated("validation", 8, 32),
    "fewer batches than processes": ScenesDataset("validation", 3, 32),
    "folds": ScenesDataset("validation", 10, 32),
}


def build_trainer(output_dir: str) -> COTSTrainer:
    """A trainer of the same weights in every process and every launch."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = COTSConfig(
        text_config={**ENCODER, "vocab_size": 150, "max_position_embeddings": 40},
        vision_config={**ENCODER, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        image_vocab_size=50,
    )
    tokenizer = build_tokenizer(None, None, ScenesDataset("train", 40, 32).iter_captions(), 32, 150)
    processor = build_processor(config, tokenizer, None)
    config.text_config.vocab_size = len(tokenizer)
    return COTSTrainer(
        model=COTSForPreTraining(config),
        args=COTSTrainingArguments(
            output_dir=output_dir, per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True, report_to="none"
        ),
        eval_dataset=DATASETS["folds"],
        processing_class=processor,
        image_tokenizer=build_image_tokenizer("random", processor, 50),
        max_text_length=32,
    )


def measure(trainer: COTSTrainer) -> dict:
    """Embeddings and metrics of every data set; `folds` by a protocol of five folds."""
    # A few queries and captions at a time, so that small data sets make more of them than there are processes.
    embedding.best_positive_ranks = functools.partial(retrieval_metrics.best_positive_ranks, chunk_size=2)
    text_encoding.TOKENS_AT_A_TIME_ON_CPU = 40
    retrieval_metrics.PROTOCOLS["coco-1k"] = (10, 50)
    found = {}
    for name, dataset in DATASETS.items():
        trainer.eval_protocol = "coco-1k" if name == "folds" else None
        output = trainer.predict(dataset)
        arrays = [torch.from_numpy(array) for array in (*output.predictions, *output.label_ids)]
        found[name] = {"embeds": arrays, "metrics": output.metrics, "evaluated": trainer.evaluate(dataset)}
    return found


def main(output: str) -> None:
    trainer = build_trainer(f"{output}.run")
    found = measure(trainer)
    if trainer.is_world_process_zero():
        torch.save(found, output)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1])
