"""Computes the features of a data set once, and gives them to its items as columns.

Features are written as shards of parquet into a folder named after all that determines them: the encoder, how its
inputs are prepared, and the data. Another encoder, or data that have changed, get another folder. A run that was
stopped goes on: it keeps the shards that it can read and writes the others.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from ..image_reading_cots import UnreadableImageError, read_pixels
from ..modeling_cots import COTSModel
from .atomic_write import atomic_write
from .feature_cache import TRAINING, FeatureSource
from .image_augmentation import AS_TENSORS, ImageTransform, resize_for
from .image_collators import RAW_PIXELS, tokenize
from .image_token_writing import SHARD_ROWS, is_whole_shard
from .pixel_normalization import PixelNormalizer
from .skip_report import SkipReport

TEXTS_AT_A_TIME = 256  # more would be padded to a longer one; a batch of images has five times as many captions


class FeatureDataset(Dataset):
    """
    A data set whose items have columns of cached features; all else is that of the data set.

    Args:
        dataset: Items as `open_pairs` gives them.
        columns: For each source, the features of an item by its number: (rows, H) float32, or `None` for an image that
            could not be read.
    """

    def __init__(self, dataset, columns: Mapping[FeatureSource, Callable[[int], np.ndarray | None]]):
        self.dataset, self.columns = dataset, columns

    def __getattr__(self, name: str):
        if name in ("dataset", "columns"):  # not there yet, as while a copy is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = dict(self.dataset[index])
        for source, of_item in self.columns.items():
            item[source.column], item[f"{source.column}_source"] = of_item(index % len(self)), source.to_json()
        return item


class FeatureComputer:
    """
    Computes the features of images or captions with a [`COTSModel`] in evaluation mode.

    Args:
        model: On the device to compute on.
        processor: Its [`COTSProcessor`].
        source: Says of what kind, and how images are resized and captions cut.
        flipped: Whether flipped images get features, too.
    """

    def __init__(self, model: COTSModel, processor, source: FeatureSource, flipped: bool = False):
        self.model, self.source, self.flipped = model, source, flipped
        self.normalize_pixels = PixelNormalizer(processor).to(model.device)
        self.collate = _TextInputs(processor, source) if source.kind == "text" else _ImageInputs(processor, source)

    def compute(
        self, items: Dataset, *, batch_size: int, num_workers: int = 0, bar=None
    ) -> Iterator[np.ndarray | None]:
        """The features of each item, (rows, H) float32, or `None` for an image that cannot be read."""
        loader = DataLoader(items, batch_size, num_workers=num_workers, collate_fn=self.collate)
        was_training = self.model.training
        self.model.eval()
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
            for batch in loader:
                with self.autocast():
                    rows = self._text_rows(batch) if self.source.kind == "text" else self._image_rows(batch)
                if bar is not None:
                    bar.update(len(rows))
                yield from rows
        self.model.train(was_training)

    def autocast(self) -> torch.autocast:
        precision = getattr(torch, self.source.precision)
        return torch.autocast(self.model.device.type, precision, enabled=precision != torch.float32)

    @torch.no_grad()
    def _image_rows(self, batch: dict) -> list[np.ndarray | None]:
        pixels = self.normalize_pixels({"pixel_values": batch["pixel_values"].to(self.model.device)})["pixel_values"]
        versions = [pixels, pixels.flip(-1)] if self.flipped else [pixels]
        features = torch.stack([self.model.run_vision_model(each).pooler_output for each in versions], dim=1)
        return [
            row if valid else None for row, valid in zip(features.float().cpu().numpy(), batch["valid"], strict=True)
        ]

    @torch.no_grad()
    def _text_rows(self, batch: dict) -> list[np.ndarray | None]:
        parts = [
            self.model.run_text_model(*(each.to(self.model.device) for each in part)).pooler_output.float().cpu()
            for part in zip(
                batch["input_ids"].split(TEXTS_AT_A_TIME), batch["attention_mask"].split(TEXTS_AT_A_TIME), strict=True
            )
        ]
        return list(np.split(torch.cat(parts).numpy(), np.cumsum(batch["counts"])[:-1]))


class _ImageInputs:
    """Pixels of items, in the data loader's workers: those that training sees, or those that evaluation sees."""

    def __init__(self, processor, source: FeatureSource):
        self.processor = processor.image_processor
        self.transform = None
        if source.view == TRAINING:
            assert source.image_size is not None  # as of all images
            self.transform = ImageTransform(source.image_size, self.processor.image_mean, min_crop_scale=1.0)
        self.report = SkipReport()

    def __call__(self, items: list[dict]) -> dict:
        pixels, valid = [], []
        for item in items:
            try:
                pixels.append(self._pixels_of(item["image"]))
                valid.append(True)
            except UnreadableImageError as error:
                self.report.add(item["name"], error)
                pixels.append(self._pixels_of(Image.new("RGB", (1, 1))))
                valid.append(False)
        return {"pixel_values": torch.stack(pixels), "valid": valid}

    def _pixels_of(self, image) -> torch.Tensor:
        if self.transform is not None:
            return self.transform(image)
        pixels = resize_for(read_pixels(image), self.processor)
        return self.processor([pixels], **AS_TENSORS, **RAW_PIXELS)["pixel_values"][0]


