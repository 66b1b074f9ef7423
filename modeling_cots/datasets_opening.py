"""`open_dataset`: the built-in scenes or a user's own pairs, by one name."""

import os

from torch.utils.data import Dataset

from .datasets_pairs import open_pairs
from .datasets_scenes import ScenesDataset


def open_dataset(
    dataset: str,
    split: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_size: int = 64,
    seed: int = 0,
) -> Dataset:
    """
    Open `scenes` or whatever `open_pairs` takes; `name` of the result tells a model card what it is.

    Args:
        dataset: "scenes", a Hub id, a folder or a file.
        split: Name of the split.
        image_column, caption_column: See `open_pairs`; the scenes have no columns.
        image_size: Pixels a side that scenes are drawn at.
        seed: Of what is drawn for each item in training; the scenes are the same in every run and have their own.
    """
    if dataset == "scenes":
        opened = ScenesDataset(split, image_size=image_size)
    else:
        opened = open_pairs(dataset, split, image_column=image_column, caption_column=caption_column, seed=seed)
    opened.name = os.path.basename(os.path.normpath(dataset)) if os.path.exists(dataset) else dataset
    return opened


__all__ = ["open_dataset"]
