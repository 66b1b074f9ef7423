"""A user's own images and captions as one data set: one item an image, with all its captions; nothing is decoded here.

Images are decoded in the collator, which skips and counts what it cannot read: an exception inside a data set's
iterator would end the epoch. How files are found is in files.py.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from .columns import check_any_exists, check_inside, drop_uncaptioned, find_column
from .files import is_inside, load_rows
from .items import EpochSeeds
from .karpathy import is_karpathy, load_karpathy
from .rows import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_TOKENS,
    JSON_CAPTIONS,
    TOKEN_SOURCE,
    cached_tokens,
    first_available,
    list_captions,
    split_field,
)


def open_pairs(
    dataset: str,
    split: str,
    *,
    image_folder: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
    keep_uncaptioned: bool = False,
) -> "PairDataset":
    """
    Open a split of image-caption pairs, grouped by image.

    Rows are the same image when they name the same file, or when name and bytes of an embedded image agree (bytes are
    compared by a digest, where name and length do not already tell them apart). An image without a caption is left
    out and reported by name; an empty string is a caption.

    Args:
        dataset: A Hub id; a folder of images with metadata.jsonl or metadata.csv; a file, folder or glob of .parquet,
            of WebDataset .tar shards, or of .jsonl, .json, .csv with image paths relative to that file; Flickr8k,
            Flickr30k or COCO in Karpathy's form (`load_karpathy`).
        split: Its name, with a slice of rows if wanted ("train[:1000]"). A single file is the split itself.
        image_folder: Where the images of Karpathy's form are, if not beside its file; for no other form.
        image_column: By default the first that is there of image, file_name, jpg, jpeg, png, webp. It holds images,
            bytes, or paths.
        caption_column: By default the first that is there of caption, captions, text, txt, json. It holds a string or
            a list of strings a row; of a JSON object the field caption, captions or text, or "column.field" as given.
        seed: Of what is drawn for each item in training.
        keep_uncaptioned: Keep images without captions, and do without a column of captions; for indexing images.

    Raises `ValueError` for a data set, split or column that is not there, an empty data set, captions that are no
    strings, images that are none, image paths that leave the folder, and a folder where none of the images exists.
    """
    if is_karpathy(dataset):
        rows, root = load_karpathy(dataset, split, image_folder)
    elif image_folder is not None:
        raise ValueError(f"image_folder is for Karpathy's form (dataset_flickr30k.json, ...), not for {dataset!r}.")
    else:
        rows, root = load_rows(dataset, split)
    if len(rows) == 0:
        raise ValueError(f"The split {split!r} of {dataset!r} is empty.")
    if "file_name" in rows.column_names and "image" not in rows.column_names:
        rows = rows.rename_column("file_name", "image")  # as in a folder of images
    images = _select_images(rows, image_column, root)
    if keep_uncaptioned and caption_column is None and not set(CAPTION_COLUMNS) & set(rows.column_names):
        captions, field = _no_captions(len(rows)), None
    else:
        captions, field = _select_captions(rows, caption_column)
    _check_paths(images, root)
    items = _group_rows(_image_keys(images, root))
    if not keep_uncaptioned:
        num_captions = _count_captions(captions, field)
        counts = [int(num_captions[item_rows].sum()) for item_rows in items]
        items = drop_uncaptioned(items, counts, lambda item: _name(images[item[0]]["image"], item[0]), "image")
    if not items:
        raise ValueError(f"No image of the split {split!r} of {dataset!r} has a caption.")
    pairs = PairDataset(images, captions, field, items, root, seed)
    pairs.metadata_rows = _select_metadata(rows, image_column, caption_column)
    if {IMAGE_TOKENS, TOKEN_SOURCE} <= set(rows.column_names):
        pairs.token_rows = rows.select_columns([IMAGE_TOKENS, TOKEN_SOURCE])
    return pairs


class PairDataset(Dataset):
    """
    Map-style data set of N images with their captions.

    An item is {"image": {"bytes": bytes | None, "path": str | None}, "captions": list of strings, "pair_id": its
    number, "name": path or row of the image, for reports, "seed": int}. In place of a path that leaves the folder by
    a symbolic link, the image has the reason, under "refused". Where image tokens are cached, "image_tokens" and
    "image_tokens_source" are there, too (image_token_cache.py).

    Args:
        images: R rows with an undecoded column "image".
        captions: The same R rows with one column, a string or a list of strings each, or a JSON object.
        field: Where the captions stand in that object; `None` without one.
        items: For each of the N images its rows, the first of which gives the image.
        root: Folder that image paths are relative to; `None`: they stand as they are.
        seed: Of what is drawn for each item in training.
    """

    modality = "image"

    def __init__(
        self,
        images: datasets.Dataset,
        captions: datasets.Dataset,
        field: str | None,
        items: list[list[int]],
        root: Path | None,
        seed: int,
    ):
        self._images, self._captions, self._field, self._root = images, captions, field, root
        # Not lists of lists: counting their references would make each worker process copy them, page by page.
        self._rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in items])
        self._starts = np.cumsum([0, *(len(rows) for rows in items)])
        self._seeds = EpochSeeds(seed)
        self.metadata_rows: datasets.Dataset | None = None
        self.token_rows: datasets.Dataset | None = None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        index = int(index) % len(self)
        rows = self._rows[self._starts[index] : self._starts[index + 1]].tolist()
        image = self._images[rows[0]]["image"]
        name = _name(image, rows[0])
        if self._root is not None and image is not None and image["bytes"] is None and image["path"] is not None:
            path = os.path.join(self._root, image["path"])
            image = {"bytes": None, "path": path}
            if not is_inside(path, self._root):
                image = {"bytes": None, "path": None, "refused": f"{path} is a link that leads out of {self._root}"}
        return {
            "image": image,
            "captions": [caption for row in rows for caption in _captions_of(self._captions, row, self._field)],
            "pair_id": index,
            "name": name,
            "seed": self._seeds(index),
            **({} if self.token_rows is None else cached_tokens(self.token_rows[rows[0]])),
        }

    def iter_captions(self) -> Iterator[str]:
        """All captions, without touching an image."""
        for row in self._rows.tolist():
            yield from _captions_of(self._captions, row, self._field)

    def names(self) -> list[str]:
        """The `name` of every item, without reading an image."""
        column = self._images.with_format("arrow")[:]["image"]
        paths = pc.struct_field(column, "path").to_pylist()
        rows = (int(row) for row in self._rows[self._starts[:-1]])
        return [os.path.join(self._root or "", paths[row]) if paths[row] else f"row {row}" for row in rows]

    def metadata(self, index: int) -> dict:
        """What the first row of an item says beside image and captions: texts, numbers and booleans by column."""
        return {} if self.metadata_rows is None else self.metadata_rows[int(self._rows[self._starts[index]])]

    def set_epoch(self, epoch: int) -> None:
        """Give every item a fresh seed."""
        self._seeds.set_epoch(epoch)


def _select_images(rows: datasets.Dataset, image_column: str | None, root: Path | None) -> datasets.Dataset:
    """One column "image" of {"bytes", "path"}, whatever form it had."""
    column = find_column(rows, image_column, IMAGE_COLUMNS, "image")
    feature = rows.features[column]
    storage = rows.data.schema.field(column).type
    is_text = _is_text(feature)
    if is_text and root is None:
        raise ValueError(f"The column {column!r} holds text, and there is no one folder that paths could start from.")
    if not (is_text or isinstance(feature, datasets.Image) or _can_hold_image(storage)):
        raise ValueError(f"The column {column!r} holds {storage}, neither images nor paths.")
    images = rows.select_columns([column])
    if column != "image":
        images = images.rename_column(column, "image")
    return images.cast_column("image", datasets.Image(decode=False))


def _can_hold_image(storage: pa.DataType) -> bool:
    if pa.types.is_struct(storage):
        return {"bytes", "path"} <= {field.name for field in storage}
    return pa.types.is_binary(storage) or pa.types.is_large_binary(storage)


def _select_captions(rows: datasets.Dataset, caption_column: str | None) -> tuple[datasets.Dataset, str | None]:
    """The column of captions, and the field of its JSON objects that holds them, if it has such."""
    caption_column, field = split_field(caption_column, rows.column_names)
    column = find_column(rows, caption_column, CAPTION_COLUMNS, "caption")
    feature = rows.features[column]
    if isinstance(feature, dict):
        field = first_available(feature, field, JSON_CAPTIONS)
        if field is None:
            raise ValueError(f"The objects in {column!r} have no field for captions; they have {', '.join(feature)}.")
        feature = feature[field]
    elif field is not None:
        raise ValueError(f"The column {column!r} holds {_describe(feature)}: it has no field {field!r}.")
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    if not _is_text(inner):
        raise ValueError(f"Captions must be strings or lists of strings; {column!r} holds {_describe(feature)}.")
    captions = rows.select_columns([column])
    return (captions if column == "caption" else captions.rename_column(column, "caption")), field


def _no_captions(num_rows: int) -> datasets.Dataset:
    features = datasets.Features({"caption": datasets.List(datasets.Value("string"))})
    return datasets.Dataset.from_dict({"caption": [[]] * num_rows}, features=features)


def _select_metadata(rows: datasets.Dataset, image_column: str | None, caption_column: str | None):
    """Columns of one text, number or boolean a row, but for those of images and captions; `None` without any."""
    used = {find_column(rows, image_column, IMAGE_COLUMNS, "image"), TOKEN_SOURCE}
    used.update([caption_column] if caption_column else [n for n in CAPTION_COLUMNS if n in rows.column_names][:1])
    names = [
        name
        for name, feature in rows.features.items()
        if name not in used
        and isinstance(feature, datasets.Value)
        and not feature.dtype.startswith(("binary", "large_b"))
    ]
    return rows.select_columns(names) if names else None


def _is_text(feature) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _describe(feature) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else str(feature)


def _check_paths(images: datasets.Dataset, root: Path | None) -> None:
    """See `check_inside`; rows with embedded images may have any path."""
    column = images.with_format("arrow")[:]["image"]
    without_bytes = pc.is_null(pc.struct_field(column, "bytes"))
    paths = [path for path in pc.unique(pc.struct_field(column, "path").filter(without_bytes)).to_pylist() if path]
    if root is not None:
        check_any_exists(check_inside(paths, root, "image"), root, "image")


def _image_keys(images: datasets.Dataset, root: Path | None) -> list[Hashable]:
    """For each row something that is equal for the rows of one image, and for them alone."""
    column = images.with_format("arrow")[:]["image"]
    paths = pc.struct_field(column, "path").to_pylist()
    lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
    num_alike = Counter(zip(paths, lengths, strict=True))
    keys: list[Hashable] = []
    for row, (path, length) in enumerate(zip(paths, lengths, strict=True)):
        if length is None and path:
            keys.append(os.path.abspath(os.path.join(root or "", path)))
        elif length and num_alike[path, length] > 1:
            digest = hashlib.blake2b(images[row]["image"]["bytes"], digest_size=16).digest()
            keys.append((path, digest))
        else:  # one of its kind, or nothing to compare
            keys.append(row)
    return keys


def _group_rows(keys: list[Hashable]) -> list[list[int]]:
    """Rows with equal keys together, in the order in which keys first appear."""
    items: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        items.setdefault(key, []).append(row)
    return list(items.values())


def _count_captions(captions: datasets.Dataset, field: str | None) -> np.ndarray:
    """(R,) number of captions in each row; missing ones do not count."""
    column = captions.with_format("arrow")[:]["caption"]
    if field is not None:
        column = pc.struct_field(column, field)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.is_valid().to_numpy().astype(np.int64)
    is_there = pc.list_flatten(column).is_valid()
    return np.bincount(pc.list_parent_indices(column).filter(is_there).to_numpy(), minlength=len(column))


def _captions_of(captions: datasets.Dataset, row: int, field: str | None) -> list[str]:
    value = captions[row]["caption"]
    if field is not None and value is not None:
        value = value[field]
    return list_captions(value)


def _name(image: dict | None, row: int) -> str:
    return image["path"] if image is not None and image["path"] else f"row {row}"
