"""Turns images and videos into entries of a search index: folders, names and ids, the model's identity, embeddings.

A source is a data set or a folder of images and videos. Each has a name that is the same in every run, and the hash of
the name is the entry's id. By these ids a second run continues where the first was killed. A digest of the pixels
tells copies.
"""

import copy
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.utils import is_av_available, logging

from ..data.image_augmentation import AS_TENSORS, resize_for
from ..data.messages import printable, shown
from ..data.paths import walk_visible
from ..data.skip_report import and_more
from ..image_reading_cots import (
    FORMATS,
    HEIC_CURE,
    HEIC_SUFFIXES,
    IMAGE_SUFFIXES,
    UnreadableImageError,
    read_pixels,
)
from ..video_reading_cots import VIDEO_SUFFIXES, UnreadableVideoError, read_video
from .conditions import MAX_INTEGER, MIN_INTEGER
from .rows import CONTENT, RESERVED_COLUMNS, ROW_ID_DTYPE, fixed_features, free_name

logger = logging.get_logger(__name__)

THUMBNAIL_QUALITY = 80
MAX_REPORTED = 10
PATH_STARTS = ("/", "./", "../", "~/", "data:image/")  # of a query that names a file and is no text


class ImageFolder(Dataset):
    """
    The images and videos in a folder and all its sub-folders, without captions; items as `open_pairs` and
    `open_videos` give them.

    Links are followed, to files and to folders; no file is given twice. Hidden files and folders are left out, and so
    are other files: a warning counts and names these, and links that lead to nothing. So it does for HEIC and videos
    where the library that reads them is not installed.

    Args:
        folder: Where to look.
        list_now: Whether to list the files here, or when they are first asked for, as where several processes open the
            folder and one of them lists it.

    Raises `ValueError` for a folder that is not there and, where it is listed, for one that has nothing to read.
    """

    def __init__(self, folder: str | os.PathLike, list_now: bool = True):
        self._folder, root = str(folder), os.path.realpath(folder)
        if not os.path.isdir(root):
            raise ValueError(f"There is no folder {str(folder)!r}.")
        self.name = printable(root)
        self._paths: Sequence[str] | Mapping[int, str] | None = None
        if list_now:
            self._paths = self._list(root)

    @property
    def paths(self) -> Sequence[str] | Mapping[int, str]:
        """The paths by their numbers."""
        if self._paths is None:
            self._paths = self._list(os.path.realpath(self._folder))
        return self._paths

    def only(self, numbers: Sequence[int]) -> "ImageFolder":
        """The folder with the paths of these numbers alone, which keep them; for a process that reads no others."""
        few = copy.copy(self)
        few._paths = {number: self.paths[number] for number in numbers}
        return few

    def _list(self, root: str) -> list[str]:
        found: dict[str, str] = {}  # by the file that is meant, which links share
        left: dict[str, list[str]] = {}  # names of other files by the reason
        for path in _files_below(root):
            reason = _reason_to_leave(path)
            if reason is not None:
                left.setdefault(reason, []).append(printable(os.path.relpath(path, root)))
                continue
            found.setdefault(os.path.realpath(path), path)
            if not os.path.islink(path):
                found[os.path.realpath(path)] = path
        notes = [
            f"Left out {len(names)} files of {printable(root)}, {reason}: {and_more(names, MAX_REPORTED)}."
            for reason, names in left.items()
        ]
        if not found:
            raise ValueError(
                f"The folder {self._folder!r} has no image ({', '.join(IMAGE_SUFFIXES)}) and no video "
                f"({', '.join(VIDEO_SUFFIXES)}). {' '.join(notes)}".rstrip()
            )
        for note in notes:
            logger.warning(note)
        return sorted(found.values())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        return item_of_file(self.paths[index], index)

    def names(self) -> list[str]:
        """All paths, without opening a file; bytes in them that are no UTF-8 are escaped."""
        paths = self.paths.values() if isinstance(self.paths, Mapping) else self.paths
        return [printable(path) for path in paths]


def item_of_file(path: str, number: int) -> dict:
    """The item of [`ImageFolder`] for a path and its number."""
    media = {"video": path} if is_video(path) else {"image": {"bytes": None, "path": path}}
    return {**media, "captions": [], "pair_id": number, "name": printable(path)}


