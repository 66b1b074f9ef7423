"""Writes the image tokens of a whole data set beside its images: shards of parquet, which `open_pairs` opens.

A run that was stopped goes on: it keeps the shards that it can read and writes the others.
"""

import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..image_reading_cots import FORMATS, UnreadableImageError, read_image
from ..method.image_tokenizer import ImageTokenizer
from .atomic_write import atomic_write
from .image_augmentation import ImageTransform
from .image_token_cache import TokenSource
from .rows import IMAGE_TOKENS, TOKEN_SOURCE, TOKENS_TYPE
from .skip_report import SkipReport
from .streaming.dataset import pair_id_of
from .streaming.token_table import PAIR_ID

logger = logging.get_logger(__name__)

SHARD_ROWS = 1000
GROUP_ROWS = 100
OLD_PARTIAL_SUFFIX = ".unfinished"  # earlier versions left files of this suffix when they were stopped
UNREADABLE = (pa.ArrowException, OSError)
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "captions": pa.list_(pa.string()),
        IMAGE_TOKENS: TOKENS_TYPE,
        TOKEN_SOURCE: pa.string(),
    }
)
IDS_SCHEMA = pa.schema(
    {PAIR_ID: pa.int64(), **{name: SCHEMA.field(name).type for name in (IMAGE_TOKENS, TOKEN_SOURCE)}}
)


