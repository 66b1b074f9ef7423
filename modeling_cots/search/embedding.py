"""Turns images into entries of a search index: folders of images, names and ids, the model's identity, embeddings.

A source is a data set of pairs or a folder of images. Each image has a name that is the same in every run, and the
hash of the name is the entry's id. By these ids a second run continues where the first was killed.
"""

import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..data.files import SAVED_FILES, holds_dataset
from ..data.messages import printable, shown
from ..data.paths import walk_visible
from ..data.skip_report import and_more
from ..image_reading_cots import IMAGE_SUFFIXES, UnreadableImageError, read_image
from .conditions import MAX_INTEGER, MIN_INTEGER
from .rows import RESERVED_COLUMNS, fixed_features, free_name

logger = logging.get_logger(__name__)

THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 192, 80
MAX_REPORTED = 10
PATH_STARTS = ("/", "./", "../", "~/", "data:image/")  # of a query that names a file and is no text


class ImageFolder(Dataset):
    """
    The images in a folder and all its sub-folders, without captions; items as `open_pairs` gives them.

    Links are followed, to images and to folders; no image is given twice. Hidden files and folders are left out, and
    so are other files: a warning counts and names these, and links that lead to nothing. Raises `ValueError` for a
    folder that is not there or has no image.
    """

    def __init__(self, folder: str | os.PathLike):
        root = os.path.realpath(folder)
        if not os.path.isdir(root):
            raise ValueError(f"There is no folder {str(folder)!r}.")
        images: dict[str, str] = {}  # by the file that is meant, which links share
        others = []
        for place, names in walk_visible(root):
            if set(SAVED_FILES) <= set(names):  # a search index
                continue
            for name in names:
                path = os.path.join(place, name)
                if name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path):
                    images.setdefault(os.path.realpath(path), path)
                    if not os.path.islink(path):
                        images[os.path.realpath(path)] = path
                else:
                    others.append(printable(os.path.relpath(path, root)))
        if not images:
            raise ValueError(f"The folder {str(folder)!r} has no image ({', '.join(IMAGE_SUFFIXES)}).")
        if others:
            logger.warning(
                f"Left out {len(others)} files of {printable(root)}, which are no images of a known format: "
                f"{and_more(others, MAX_REPORTED)}."
            )
        self.paths = sorted(images.values())
        self.name = printable(root)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        path = self.paths[index]
        return {"image": {"bytes": None, "path": path}, "captions": [], "pair_id": index, "name": printable(path)}

    def names(self) -> list[str]:
        """All paths, without opening a file; bytes in them that are no UTF-8 are escaped."""
        return [printable(path) for path in self.paths]


def check_text(text: str) -> None:
    """Raise `ValueError` for an empty query, and for the name of an image, which would be searched for as words."""
    if not text.strip():
        raise ValueError("The text to search for is empty.")
    words = text.strip()
    is_image = os.path.splitext(words)[1].lower() in Image.registered_extensions()
    if is_image or words.startswith(PATH_STARTS) or re.match(r"[A-Za-z]:\\|\w+://", words):
        state = "which is a file" if os.path.isfile(words) else "which looks like a file that is not there"
        raise ValueError(
            f"The text to search for is {shown(text)}, {state}: to find images like an image, give it as `image` "
            "(--image on the command line)."
        )


def entry_names(dataset, source: str) -> list[str]:
    """A unique name for each item, the same in every run.

    The name of a file is its path; the name of an image in a table or an archive is "source: name". Repeated names get
    a number.
    """
    names = dataset.names() if hasattr(dataset, "names") else [f"row {index}" for index in range(len(dataset))]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        name = name if os.path.isabs(name) else f"{source}: {name}"
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def known_names(name: str) -> list[str]:
    """The names that an index may have for what a user types: an entry's own name, or a path with or without links."""
    in_folder = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
    return list(dict.fromkeys([name, os.path.realpath(name), in_folder, os.path.abspath(name)]))


def row_ids_of(names: list[str]) -> np.ndarray:
    """(n,) int64 from 0 to 2**63: a hash of each name, which is the same in every process and vector store."""
    digests = b"".join(hashlib.blake2b(printable(name).encode(), digest_size=8).digest() for name in names)
    return (np.frombuffer(digests, dtype=np.uint64) >> np.uint64(1)).astype(np.int64)


