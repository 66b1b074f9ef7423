"""Image tokens beside the shards of a stream: files of ids and tokens alone, joined to the images by these ids."""

import hashlib
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq

from ..rows import IMAGE_TOKENS, TOKEN_SOURCE, BadRowError, cached_tokens
from .names import display_name, expand_urls, is_url

# An id is either of the image itself (`pair_id_of`) or the name of a sample in the stream, its shard and its key.
PAIR_ID, NAME = "pair_id", "name"
ROWS_AT_ONCE = 100_000


class TokenTable:
    """
    The tokens of images by the images' ids, memory-mapped; of an image, 12 bytes are in memory.

    Args:
        path: A folder, as `tokenize_images.py` writes it with `--without_images` or on a cluster, here or at an
            address. Rows have a `pair_id`, or else a `name`, as earlier versions wrote on a cluster.

    Raises `ValueError` for what is no such data.
    """

    def __init__(self, path: str):
        files = _find(path)
        columns = set.intersection(*(_columns_of(file) for file in files))
        self._id = next((name for name in (PAIR_ID, NAME) if name in columns), None)
        missing = [name for name in (IMAGE_TOKENS, TOKEN_SOURCE) if name not in columns]
        missing += ["pair_id or name"] if self._id is None else []
        if missing:
            raise ValueError(
                f"image_tokens={display_name(path)} has files without {' and '.join(missing)}: give a folder of ids "
                "and tokens alone, as `tokenize_images.py --without_images` writes it."
            )
        self.path = display_name(path)
        self._rows = datasets.Dataset.from_parquet(files, columns=[self._id, IMAGE_TOKENS, TOKEN_SOURCE])
        ids = self._read_ids()
        self._order = np.argsort(ids, kind="stable").astype(np.uint32)
        self._ids = ids[self._order]

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, name: str, pair_id: int) -> dict:
        """
        The two columns of an image's tokens.

        Args:
            name: Of the sample in the stream.
            pair_id: Of its image.

        Raises [`BadRowError`] for an image that has none here.
        """
        wanted = pair_id if self._id == PAIR_ID else _number_of(name)
        place = int(np.searchsorted(self._ids, wanted))
        if place == len(self._ids) or self._ids[place] != wanted:
            raise BadRowError(f"it has no image tokens in {self.path}")
        return cached_tokens(self._rows[int(self._order[place])])

    def _read_ids(self) -> np.ndarray:
        """(N,) int64."""
        ids = np.empty(len(self._rows), dtype=np.int64)
        column = self._rows.select_columns([self._id]).with_format("arrow")
        for start in range(0, len(ids), ROWS_AT_ONCE):
            values = column[start : start + ROWS_AT_ONCE][self._id]
            if self._id == NAME:
                values = [_number_of(name) for name in values.to_pylist()]
            ids[start : start + ROWS_AT_ONCE] = values
        return ids


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def _find(path: str) -> list[str]:
    if is_url(path):
        return expand_urls(f"{path.rstrip('/')}/**/*.parquet")
    files = sorted(str(file) for file in Path(path).expanduser().rglob("*.parquet"))
    if not files:
        raise ValueError(f"image_tokens={path} has no parquet file: give the folder that tokenize_images.py wrote.")
    return files


def _columns_of(file: str) -> set[str]:
    with fsspec.open(file, "rb") as opened:
        return set(pq.read_schema(opened).names)