def _files_below(root: str) -> Iterator[str]:
    """The paths of all visible files but those of search indexes and of `save_to_disk`."""
    from ..data.files import SAVED_FILES  # imports `datasets`, which takes a second that a query does not need

    for place, names in walk_visible(root):
        if not set(SAVED_FILES) <= set(names):
            yield from (os.path.join(place, name) for name in names)


def _reason_to_leave(path: str) -> str | None:
    """Why a file of a folder is not read; `None` for one that is."""
    from ..data.formats import READERS  # as in `_files_below`

    name = path.lower()
    if not os.path.isfile(path):  # a link to nothing
        name = ""
    if name.endswith(HEIC_SUFFIXES) and "HEIF" not in FORMATS:
        return f"which are photographs in HEIC ({HEIC_CURE}, then repeat the command)"
    if is_video(name) and not is_av_available():
        return "which are videos (PyAV reads them: pip install 'modeling_cots[video]', then repeat the command)"
    if name.endswith(IMAGE_SUFFIXES) or is_video(name):
        return None
    if name.endswith(tuple(READERS)):
        return "which are tables or archives (to index what one of them names or holds, give its own name)"
    return "which are neither images nor videos of a known format"


def is_video(name: str) -> bool:
    """Whether the name of a file is that of a video."""
    return name.lower().endswith(VIDEO_SUFFIXES)


def check_text(text: str) -> None:
    """Raise `ValueError` for an empty query, and for the name of an image, which would be searched for as words."""
    if not text.strip():
        raise ValueError("The text to search for is empty.")
    if printable(text) != text:
        raise ValueError(f"The text to search for, {shown(text)}, has bytes that are not UTF-8.")
    words = text.strip()
    suffix = os.path.splitext(words)[1].lower()
    is_image = suffix in Image.registered_extensions() or suffix in (*HEIC_SUFFIXES, *VIDEO_SUFFIXES)
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
    if getattr(dataset, "modality", None) == "video":
        names = [printable(path) for path in dataset.paths]
    else:
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
    """(n,) 32 bytes each: a hash of each name in hexadecimal, the same in every process and vector store.

    It has 128 bits, so that no two of a billion names share one: with the 63 bits of an integer they would, once in 20
    collections of that size, and the second of the two would never be indexed.
    """
    digests = b"".join(hashlib.blake2b(printable(name).encode(), digest_size=16).digest() for name in names)
    return np.frombuffer(digests.hex().encode(), dtype=ROW_ID_DTYPE)