class TokenWriter:
    """
    Computes the image tokens of a data set of pairs, and writes them with its images and captions.

    Args:
        image_tokenizer: On the device to compute on.
        image_size, patch_size: Height and width, of the model that will be trained.
        flipped: Whether to add the tokens of the flipped image, for training with `horizontal_flip`.
        batch_size: Images of a forward pass.
        num_workers: Processes that decode images beside this one.
        shard_rows: Images a file.
        with_images: Whether to write images and captions, too; otherwise the ids of the images (`pair_id_of`) stand
            beside their tokens, for a stream of the same images (`open_stream(..., image_tokens=...)`).

    Raises `ValueError` for a vocabulary beyond uint16.
    """

    def __init__(
        self,
        image_tokenizer: ImageTokenizer,
        image_size: tuple[int, int],
        patch_size: tuple[int, int],
        *,
        flipped: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        shard_rows: int = SHARD_ROWS,
        with_images: bool = True,
    ):
        self.image_tokenizer, self.patch_size, self.flipped = image_tokenizer, tuple(patch_size), flipped
        self.source = TokenSource.of(image_tokenizer, image_size, patch_size)
        self.batch_size, self.num_workers, self.shard_rows = batch_size, num_workers, shard_rows
        self.with_images = with_images
        self.collate = _Collator(ImageTransform(image_size, [0.5] * 3, min_crop_scale=1.0))

    def write(self, dataset, output_dir: str, split: str, *, progress: bool = True) -> list[Path]:
        """
        Write `split`-00000-of-N.parquet and so on, with one row for each item of `dataset`.

        Shards that are there and can be read stay. Raises `ValueError` for a folder with shards of the split that were
        written from another data set or with other options.
        """
        starts = range(0, len(dataset), self.shard_rows)
        paths = [Path(output_dir) / f"{split}-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts))]
        metadata = self._metadata(dataset)
        _check_folder(paths, metadata, split)
        os.makedirs(output_dir, exist_ok=True)
        with tqdm(total=len(dataset), desc="Tokenizing", unit=" images", disable=not progress) as bar:
            for path, start in zip(paths, starts, strict=True):
                rows = range(start, min(start + self.shard_rows, len(dataset)))
                if is_whole_shard(path, len(rows)):
                    bar.update(len(rows))
                    continue
                path.with_suffix(OLD_PARTIAL_SUFFIX).unlink(missing_ok=True)
                with atomic_write(path) as partial:
                    self._write_shard(partial, Subset(dataset, rows), metadata, bar)
        return paths

    def _metadata(self, dataset) -> dict[bytes, bytes]:
        """The data set and the options, kept in each file: a resumed run compares them with its own."""
        num_tokenized = 2 if self.flipped else 1
        name = getattr(dataset, "name", "")
        # These words are a file format: with others a run would refuse the files that an earlier version wrote.
        what = f"{name}, {len(dataset)} images, {self.shard_rows} a file, {num_tokenized} views"
        what += "" if self.with_images else ", ids alone"
        return {b"cots": f"{what}, {self.source.to_json()}".encode()}

    @torch.no_grad()
    def _write_shard(self, path: Path, items: Subset, metadata: dict, bar) -> None:
        schema = (SCHEMA if self.with_images else IDS_SCHEMA).with_metadata(metadata)
        loader = DataLoader(items, self.batch_size, num_workers=self.num_workers, collate_fn=self.collate)
        with pq.ParquetWriter(path, schema) as writer:
            waiting = []
            for batch in loader:
                waiting.extend(self._rows(batch))
                bar.update(len(batch["images"]))
                while len(waiting) >= GROUP_ROWS:
                    writer.write_table(pa.Table.from_pylist(waiting[:GROUP_ROWS], schema))
                    waiting = waiting[GROUP_ROWS:]
            if waiting:
                writer.write_table(pa.Table.from_pylist(waiting, schema))

    def _rows(self, batch: dict) -> Iterator[dict]:
        """Rows of the table. Images that cannot be read get no tokens; training skips them with or without."""
        tokens = _tokens_of(self.image_tokenizer, batch["pixel_values"], self.patch_size, self.flipped)
        source = self.source.to_json()
        for image, captions, row, valid in zip(
            batch["images"], batch["captions"], tokens, batch["valid"], strict=True
        ):
            what = (
                {"image": image, "captions": captions} if self.with_images else {PAIR_ID: pair_id_of(image["bytes"])}
            )
            yield {
                **what,
                IMAGE_TOKENS: row if valid else None,
                TOKEN_SOURCE: source,
            }


def _tokens_of(image_tokenizer, pixel_values: torch.Tensor, patch_size: tuple[int, ...], flipped: bool) -> list:
    """For each of B images a list of its tokens and, if wanted, one of those of the flipped image."""
    pixels = pixel_values.to(image_tokenizer.image_mean.device)
    versions = [pixels, pixels.flip(-1)] if flipped else [pixels]
    return torch.stack([image_tokenizer(each, patch_size) for each in versions], dim=1).tolist()


class TokenWorker:
    """
    Computes the image tokens of rows of `ray_parts.py`, without writing the images.

    Args:
        load: Gives the image tokenizer, on the device to compute on.
        read: Gives the items of rows.
        source: What the tokens are made with; another tokenizer is refused.
        flipped, batch_size, num_workers: See [`TokenWriter`].

    Raises `ValueError` for another image tokenizer than `source` says.
    """

    def __init__(
        self,
        load: Callable[[], ImageTokenizer],
        read: Callable[[pa.Table], list[dict]],
        source: TokenSource,
        flipped: bool,
        batch_size: int,
        num_workers: int,
    ):
        self._image_tokenizer, self._read, self._source, self._flipped = load(), read, source, flipped
        here = TokenSource.of(self._image_tokenizer, source.image_size, source.patch_size)
        if difference := here.differences(source):
            raise ValueError(
                f"The image tokenizer is another one here than where the command was started: {difference}."
            )
        self._load = partial(
            DataLoader,
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_IdCollator(ImageTransform(source.image_size, [0.5] * 3, min_crop_scale=1.0)),
        )

    @torch.no_grad()
    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[tuple[str, str]]]:
        """The table of ids, names and tokens of what can be read, and the names of the rest with the reasons."""
        tokens, pair_ids, valid, skipped = [], [], [], []
        for batch in self._load(self._read(rows)):
            tokens += _tokens_of(self._image_tokenizer, batch["pixel_values"], self._source.patch_size, self._flipped)
            pair_ids += batch["pair_ids"]
            valid += batch["valid"]
            skipped += batch["skipped"]
        table = rows.select(["row_id", "name"]).append_column(PAIR_ID, pa.array(pair_ids, pa.int64()))
        table = table.append_column(IMAGE_TOKENS, pa.array(tokens, TOKENS_TYPE))
        sources = pa.array([self._source.to_json()] * len(table), pa.string())
        return table.append_column(TOKEN_SOURCE, sources).filter(pa.array(valid, pa.bool_())), skipped


