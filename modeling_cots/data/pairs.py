"""`open_pairs`: a user's own images and captions as a data set with one item for each image and all its captions.

Images are decoded in the collator, not here: it skips and counts those that it cannot read, while an exception in a
data set would end the epoch. files.py finds the files.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterator
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Dataset
from transformers.utils import logging

from .columns import check_any_exists, check_inside, drop_uncaptioned
from .items import EpochSeeds
from .karpathy import is_karpathy, load_karpathy
from .loading import load_rows
from .messages import printable
from .other_columns import OtherColumns
from .paths import RefusedPathError, open_door
from .revisions import refuse_version
from .rows import IMAGE_TOKENS, TOKEN_SOURCE, cached_tokens, image_columns
from .skip_report import and_more
from .tables import count_captions

logger = logging.get_logger(__name__)

MAX_NAMES = 10  # in one warning
HELD_OUT_SEED = 0  # whatever the seed of the training is


def open_pairs(
    dataset: str,
    split: str,
    *,
    image_folder: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
    keep_uncaptioned: bool = False,
    dataset_config: str | None = None,
    revision: str | None = None,
) -> "PairDataset":
    """
    Open a split of image-caption pairs, grouped by image.

    Two rows are the same image if they name the same file, or if their embedded images have the same name and bytes.
    (Bytes are compared by a digest, and only where name and length agree.) A row without an image, as of a failed
    download, and an image without a caption are left out; what is left out is counted and named in a warning. An empty
    string is a caption.

    Args:
        dataset: A Hub id; a folder of images with metadata.jsonl or metadata.csv; a file, folder or glob of .parquet,
            of WebDataset .tar shards, or of .jsonl, .json, .csv with image paths relative to that file; img2dataset's
            output folder; or Flickr8k, Flickr30k or COCO in Karpathy's form (`load_karpathy`).
        split: Its name, with a slice of rows if wanted ("train[:1000]"). A single file is the split itself.
        image_folder: Where the images are, if not beside the file; for Karpathy's form only.
        image_column: Holds images, bytes or paths. By default the first that holds something, in each row, of image,
            file_name, jpg, jpeg, png, webp.
        caption_column: Holds a string or a list of strings in each row, or a JSON object with them in its field
            caption, captions or text. "column.field" names another field. By default the first that holds something
            of caption, captions, text, txt, json.
        seed: Seed of the random draws for each item in training.
        keep_uncaptioned: Keep images without captions, and need no column of captions; for indexing images.
        dataset_config, revision: Configuration and version of a Hub id, see `load_rows`.

    Raises `ValueError` for a data set or split that does not exist, a data set of which no row can be used, image
    paths that leave the folder, and a folder in which no image exists.
    """
    if is_karpathy(dataset):
        refuse_version(dataset, dataset_config, revision)
        rows, root = load_karpathy(dataset, split, image_folder)
    elif image_folder is not None:
        raise ValueError(f"image_folder is for Karpathy's form (dataset_flickr30k.json, ...), not for {dataset!r}.")
    else:
        columns = image_columns(image_column, caption_column)
        rows, root = load_rows(dataset, split, columns, dataset_config, revision, need_captions=not keep_uncaptioned)
    _check_paths(rows, root)
    items = _group_rows(_image_keys(rows, root))
    if not keep_uncaptioned:
        num_captions = count_captions(rows)
        counts = [int(num_captions[item_rows].sum()) for item_rows in items]
        items = drop_uncaptioned(items, counts, lambda item: _name(rows[item[0]], item[0]), "image")
    if not items:
        raise ValueError(f"No image of the split {split!r} of {dataset!r} has a caption.")
    pairs = PairDataset(rows, items, root, seed)
    if keep_uncaptioned:
        pairs.others  # noqa: B018 -- computed here once, and not in every worker of a data loader
    return pairs


class PairDataset(Dataset):
    """
    Map-style data set of N images with their captions.

    An item is {"image": {"bytes": bytes | None, "path": str | None}, "captions": list of strings, "pair_id": its
    number, "name": path or row of the image, for reports, "seed": int}. Where a symbolic link leads out of the folder,
    the image has no path, and the reason under "refused". Items with cached image tokens also have "image_tokens" and
    "image_tokens_source" (image_token_cache.py).

    Args:
        rows: R rows, as tables.py has them.
        items: The rows of each of the N images. The first of them gives the image.
        root: Folder that image paths are relative to and must not leave; `None` refuses all paths.
        seed: Seed of the random draws for each item in training.
    """

    modality = "image"

    def __init__(
        self,
        rows: datasets.Dataset,
        items: list[list[int]],
        root: Path | None,
        seed: int,
    ):
        self._table, self._root = rows, root
        self._images = rows.select_columns(["bytes", "path"])
        self._captions = rows.select_columns(["captions"])
        has_tokens = rows.with_format("arrow").select_columns([TOKEN_SOURCE])[:][TOKEN_SOURCE].null_count < len(rows)
        self._tokens = rows.select_columns([IMAGE_TOKENS, TOKEN_SOURCE]) if has_tokens else None
        # Arrays, as counting references to lists of lists would copy them in each worker process, page by page.
        self._rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in items])
        self._starts = np.cumsum([0, *(len(rows) for rows in items)])
        self._seeds = EpochSeeds(seed)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        index = int(index) % len(self)
        rows = self._rows[self._starts[index] : self._starts[index + 1]].tolist()
        image = self._images[rows[0]]
        return {
            "image": self._located(image),
            "captions": [caption for row in rows for caption in self._captions[row]["captions"]],
            "pair_id": index,
            "name": _name(image, rows[0]),
            "seed": self._seeds(index),
            **({} if self._tokens is None else cached_tokens(self._tokens[rows[0]])),
        }

    def _located(self, image: dict) -> dict:
        """The image with the full path of its file, or the reason why that is not read."""
        if image["bytes"] is not None:
            return {"bytes": image["bytes"], "path": image["path"] and os.fsdecode(image["path"])}
        try:
            return {"bytes": None, "path": open_door(os.fsdecode(image["path"]), self._root)}
        except RefusedPathError as error:
            return {"bytes": None, "path": None, "refused": str(error)}

    def iter_captions(self) -> Iterator[str]:
        """All captions, without reading an image."""
        for row in self._rows.tolist():
            yield from self._captions[row]["captions"]

    def names(self) -> list[str]:
        """The path of every image, or its row where it has none, without reading an image."""
        paths = self._images.select_columns(["path"]).with_format("arrow")[:]["path"].to_pylist()
        rows = (int(row) for row in self._rows[self._starts[:-1]])
        root = "" if self._root is None else os.path.abspath(self._root)
        return [printable(os.path.join(root, os.fsdecode(paths[row]))) if paths[row] else f"row {row}" for row in rows]

    def hold_out(self, share: float, most: int) -> tuple["PairDataset", "PairDataset"]:
        """
        The rest, and a share of the images (at most `most`), drawn once for all: the same in every run.

        An image takes all of its captions along. Raises `ValueError` for fewer than two images.
        """
        if len(self) < 2:
            raise ValueError(f"Nothing can be held out of {len(self)} image: give more, or --eval_split none.")
        number = min(most, max(1, round(share * len(self))), len(self) - 1)
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(self))
        parts = np.sort(order[number:]), np.sort(order[:number])
        rest, held_out = (
            PairDataset(
                self._table,
                [self._rows[self._starts[item] : self._starts[item + 1]].tolist() for item in items],
                self._root,
                self._seeds.seed,
            )
            for items in parts
        )
        return rest, held_out

    @cached_property
    def others(self) -> OtherColumns:
        """The columns beside images and captions."""
        return OtherColumns(self._table)

    def metadata(self, index: int) -> dict:
        """The texts, numbers and booleans in the other columns of an item's first row, by column."""
        return self.others.row(int(self._rows[self._starts[index]]))

    def set_epoch(self, epoch: int) -> None:
        """Give every item a fresh seed."""
        self._seeds.set_epoch(epoch)


