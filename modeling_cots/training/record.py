"""`training_record.json`: what a run was made of and what it measured, from which its card can be written again."""

import json
import math
import os
from pathlib import Path

from transformers import PreTrainedModel

from ..data.items import modality_of
from ..data.scenes.still import ScenesDataset
from .arguments import COTSTrainingArguments

RECORD_NAME = "training_record.json"

# What a reader wants to know of a run; all of it is in the checkpoint folders as well.
REPORTED_SETTINGS = (
    "starting_point",
    "seed",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "freeze_vision",
    "freeze_text",
    "learning_rate",
    "encoder_learning_rate",
    "warmup_steps",
    "lr_hold_epochs",
    "weight_decay",
    "momentum",
    "queue_size",
    "batch_candidates",
    "max_key_drift",
    "mask_equal_captions",
    "mcl_weight",
    "kl_weight",
    "kl_warmup_steps",
    "cmvm_weight",
    "cmlm_weight",
    "image_mask_ratio",
    "text_mask_ratio",
    "adaptive_filter",
    "filter_rule",
    "filter_num_std",
    "min_crop_scale",
    "horizontal_flip",
    "auto_augment",
)


def build_record(
    model: PreTrainedModel,
    args: COTSTrainingArguments,
    *,
    num_steps: int,
    train_dataset,
    eval_dataset,
    metrics: dict[str, float] | None,
    protocol: str | None = None,
) -> dict:
    """
    Collect what a card tells of a run, in types that JSON knows.

    Args:
        model: The trained [`COTSModel`].
        args: What it was trained with.
        num_steps: Optimizer steps taken.
        train_dataset, eval_dataset: Data sets; their `name`, if they have one, is recorded.
        metrics: What `retrieval_metrics` measured on the evaluation set after training, or None.
        protocol: By which it was measured, one of `PROTOCOLS`, or None.
    """
    return {
        "num_parameters": model.num_parameters(),
        "num_steps": num_steps,
        "unit": "video" if "video" in map(modality_of, (train_dataset, eval_dataset)) else "image",
        "settings": reported_settings(args),
        "training_data": _describe_data(train_dataset, "a data set of pairs"),
        "evaluation_data": None if metrics is None else _describe_evaluation(eval_dataset),
        "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
        "protocol": protocol,
        "zero_shot_protocol": _zero_shot_protocol(train_dataset, eval_dataset),
        "widget": [],
    }


def reported_settings(args: COTSTrainingArguments) -> dict:
    """The values of `REPORTED_SETTINGS` that a run with these arguments takes."""
    drift_limit = args.key_drift_limit if math.isfinite(args.key_drift_limit) else "any"
    return {**{name: getattr(args, name) for name in REPORTED_SETTINGS}, "max_key_drift": drift_limit}


def _describe_data(dataset, otherwise: str) -> dict:
    name = getattr(dataset, "name", "scenes" if isinstance(dataset, ScenesDataset) else otherwise)
    return {"name": name, "num_items": len(dataset) if hasattr(dataset, "__len__") else None}


def _describe_evaluation(dataset) -> dict:
    captions = sum(1 for _ in dataset.iter_captions()) if hasattr(dataset, "iter_captions") else None
    return {**_describe_data(dataset, "the evaluation set"), "num_captions": captions}


def _zero_shot_protocol(train_dataset, eval_dataset) -> str | None:
    """ "none" where training and evaluation are splits of one data set; otherwise only the user knows."""
    names = [getattr(dataset, "name", None) for dataset in (train_dataset, eval_dataset)]
    if None in names or names[1].split()[0] != names[0].split()[0]:
        return None
    return "none"


def save_record(record: dict, folder: str | os.PathLike) -> None:
    path = Path(folder) / RECORD_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_record(folder: str | os.PathLike) -> dict:
    """The record of a run. Raises `ValueError` for a folder that has none."""
    path = Path(folder) / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD_NAME}, which the training scripts write at the end of a run.")
    return json.loads(path.read_text(encoding="utf-8"))