def _check_folder(paths: list[Path], metadata: dict, split: str) -> None:
    """Raise `ValueError` for files of the split that this run would not write. Unreadable ones are written anew."""
    for path in sorted(paths[0].parent.glob(f"{split}*.parquet")):
        try:
            is_expected = path in paths and pq.read_schema(path).metadata == metadata
        except UNREADABLE:
            is_expected = True
        if not is_expected:
            raise ValueError(
                f"{path} was written from another data set, with another image tokenizer or size, or with other "
                "options: write to another folder, or remove it."
            )


def is_whole_shard(path: Path, num_rows: int) -> bool:
    """Whether every row of a shard can be read; a warning names a file of which that is not true."""
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path) as file:
            # All columns: a crash of the machine may leave holes in a file whose beginning and end are sound.
            num_read = sum(batch.num_rows for batch in file.iter_batches(batch_size=GROUP_ROWS))
        if num_read == num_rows:
            return True
        reason = f"{num_read} rows in place of {num_rows}"
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning(f"{path} is damaged ({reason}) and is written anew.")
    return False


class _PixelCollator:
    """Turns items into raw pixels, and names those that cannot be read; in the data loader's workers."""

    def __init__(self, transform: ImageTransform):
        self.transform = transform

    def __call__(self, items: list[dict]) -> dict:
        pixels, valid, skipped = [], [], []
        for item in items:
            try:
                pixels.append(self.transform(item["image"]))
                valid.append(True)
            except UnreadableImageError as error:
                skipped.append((item["name"], str(error)))
                pixels.append(torch.zeros(3, *self.transform.image_size, dtype=torch.uint8))
                valid.append(False)
        return {"pixel_values": torch.stack(pixels), "valid": valid, "skipped": skipped}


class _Collator:
    """Turns items into raw pixels, encoded images and captions, in the data loader's workers."""

    def __init__(self, transform: ImageTransform):
        self.collate_pixels = _PixelCollator(transform)
        self.report = SkipReport()

    def __call__(self, items: list[dict]) -> dict:
        batch = self.collate_pixels(items)
        for name, reason in batch["skipped"]:
            self.report.add(name, UnreadableImageError(reason))
        return {
            **batch,
            "images": [{"bytes": encoded_image(item["image"]), "path": item["name"]} for item in items],
            "captions": [item["captions"] for item in items],
        }


class _IdCollator:
    """Turns items into raw pixels and the ids of their images, in the data loader's workers."""

    def __init__(self, transform: ImageTransform):
        self.collate_pixels = _PixelCollator(transform)

    def __call__(self, items: list[dict]) -> dict:
        return {
            **self.collate_pixels(items),
            "pair_ids": [pair_id_of(encoded_image(item["image"])) for item in items],
        }


def encoded_image(image) -> bytes:
    """
    The encoded bytes of an item's image: its own, those of its file, or a PNG of an image in memory.

    A missing or refused image gives no bytes, so that it cannot be read later either, and neither does a file that is
    no image, whole or damaged: a path in data may name any file of its folder, a private key for one.
    """
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        read_image(image).save(file, "PNG")  # PNG has no CMYK, for one
        return file.getvalue()
    if image.get("refused") or (image["bytes"] is None and image["path"] is None):
        return b""
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        content = Path(image["path"]).read_bytes()
        with Image.open(io.BytesIO(content), formats=list(FORMATS)):  # reads its header
            return content
    except Exception:  # of PIL's readers each has its own
        return b""