def _check_paths(rows: datasets.Dataset, root: Path | None) -> None:
    """Check the paths of images that are files. The path of an embedded image is only a name, and may be any."""
    table = rows.select_columns(["bytes", "path"]).with_format("arrow")[:]
    paths = table["path"].filter(pc.is_null(table["bytes"])).drop_null()
    if root is not None:
        files = check_inside([os.fsdecode(path) for path in pc.unique(paths).to_pylist()], root, "image")
        if table["bytes"].null_count == len(table):
            check_any_exists(files, root, "image")
    elif table["bytes"].null_count == len(table):
        raise ValueError("The images are files, and there is no one folder that their paths could start from.")
    elif len(paths):
        named = and_more([printable(os.fsdecode(path)) for path in paths[:MAX_NAMES].to_pylist()], MAX_NAMES)
        logger.warning(
            f"Left out {len(paths)} of {len(table)} rows, which only name a file, as there is no one folder that "
            f"their paths could start from: {named}."
        )


def _image_keys(rows: datasets.Dataset, root: Path | None) -> list[Hashable]:
    """A key for each row: rows have equal keys if they show the same image, and only then. `None` without an image."""
    table = rows.select_columns(["bytes", "path"]).with_format("arrow")[:]
    paths, lengths = table["path"].to_pylist(), pc.binary_length(table["bytes"]).to_pylist()
    num_alike = Counter(zip(paths, lengths, strict=True))
    keys: list[Hashable] = []
    for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        if length is None:  # a file, or nothing
            file = os.path.join(root, os.fsdecode(path)) if path and root is not None else None
            keys.append(None if file is None else os.path.abspath(file))
        elif length and num_alike[path, length] > 1:
            digest = hashlib.blake2b(rows[row]["bytes"], digest_size=16).digest()
            keys.append((path, digest))
        else:  # no other row has this name and length, or there are no bytes to compare
            keys.append(row)
    return keys


def _group_rows(keys: list[Hashable]) -> list[list[int]]:
    """Groups of rows with equal keys, in the order in which the keys first appear, without rows of no image."""
    items: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            items.setdefault(key, []).append(row)
    return list(items.values())


def _name(image: dict, row: int) -> str:
    return printable(os.fsdecode(image["path"])) if image["path"] else f"row {row}"
