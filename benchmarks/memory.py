"""Memory of a pre-training pair, ratio 5: plain, and with activations computed again, the cheap ones or all.

    python benchmarks/memory.py                  # the base model: what autograd keeps of a step, counted on shapes
    python benchmarks/memory.py --device cuda    # the peak of the real step of COTSTrainer, beside the estimate

On a GPU a pair's memory is the slope between two batch sizes of the `max_memory_allocated` of three steps. On a CPU,
whose allocator tells no peak, it is what `estimate_training_cost` counts for the base model, and a smaller model's
estimate is held against what autograd keeps of its real step. Captions of real steps are as long as the estimate's.
"""

import tempfile
from collections.abc import Iterator

import torch
from side_by_side import free, row, run_alone
from transformers import ViTImageProcessor

from modeling_cots import (
    COTSConfig,
    COTSForPreTraining,
    COTSProcessor,
    COTSTrainer,
    COTSTrainingArguments,
    COTSVideoProcessor,
    ImageTokenizer,
    ScenesDataset,
)
from modeling_cots.scripts.cost import estimate_training_cost, kept_bytes
from modeling_cots.scripts.factory import train_tokenizer

SMALL_ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
TEXT_LENGTH, QUEUE_SIZE, MEGABYTE = 64, 12_800, 1e6  # of examples/configs/pretrain_5m.yaml
GOALS = {  # megabytes
    "plain": 350,
    "recomputed activations": 350,
    "bfloat16 weights": 350,
    "bfloat16 weights, recomputed activations": 350,
    "checkpointed": 85,
}
OPTIONS: dict[str, dict] = {
    "plain": {"bf16": True},
    "recomputed activations": {"bf16": True, "recompute_activations": True},
    "bfloat16 weights": {"param_dtype": "bfloat16"},
    "bfloat16 weights, recomputed activations": {"param_dtype": "bfloat16", "recompute_activations": True},
    "checkpointed": {"bf16": True, "gradient_checkpointing": True},
}


class LongCaptions(ScenesDataset):
    """Scenes with all five captions in one, twice, which is cut to `TEXT_LENGTH` tokens: no batch is shorter."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "captions": [" ".join(2 * item["captions"])]}


def build_trainer(config: COTSConfig, folder: str, batch_size: int, **options) -> COTSTrainer:
    """The trainer of pre-training on generated images of the model's size; the width of its dVAE does not matter."""
    scenes = LongCaptions("train", 4 * batch_size, config.image_size[0])
    tokenizer = train_tokenizer(scenes.iter_captions(), 300)
    size = {"height": config.image_size[0], "width": config.image_size[1]}
    image_processor = ViTImageProcessor(size=size)
    processor = COTSProcessor(image_processor, tokenizer, COTSVideoProcessor(size=size))
    arguments = COTSTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        max_steps=3,
        lr_hold_epochs=0,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        min_crop_scale=1.0,
        **options,
    )
    codebook = ImageTokenizer.random(config.image_vocab_size, image_processor.image_mean, image_processor.image_std)
    return COTSTrainer(
        model=COTSForPreTraining(config),
        args=arguments,
        train_dataset=scenes,
        processing_class=processor,
        image_tokenizer=codebook,
        max_text_length=TEXT_LENGTH,
    )


def peak_bytes(config: COTSConfig, batch_size: int, **options) -> int:
    """`max_memory_allocated` over three real steps on the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, folder, batch_size, queue_size=QUEUE_SIZE, **options)
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        peak = torch.cuda.max_memory_allocated()
        del trainer
        free("cuda")
    return peak


def kept_by_real_step(config: COTSConfig, batch_size: int, **options) -> float:
    """Bytes a pair that autograd keeps of a real step on this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, folder, batch_size, use_cpu=True, queue_size=64, **options)
        batch = trainer.pixel_normalizer(next(iter(trainer.get_train_dataloader())))
        half = {name: tensor[: batch_size // 2] for name, tensor in batch.items()}
        sizes = [
            kept_bytes(lambda part=part: trainer.compute_loss(trainer.model, part), trainer.model)
            for part in (batch, half)
        ]
    return (sizes[0] - sizes[1]) / (batch_size - batch_size // 2)


def estimate(config: COTSConfig, **options):
    """What the package says beforehand, with the narrow dVAE of `build_trainer`."""
    with tempfile.TemporaryDirectory() as folder:
        args = COTSTrainingArguments(output_dir=folder, use_cpu=True, queue_size=QUEUE_SIZE, **options)
        return estimate_training_cost(config, args, text_length=TEXT_LENGTH)


def small_config(quick: bool) -> COTSConfig:
    """A model whose real step a CPU takes; its tokens are those of the tokenizer that `build_trainer` fits."""
    size = 32 if quick else 96
    text = {**SMALL_ENCODER, "vocab_size": 300, "max_position_embeddings": TEXT_LENGTH}
    return COTSConfig(
        text_config=text, vision_config={**SMALL_ENCODER, "image_size": size, "patch_size": 16}, image_vocab_size=64
    )


def measured_on_cpu(options: dict, quick: bool) -> tuple[float, str]:
    """Megabytes of a pair of the base model by the estimate, and how the estimate did on a real step."""
    config = small_config(quick)
    base = config if quick else COTSConfig()
    megabytes = estimate(base, **options).bytes_per_pair / MEGABYTE
    if {"gradient_checkpointing", "recompute_activations"} & options.keys():  # it holds more in the backward pass
        return megabytes, "counted, the layer that is being computed again included; a peak needs a GPU"
    own = {name: value for name, value in options.items() if name != "bf16"}  # a CPU's step, in float32
    real = kept_by_real_step(config, 8 if quick else 32, **own)
    with tempfile.TemporaryDirectory() as folder:
        args = COTSTrainingArguments(output_dir=folder, use_cpu=True, queue_size=64, **own)
        small = estimate_training_cost(config, args, text_length=TEXT_LENGTH)
    share = small.bytes_per_pair / real
    return megabytes, f"counted; {share:.2f} of what a smaller model's real step keeps, counted alike"


def measured_on_gpu(options: dict, quick: bool) -> tuple[float, str]:
    """Megabytes of a pair by the slope of two peaks, and the estimate beside it."""
    config = small_config(quick) if quick else COTSConfig()
    few, many = (8, 16) if quick else (32, 64)
    slope = (peak_bytes(config, many, **options) - peak_bytes(config, few, **options)) / (many - few)
    share = estimate(config, **options).bytes_per_pair / slope
    device = torch.cuda.get_device_name()
    return slope / MEGABYTE, f"slope from batch {few} to {many} on {device}; the estimate is {share:.2f} of it"


def measure(device: str, quick: bool) -> Iterator[dict]:
    """Rows 5, in megabytes a pair."""
    for name, megabytes in GOALS.items():
        method = measured_on_cpu if device == "cpu" else measured_on_gpu
        pair, how = method(OPTIONS[name], quick)
        title = f"peak memory of a pair in MB, {name}"
        size = "a toy model" if quick else f"base model, bfloat16, {TEXT_LENGTH} tokens, N_Q {QUEUE_SIZE:,}"
        yield row("5", title, pair, f"<= {megabytes} MB", f"{size}; {how}")


if __name__ == "__main__":
    run_alone(measure, __doc__)