class _TextInputs:
    """Token ids of all captions of items."""

    def __init__(self, processor, source: FeatureSource):
        assert source.max_text_length is not None  # as of all texts
        self.tokenizer, self.max_text_length = processor.tokenizer, source.max_text_length

    def __call__(self, items: list[dict]) -> dict:
        captions = [caption for item in items for caption in item["captions"]]
        tokens = tokenize(self.tokenizer, captions, self.max_text_length)
        counts = [len(item["captions"]) for item in items]
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "counts": counts}


def cache_features(
    dataset,
    model: COTSModel,
    processor,
    folder: str | os.PathLike,
    *,
    kinds: tuple[str, ...] = ("image", "text"),
    max_text_length: int = 64,
    view: str = TRAINING,
    flipped: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = True,
    precision: str = "float32",
) -> FeatureDataset:
    """
    Give the items of a data set the features of their images and captions, computed once and then found in `folder`.

    Args:
        dataset: Items as `open_pairs` and `ScenesDataset` give them; its features are kept in memory.
        model: The [`COTSModel`] whose encoders compute them, on the device to compute on.
        processor: Its [`COTSProcessor`].
        kinds: "image", "text" or both: those of encoders that will be frozen whole.
        max_text_length: Captions are cut to so many tokens.
        view: "training", or "evaluation", which resizes images as the processor does.
        flipped: Whether to add features of flipped images, for training with `horizontal_flip`.
        batch_size, num_workers: Of the passes over the data.
        precision: "float32", "bfloat16" or "float16", in which the encoder's matrices are multiplied.
    """
    digests, counts = _fingerprints(dataset)
    columns = {}
    for kind in kinds:
        if kind == "image":
            source = FeatureSource.of_images(model, processor, view)
        else:
            source = FeatureSource.of_texts(model, processor, max_text_length)
        source = replace(source, precision=precision)
        num_rows = [1] * len(dataset) if kind == "image" else counts
        name = hashlib.blake2b(
            f"{source.to_json()} {digests[kind]} {flipped and kind == 'image'} {SHARD_ROWS}".encode(), digest_size=10
        )
        computer = FeatureComputer(model, processor, source, flipped and kind == "image")
        writer = _Writer(Path(folder) / f"{kind}-{name.hexdigest()}", num_rows, computer)
        writer.write(dataset, batch_size=batch_size, num_workers=num_workers, progress=progress)
        columns[source] = writer.read()
    return FeatureDataset(dataset, columns)


def _fingerprints(dataset) -> tuple[dict[str, str], list[int]]:
    """Digests of all images (of a file its name, size and time) and of all captions; the captions of each item."""
    images, texts = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    counts = []
    for index in range(len(dataset)):
        item = dataset[index]
        images.update(_fingerprint(item["image"]))
        counts.append(len(item["captions"]))
        texts.update(repr(item["captions"]).encode("utf-8", "replace"))
    return {"image": images.hexdigest(), "text": texts.hexdigest()}, counts


