"""`open_dataset` and `open_video_dataset`: open built-in data and a user's own by one name."""

import os
from typing import Any

from torch.utils.data import Dataset

from .karpathy import is_karpathy, karpathy_name
from .pairs import open_pairs
from .revisions import refuse_version
from .scenes.moving import write_moving_scenes
from .scenes.still import ScenesDataset
from .streaming.names import public_name
from .videos import VideoDataset, open_videos


def open_dataset(
    dataset: str,
    split: str,
    *,
    image_folder: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_size: int = 64,
    seed: int = 0,
    keep_uncaptioned: bool = False,
    dataset_config: str | None = None,
    revision: str | None = None,
) -> Dataset:
    """
    Open `scenes`, or whatever `open_pairs` takes. The result has a `name` for the model card.

    Args:
        dataset: "scenes", a Hub id, a folder or a file.
        split: Name of the split.
        image_folder, image_column, caption_column: See `open_pairs`; `scenes` has none of them.
        image_size: Height and width in pixels at which scenes are drawn.
        seed: Seed of the random draws for each item in training. `scenes` has its own, the same in every run.
        keep_uncaptioned, dataset_config, revision: See `open_pairs`; `scenes` has neither configuration nor revision.

    Raises `ValueError` for options that `scenes` has no use for, and as `open_pairs` does.
    """
    columns = {"image_folder": image_folder, "image_column": image_column, "caption_column": caption_column}
    if dataset == "scenes":
        _refuse_useless(dataset, columns)
        refuse_version(dataset, dataset_config, revision)
        opened = ScenesDataset(split, image_size=image_size)
    else:
        version = {"dataset_config": dataset_config, "revision": revision}
        opened = open_pairs(dataset, split, **columns, seed=seed, keep_uncaptioned=keep_uncaptioned, **version)
    opened.name = _name(dataset)
    return opened


def _refuse_useless(dataset: str, options: dict[str, str | None]) -> None:
    useless = [name for name, value in options.items() if value is not None]
    if useless:
        raise ValueError(f"{dataset} is generated: leave out {', '.join(useless)}.")


def _name(dataset: str) -> str:
    if is_karpathy(dataset):
        return karpathy_name(dataset)
    return os.path.basename(os.path.normpath(dataset)) if os.path.exists(dataset) else public_name(dataset)


def open_video_dataset(
    dataset: str,
    split: str,
    *,
    generated_folder: str,
    image_size: int = 64,
    seed: int = 0,
    **options: Any,
) -> VideoDataset:
    """
    Open `moving_scenes`, whose files are written first, or whatever `open_videos` takes. The result has a `name`, too.

    Args:
        dataset: "moving_scenes", a folder or a file.
        split: Name of the split.
        generated_folder: Where the videos of `moving_scenes` are written. A split that it already holds is used.
        image_size: Height and width of these videos in pixels.
        seed: Seed of the random draws for each item in training; the scenes are the same in every run.
        options: `protocol`, `video_folder`, `video_column`, `caption_column` of `open_videos`.

    Raises `ValueError` for options that `moving_scenes` has no use for, and as `open_videos` does.
    """
    if dataset == "moving_scenes":
        _refuse_useless(dataset, options)
        if not os.path.isfile(os.path.join(generated_folder, split, "metadata.jsonl")):
            write_moving_scenes(generated_folder, split, image_size=image_size)
        opened = open_videos(generated_folder, split, seed=seed)
    else:
        opened = open_videos(dataset, split, seed=seed, **options)
    opened.name = _name(dataset)
    return opened
