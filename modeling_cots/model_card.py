"""The card of a trained model, filled from its configuration, arguments and measured metrics; never by hand."""

import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .training_args import COTSTrainingArguments
from .video_collator import holds_videos

TEMPLATE_PATH = Path(__file__).parent / "model_card_template.md"

# What a reader wants to know of a run; all of it is in the checkpoint folders as well.
REPORTED_SETTINGS = (
    "seed",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "learning_rate",
    "lr_hold_epochs",
    "weight_decay",
    "momentum",
    "queue_size",
    "batch_candidates",
    "mcl_weight",
    "kl_weight",
    "kl_warmup_steps",
    "cmvm_weight",
    "cmlm_weight",
    "image_mask_ratio",
    "text_mask_ratio",
    "adaptive_filter",
    "filter_num_std",
    "min_crop_scale",
    "horizontal_flip",
    "auto_augment",
)


def build_model_card(
    model: PreTrainedModel,
    args: COTSTrainingArguments,
    *,
    model_name: str,
    num_steps: int,
    train_dataset,
    eval_dataset,
    metrics: dict[str, float] | None,
    protocol: str | None = None,
) -> ModelCard:
    """
    Fill the template.

    Args:
        model: The trained [`COTSModel`].
        args: What it was trained with.
        model_name: Title, and where the example loads it from.
        num_steps: Optimiser steps taken.
        train_dataset, eval_dataset: Data sets; their `name`, if they have one, is reported.
        metrics: What `retrieval_metrics` measured on the evaluation set after training, or None.
        protocol: By which it was measured, one of `PROTOCOLS`, or None.
    """
    eval_name = getattr(eval_dataset, "name", "the evaluation set")
    zero_shot_protocol = _zero_shot_protocol(train_dataset, eval_dataset)
    unit = "video" if holds_videos(train_dataset) or holds_videos(eval_dataset) else "image"
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["cots", f"{unit}-text-retrieval", "two-stream"],
        model_name=model_name,
        eval_results=None
        if metrics is None
        else eval_results(metrics, eval_name, unit=unit, protocol=protocol, zero_shot_protocol=zero_shot_protocol),
    )
    config = model.config
    return ModelCard.from_template(
        card_data,
        template_path=TEMPLATE_PATH,
        model_name=model_name,
        model_id=model_name,
        unit=unit,
        text_encoder=_describe(config.text_config),
        vision_encoder=f"{_describe(config.vision_config)}, {'x'.join(map(str, config.image_size))} pixels",
        projection_dim=config.projection_dim,
        temperature=config.temperature,
        num_parameters=f"{model.num_parameters():,}",
        dataset_name=getattr(train_dataset, "name", "a data set of pairs"),
        num_train_images=f"{len(train_dataset):,}" if hasattr(train_dataset, "__len__") else "streamed",
        num_steps=f"{num_steps:,}",
        training_settings={name: getattr(args, name) for name in REPORTED_SETTINGS},
        eval_dataset_name=eval_name,
        protocol=protocol,
        zero_shot_protocol=zero_shot_protocol,
        num_eval_images=None if eval_dataset is None else f"{len(eval_dataset):,}",
        metrics=None if metrics is None else {name: round(value, 1) for name, value in metrics.items()},
    )


def _describe(config) -> str:
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads"
    )


def _zero_shot_protocol(train_dataset, eval_dataset) -> str | None:
    """ "none" where training and evaluation are splits of one data set; otherwise only the user knows."""
    names = [getattr(dataset, "name", None) for dataset in (train_dataset, eval_dataset)]
    if None in names or names[1].split()[0] != names[0].split()[0]:
        return None
    return "none"


def eval_results(
    metrics: dict[str, float],
    dataset_name: str,
    *,
    unit: str = "image",
    protocol: str | None = None,
    zero_shot_protocol: str | None = None,
) -> list[EvalResult]:
    """The recalls among `metrics` (as `retrieval_metrics` returns them) for the `model-index` of a card.

    Args:
        metrics: Recalls in percent.
        dataset_name: What they were measured on.
        unit: What the captions tell of, an "image" or a "video".
        protocol: One of `PROTOCOLS`, or None.
        zero_shot_protocol: One of `ZERO_SHOT_PROTOCOLS`, beside each number; None where it is not known.
    """
    return [
        EvalResult(
            task_type=f"{unit}-text-retrieval",
            dataset_type=os.path.basename(dataset_name).replace(" ", "-"),
            dataset_name=dataset_name,
            dataset_config=protocol,
            metric_type=name if unit == "image" else name.replace("i2t", "v2t").replace("t2i", "t2v"),
            metric_value=round(value, 2),
            metric_args=None if zero_shot_protocol is None else {"zero_shot_protocol": zero_shot_protocol},
        )
        for name, value in metrics.items()
        if "recall_at" in name
    ]


def load_card(model: str) -> ModelCard:
    """The card of a checkpoint, a folder or a Hub id; an empty one where it has none."""
    path = cached_file(model, "README.md", _raise_exceptions_for_missing_entries=False)
    if path is None:
        return ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {os.path.basename(os.path.normpath(model))}\n")
    return ModelCard.load(path)


def add_results(card: ModelCard, results: list[EvalResult], model_name: str) -> None:
    """Add what was measured later to the `model-index` of a card; a number measured alike before is replaced.

    The index needs a name of the model: `model_name` is for a card without one.
    """
    replaced = {result.unique_identifier + (result.metric_type,) for result in results}
    kept = [
        result
        for result in card.data.eval_results or []
        if result.unique_identifier + (result.metric_type,) not in replaced
    ]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or model_name


__all__ = ["add_results", "build_model_card", "eval_results", "load_card"]