def _fingerprint(image) -> bytes:
    if isinstance(image, bytes):
        return hashlib.blake2b(image, digest_size=16).digest()
    if not isinstance(image, dict):  # an image in memory
        return hashlib.blake2b(image.tobytes() + repr((image.size, image.mode)).encode(), digest_size=16).digest()
    if image.get("bytes") is not None:
        return hashlib.blake2b(image["bytes"], digest_size=16).digest()
    try:
        state = os.stat(image["path"])
    except (OSError, TypeError):
        return f"{image.get('path')} cannot be read".encode()
    return f"{image['path']} {state.st_size} {state.st_mtime_ns}".encode()


class _Columns:
    """Features by the number of an item: rows of an array, some of which may be of unreadable images."""

    def __init__(self, features: np.ndarray, valid: np.ndarray, starts: np.ndarray):
        self.features, self.valid, self.starts = features, valid, starts

    def __call__(self, index: int) -> np.ndarray | None:
        first, last = self.starts[index], self.starts[index + 1]
        if not self.valid[first:last].all():
            return None
        return self.features[first:last].reshape(-1, self.features.shape[-1])


class _Writer:
    """The shards of one folder: rows are images, of one or two features each, or captions."""

    def __init__(self, folder: Path, num_rows: list[int], computer: FeatureComputer):
        self.folder, self.computer = folder, computer
        self.starts = np.cumsum([0, *num_rows])
        self.num_views = 2 if computer.flipped else 1
        width = pa.list_(pa.float32(), self.num_views * computer.source.size)
        self.schema = pa.schema({"features": width, "valid": pa.bool_()})
        self.items = range(0, len(num_rows), SHARD_ROWS)
        total = len(self.items)
        self.paths = [folder / f"features-{number:05d}-of-{total:05d}.parquet" for number in range(total)]

    def write(self, dataset, *, batch_size: int, num_workers: int, progress: bool) -> None:
        """Compute and write the shards that are not there whole."""
        missing = []
        for path, first in zip(self.paths, self.items, strict=True):
            rows = range(first, min(first + SHARD_ROWS, len(dataset)))
            if not is_whole_shard(path, int(self.starts[rows[-1] + 1] - self.starts[first])):
                missing.append((path, rows))
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        total = sum(len(rows) for _, rows in missing)
        title = f"Caching {self.computer.source.kind} features"
        with tqdm(total=total, desc=title, unit=" images", disable=not progress) as bar:
            for path, rows in missing:
                found = self.computer.compute(
                    Subset(dataset, rows), batch_size=batch_size, num_workers=num_workers, bar=bar
                )
                table = self._table(list(found))
                with atomic_write(path) as partial:
                    pq.write_table(table, partial)

    def _table(self, found: list[np.ndarray | None]) -> pa.Table:
        blank = np.zeros((1, self.num_views * self.computer.source.size), dtype=np.float32)
        is_text = self.computer.source.kind == "text"
        rows = [blank if each is None else each if is_text else each.reshape(1, -1) for each in found]
        valid = np.concatenate([np.full(len(row), each is not None) for row, each in zip(rows, found, strict=True)])
        values = pa.array(np.concatenate(rows).reshape(-1))
        features = pa.FixedSizeListArray.from_arrays(values, self.num_views * self.computer.source.size)
        return pa.Table.from_arrays([features, pa.array(valid)], schema=self.schema)

    def read(self) -> _Columns:
        """All shards, in memory."""
        tables = [pq.read_table(path, schema=self.schema).combine_chunks() for path in self.paths]
        table = pa.concat_tables(tables).combine_chunks() if tables else self.schema.empty_table()
        chunks = table["features"].chunks
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        size = self.computer.source.size
        features = np.concatenate(values).reshape(-1, self.num_views, size) if values else np.empty((0, 1, size))
        return _Columns(features, table["valid"].to_numpy(), self.starts)