class _Collator:
    """Turns items into pixel values, thumbnails, captions and metadata; runs in the data loader's workers."""

    def __init__(self, processor, thumbnail_side: int):
        self.processor, self.thumbnail_side = processor, thumbnail_side

    def __call__(self, items: list[dict]) -> dict:
        names = ("positions", "captions", "thumbnails", "metadata", "contents", "skipped", "images", "videos")
        batch: dict[str, list] = {name: [] for name in names}
        # Images first: embeddings come in this order, too.
        for item in sorted(items, key=lambda item: "video" in item):
            try:
                frames = _read_frames(item["video"], self.processor) if "video" in item else None
                pixels = read_pixels(item["image"]) if frames is None else frames[len(frames) // 2]
            except (UnreadableImageError, UnreadableVideoError) as error:
                batch["skipped"].append((item["name"], item.get("refused") or str(error)))
                continue
            if frames is None:
                batch["images"].append(resize_for(pixels, self.processor.image_processor))
            else:
                batch["videos"].append(frames)
            batch["positions"].append(item["pair_id"])
            batch["captions"].append(item["captions"])
            batch["thumbnails"].append(make_thumbnail(Image.fromarray(pixels), self.thumbnail_side))
            batch["metadata"].append(item.get("metadata") or {})
            batch["contents"].append(content_of(pixels if frames is None else frames))
        return {
            **batch,
            "images": self._pixels_of_images(batch["images"]),
            "videos": self._pixels_of_videos(batch["videos"]),
        }

    def _pixels_of_images(self, images: list[torch.Tensor]) -> torch.Tensor | None:
        """(B, 3, H, W) of images (3, height, width) of any sizes; `None` without images."""
        if not images:
            return None
        return self.processor.image_processor(images, **AS_TENSORS, return_tensors="pt")["pixel_values"]

    def _pixels_of_videos(self, videos: list[np.ndarray]) -> torch.Tensor | None:
        """(B, T, 3, H, W) of frames (T, height, width, 3) of any sizes; `None` without videos."""
        if not videos:
            return None
        prepare = partial(self.processor.video_processor, do_sample_frames=False, return_tensors="pt")
        frames = (torch.from_numpy(video).permute(0, 3, 1, 2) for video in videos)
        return torch.cat([prepare(each)["pixel_values_videos"] for each in frames])


def _read_frames(path: str | None, processor) -> np.ndarray:
    """The frames (T, H, W, 3) that the model looks at. Raises `UnreadableVideoError`."""
    if path is None:
        raise UnreadableVideoError("Its path is refused.")
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None or not video_processor.num_frames:
        raise UnreadableVideoError("The model's processor has no video processor with a number of frames.")
    choose = partial(video_processor.sample_frames, num_frames=video_processor.num_frames)
    return read_video(path, choose)[0]


def content_of(pixels: np.ndarray) -> str:
    """A digest of the pixels of an image, or of a video's frames: equal for copies, whatever their names and forms."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


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
    def tables(
        self, dataset, positions: np.ndarray, names: Sequence[str] | Mapping[int, str], source: str, progress
    ) -> Iterator[pa.Table]:
        """A table for each batch of the items at `positions`; what cannot be read goes to `skipped` instead."""
        loader = DataLoader(
            _WithMetadata(dataset, positions),
            batch_sampler=self._batches(dataset, [names[int(position)] for position in positions]),
            num_workers=self.num_workers,
            collate_fn=_Collator(self.processor, self.thumbnail_side),
        )
        # A data loader draws a seed, which must not change the caller's random state.
        with torch.random.fork_rng(devices=[]):
            for batch in loader:
                self.skipped.extend(batch["skipped"])
                if batch["positions"]:
                    encoders = (self.model.encode_image, batch["images"]), (self.model.encode_video, batch["videos"])
                    parts = [encode(pixels.to(self.model.device)) for encode, pixels in encoders if pixels is not None]
                    embeds = torch.cat(parts).cpu().numpy()
                    yield _table(batch, embeds, [names[position] for position in batch["positions"]], source)
                progress.update(len(batch["positions"]) + len(batch["skipped"]))

    def _batches(self, dataset, names: list[str]) -> list[list[int]]:
        """The numbers of the items of each batch, which have at most `batch_size` images and frames, or one video."""
        video_processor = getattr(self.processor, "video_processor", None)
        num_frames = (getattr(video_processor, "num_frames", None) or 1) if video_processor is not None else 1
        are_videos = getattr(dataset, "modality", None) == "video"
        batches: list[list[int]] = [[]]
        size = 0
        for number, name in enumerate(names):
            frames = num_frames if are_videos or is_video(name) else 1
            if batches[-1] and size + frames > self.batch_size:
                batches.append([])
                size = 0
            batches[-1].append(number)
            size += frames
        return batches

    def report_skipped(self) -> None:
        """Warn of the images and videos that could not be read, with their names."""
        if self.skipped:
            named = and_more([f"{name} ({error})" for name, error in self.skipped], MAX_REPORTED)
            logger.warning(f"Left out {len(self.skipped)} files that cannot be read: {named}.")


def _table(batch: dict, embeds: np.ndarray, names: list[str], source: str) -> pa.Table:
    fixed = {
        "row_id": row_ids_of(names).astype(str),
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
    columns[CONTENT] = pa.array(batch["contents"])
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


def as_image_folder(dataset: str, split: str = "train") -> Path | None:
    """The path if `dataset` is a folder of plain images and videos, beside foreign files perhaps; else `None`."""
    from ..data.files import holds_dataset  # imports `datasets`, which takes a second that a query does not need

    path = Path(dataset).expanduser()
    return path if path.is_dir() and not holds_dataset(path, split) else None
