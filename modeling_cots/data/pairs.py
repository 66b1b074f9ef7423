"""`open_pairs`: a user's own images and captions as a data set with one item for each image and all its captions.

Images are decoded in the collator, not here: it skips and counts those that it cannot read, while an exception in a
data set would end the epoch. files.py finds the files.
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
from .revisions import refuse_version
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
    dataset_config: str | None = None,
    revision: str | None = None,
) -> "PairDataset":
    """
    Open a split of image-caption pairs, grouped by image.

    Two rows are the same image if they name the same file, or if their embedded images have the same name and bytes.
    (Bytes are compared by a digest, and only where name and length agree.) An image without a caption is left out and
    reported by name. An empty string is a caption.

    Args:
        dataset: A Hub id; a folder of images with metadata.jsonl or metadata.csv; a file, folder or glob of .parquet,
            of WebDataset .tar shards, or of .jsonl, .json, .csv with image paths relative to that file; or Flickr8k,
            Flickr30k or COCO in Karpathy's form (`load_karpathy`).
        split: Its name, with a slice of rows if wanted ("train[:1000]"). A single file is the split itself.
        image_folder: Where the images are, if not beside the file; for Karpathy's form only.
        image_column: Holds images, bytes or paths. By default the first that exists of image, file_name, jpg, jpeg,
            png, webp.
        caption_column: Holds a string or a list of strings in each row, or a JSON object with them in its field
            caption, captions or text. "column.field" names another field. By default the first that exists of
            caption, captions, text, txt, json.
        seed: Seed of the random draws for each item in training.
        keep_uncaptioned: Keep images without captions, and need no column of captions; for indexing images.
        dataset_config, revision: Configuration and version of a Hub id, see `load_rows`.

    Raises `ValueError` for a data set, split or column that does not exist, an empty data set, captions that are no
    strings, a column without images, image paths that leave the folder, and a folder in which no image exists.
    """
    if is_karpathy(dataset):
        refuse_version(dataset, dataset_config, revision)
        rows, root = load_karpathy(dataset, split, image_folder)
    elif image_folder is not None:
        raise ValueError(f"image_folder is for Karpathy's form (dataset_flickr30k.json, ...), not for {dataset!r}.")
    else:
        rows, root = load_rows(dataset, split, dataset_config, revision)
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
    number, "name": path or row of the image, for reports, "seed": int}. Where a symbolic link leads out of the folder,
    the image has no path, and the reason under "refused". Items with cached image tokens also have "image_tokens" and
    "image_tokens_source" (image_token_cache.py).

    Args:
        images: R rows with an undecoded column "image".
        captions: The same R rows with a column "caption": a string, a list of strings or a JSON object.
        field: The field of the JSON object that holds the captions; `None` without objects.
        items: The rows of each of the N images. The first of them gives the image.
        root: Folder that image paths are relative to; `None` leaves the paths as they are.
        seed: Seed of the random draws for each item in training.
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
        # Arrays, as counting references to lists of lists would copy them in each worker process, page by page.
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
        """All captions, without reading an image."""
        for row in self._rows.tolist():
            yield from _captions_of(self._captions, row, self._field)

    def names(self) -> list[str]:
        """The `name` of every item, without reading an image."""
        column = self._images.with_format("arrow")[:]["image"]
        paths = pc.struct_field(column, "path").to_pylist()
        rows = (int(row) for row in self._rows[self._starts[:-1]])
        return [os.path.join(self._root or "", paths[row]) if paths[row] else f"row {row}" for row in rows]

    def metadata(self, index: int) -> dict:
        """The texts, numbers and booleans in the other columns of an item's first row, by column."""
        return {} if self.metadata_rows is None else self.metadata_rows[int(self._rows[self._starts[index]])]

    def set_epoch(self, epoch: int) -> None:
        """Give every item a fresh seed."""
        self._seeds.set_epoch(epoch)


def _select_images(rows: datasets.Dataset, image_column: str | None, root: Path | None) -> datasets.Dataset:
    """A table with one column "image" of {"bytes", "path"}, whatever form the images have."""
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
    """A table with one column "caption", and the field of its JSON objects that holds the captions, if it has any."""
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
    """The columns of texts, numbers and booleans beside images and captions; `None` if there are none."""
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
    """Check the paths of images that are files. The path of an embedded image is only a name, and may be any."""
    column = images.with_format("arrow")[:]["image"]
    without_bytes = pc.is_null(pc.struct_field(column, "bytes"))
    paths = [path for path in pc.unique(pc.struct_field(column, "path").filter(without_bytes)).to_pylist() if path]
    if root is not None:
        check_any_exists(check_inside(paths, root, "image"), root, "image")


def _image_keys(images: datasets.Dataset, root: Path | None) -> list[Hashable]:
    """A key for each row: rows have equal keys if they show the same image, and only then."""
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
        else:  # no other row has this name and length, or there are no bytes to compare
            keys.append(row)
    return keys


def _group_rows(keys: list[Hashable]) -> list[list[int]]:
    """Groups of rows with equal keys, in the order in which the keys first appear."""
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