class _Collator:
    """Turns items into pixel values, thumbnails, captions and metadata; runs in the data loader's workers."""

    def __init__(self, image_processor, thumbnail_side: int):
        self.image_processor, self.thumbnail_side = image_processor, thumbnail_side

    def __call__(self, items: list[dict]) -> dict:
        batch = {
            "pixel_values": None,
            "positions": [],
            "captions": [],
            "thumbnails": [],
            "metadata": [],
            "skipped": [],
        }
        images = []
        for item in items:
            try:
                image = read_image(item["image"])
            except UnreadableImageError as error:
                batch["skipped"].append((item["name"], str(error)))
                continue
            images.append(image)
            batch["positions"].append(item["pair_id"])
            batch["captions"].append(item["captions"])
            batch["thumbnails"].append(make_thumbnail(image, self.thumbnail_side))
            batch["metadata"].append(item.get("metadata") or {})
        if images:
            batch["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch


class _WithMetadata(Dataset):
    """The items of a data set at `positions`, each with its position and its metadata (which may be empty)."""

    def __init__(self, dataset, positions: np.ndarray):
        self.dataset, self.positions = dataset, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict:
        position = int(self.positions[index])
        metadata = self.dataset.metadata(position) if hasattr(self.dataset, "metadata") else {}
        metadata = {name: _plain(value) for name, value in metadata.items()}
        return {**self.dataset[position], "pair_id": position, "metadata": metadata}


def _plain(value):
    """
    A value that every vector store holds alike, of the kind that conditions compare.

    Dates become ISO text, which sorts in the same order, decimals floats, and integers beyond 64 bits the nearest
    float. Numbers that are not finite count as missing.
    """
    if isinstance(value, Decimal) or (isinstance(value, int) and not MIN_INTEGER <= value <= MAX_INTEGER):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def make_thumbnail(image, side: int) -> dict | None:
    """A JPEG of an RGB image, at most `side` pixels wide and high; `None` for a side of 0."""
    if side == 0:
        return None
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY, optimize=True)
    return {"bytes": file.getvalue(), "path": None}


class Embedder:
    """
    Turns chosen items of a data set into tables of entries with a [`COTSModel`].

    Args:
        model, processor: The model, on its device, and its processor.
        batch_size: Images a forward pass.
        num_workers: Processes that decode images beside this one.
        thumbnail_side: Pixels of the stored thumbnails, 0 for none.
    """

    def __init__(self, model, processor, *, batch_size: int, num_workers: int, thumbnail_side: int):
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.num_workers, self.thumbnail_side = batch_size, num_workers, thumbnail_side
        self.skipped: list[tuple[str, str]] = []

    @torch.no_grad()
    def tables(self, dataset, positions: np.ndarray, names: list[str], source: str, progress) -> Iterator[pa.Table]:
        """A table for each batch of the items at `positions`; unreadable images go to `skipped` instead."""
        loader = DataLoader(
            _WithMetadata(dataset, positions),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_Collator(self.processor.image_processor, self.thumbnail_side),
        )
        # A data loader draws a seed, which must not change the caller's random state.
        with torch.random.fork_rng(devices=[]):
            for batch in loader:
                self.skipped.extend(batch["skipped"])
                if batch["positions"]:
                    embeds = self.model.encode_image(batch["pixel_values"].to(self.model.device)).cpu().numpy()
                    yield _table(batch, embeds, [names[position] for position in batch["positions"]], source)
                progress.update(len(batch["positions"]) + len(batch["skipped"]))

    def report_skipped(self) -> None:
        """Warn of the images that could not be read, with their names."""
        if self.skipped:
            named = and_more([f"{name} ({error})" for name, error in self.skipped], MAX_REPORTED)
            logger.warning(f"Left out {len(self.skipped)} images that cannot be read: {named}.")


def _table(batch: dict, embeds: np.ndarray, names: list[str], source: str) -> pa.Table:
    fixed = {
        "row_id": row_ids_of(names).tolist(),
        "name": names,
        "source": [source] * len(names),
        "captions": batch["captions"],
        "thumbnail": batch["thumbnails"],
    }
    schema = fixed_features(embeds.shape[1]).arrow_schema
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(embeds.reshape(-1), pa.float32()), embeds.shape[1])
    columns = {
        **{name: pa.array(values, schema.field(name).type) for name, values in fixed.items()},
        "embedding": embedding,
    }
    names_of_metadata = {name for row in batch["metadata"] for name in row}
    for name in sorted(names_of_metadata):
        stored = free_name(name, {*RESERVED_COLUMNS, *names_of_metadata}) if name in RESERVED_COLUMNS else name
        columns[stored] = _metadata_array([row.get(name) for row in batch["metadata"]])
    return pa.table(columns)


def _metadata_array(values: list) -> pa.Array:
    """Values as an Arrow array; beside floats, integers become floats, too, also where these have to be rounded."""
    if any(isinstance(value, float) for value in values):
        values = [float(value) if isinstance(value, int) else value for value in values]
    return pa.array(values)


def as_image_folder(dataset: str) -> Path | None:
    """The path if `dataset` is a folder of plain images, beside foreign files perhaps; else `None`."""
    path = Path(dataset).expanduser()
    return path if path.is_dir() and not holds_dataset(path) else None
