"""Image tokens of a whole data set, written once beside its images: shards of parquet that `open_pairs` opens again.

A shard that is there is whole (`atomic_write`); a run that was stopped goes on with the first that is missing. One
that cannot be read all the same, as after a fault of the disk, is written anew.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..method.image_tokenizer import ImageTokenizer
from .atomic_write import atomic_write
from .image_augmentation import ImageTransform
from .image_reading import UnreadableImageError
from .image_token_cache import TokenSource
from .rows import IMAGE_TOKENS, TOKEN_SOURCE
from .skip_report import SkipReport

logger = logging.get_logger(__name__)

SHARD_ROWS = 1000
GROUP_ROWS = 100
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "captions": pa.list_(pa.string()),
        IMAGE_TOKENS: pa.list_(pa.list_(pa.uint16())),
        TOKEN_SOURCE: pa.string(),
    }
)


class TokenWriter:
    """
    Computes the image tokens of a data set of pairs and writes them with its images and captions.

    Args:
        image_tokenizer: On the device to compute on.
        image_size, patch_size: Height and width, of the model that will be trained.
        flipped: Whether to add the tokens of the flipped image, for training with `horizontal_flip`.
        batch_size: Images of a forward pass.
        num_workers: Processes that decode images beside this one.
        shard_rows: Images a file.

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
    ):
        self.image_tokenizer, self.patch_size, self.flipped = image_tokenizer, tuple(patch_size), flipped
        self.source = TokenSource.of(image_tokenizer, image_size, patch_size)
        self.batch_size, self.num_workers, self.shard_rows = batch_size, num_workers, shard_rows
        self.collate = _Collator(ImageTransform(image_size, [0.5] * 3, min_crop_scale=1.0))

    def write(self, dataset, output_dir: str, split: str, *, progress: bool = True) -> list[Path]:
        """
        Write `split`-00000-of-N.parquet and so on, with one row an item of `dataset`; shards that are there stay.

        Raises `ValueError` for a folder in which files of the split are of something else.
        """
        starts = range(0, len(dataset), self.shard_rows)
        paths = [Path(output_dir) / f"{split}-{i:05d}-of-{len(starts):05d}.parquet" for i in range(len(starts))]
        metadata = self._metadata(dataset)
        os.makedirs(output_dir, exist_ok=True)
        _remove_unreadable(paths)
        _check_folder(paths, metadata, split)
        with tqdm(total=len(dataset), desc="Tokenizing", unit=" images", disable=not progress) as bar:
            for path, start in zip(paths, starts, strict=True):
                rows = range(start, min(start + self.shard_rows, len(dataset)))
                if path.exists():
                    bar.update(len(rows))
                    continue
                with atomic_write(path) as partial:
                    self._write_shard(partial, Subset(dataset, rows), metadata, bar)
        return paths

    def _metadata(self, dataset) -> dict[bytes, bytes]:
        """What a file is of, for a run that goes on."""
        views = 2 if self.flipped else 1
        what = f"{getattr(dataset, 'name', '')}, {len(dataset)} images, {self.shard_rows} a file, {views} views"
        return {b"cots": f"{what}, {self.source.to_json()}".encode()}

    @torch.no_grad()
    def _write_shard(self, path: Path, items: Subset, metadata: dict, bar) -> None:
        schema = SCHEMA.with_metadata(metadata)
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
        """Rows of the table; images that cannot be read have no tokens, and are skipped in training as before."""
        pixels = batch["pixel_values"].to(self.image_tokenizer.image_mean.device)
        views = [pixels, pixels.flip(-1)] if self.flipped else [pixels]
        tokens = torch.stack([self.image_tokenizer(view, self.patch_size) for view in views], dim=1).tolist()
        source = self.source.to_json()
        for image, captions, row, valid in zip(
            batch["images"], batch["captions"], tokens, batch["valid"], strict=True
        ):
            yield {
                "image": image,
                "captions": captions,
                IMAGE_TOKENS: row if valid else None,
                TOKEN_SOURCE: source,
            }


def _remove_unreadable(paths: list[Path]) -> None:
    """Remove shards of the run that are damaged, and what versions before 0.2 left half-written."""
    for path in paths:
        path.with_suffix(".unfinished").unlink(missing_ok=True)
        if path.exists():
            try:
                pq.read_metadata(path)
            except (OSError, pa.ArrowException) as error:
                logger.warning(f"{path} is damaged and is written anew: {error}")
                path.unlink()


def _check_folder(paths: list[Path], metadata: dict, split: str) -> None:
    for path in sorted(paths[0].parent.glob(f"{split}*.parquet")):
        if path not in paths or pq.read_schema(path).metadata != metadata:
            raise ValueError(
                f"{path} is of another data set, image tokenizer or size, or with other options: write to another "
                "folder, or remove it."
            )


class _Collator:
    """Items to raw pixels and to what is written of them; runs in the data loader's workers."""

    def __init__(self, transform: ImageTransform):
        self.transform = transform
        self.report = SkipReport()

    def __call__(self, items: list[dict]) -> dict:
        pixels, valid = [], []
        for item in items:
            try:
                pixels.append(self.transform(item["image"]))
                valid.append(True)
            except UnreadableImageError as error:
                self.report.add(item["name"], error)
                pixels.append(torch.zeros(3, *self.transform.image_size, dtype=torch.uint8))
                valid.append(False)
        return {
            "pixel_values": torch.stack(pixels),
            "valid": valid,
            "images": [{"bytes": encoded_image(item["image"]), "path": item["name"]} for item in items],
            "captions": [item["captions"] for item in items],
        }


def encoded_image(image) -> bytes:
    """
    The bytes of an item's image: as they are, of its file, or of a PNG of an image in memory.

    Of one that is not there or is refused no bytes, so that it stays one that cannot be read.
    """
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
    if image.get("refused") or (image["bytes"] is None and image["path"] is None):
        return b""
    if image["bytes"] is not None:
        return image["bytes"]
    try:
        return Path(image["path"]).read_bytes()
    except OSError:
        return b""
