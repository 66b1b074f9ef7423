"""What a search index asks of the engine below it, and the choice of one by the index's name."""

import importlib.util
import os
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from .conditions import Condition
from .milvus_store import MilvusStore, is_milvus_uri


class VectorStore(Protocol):
    """
    Entries with embeddings: add, search, delete; and what surrounds these three.

    An entry has the columns row_id (int64), name, source, captions, thumbnail (a JPEG or none), embedding (float32,
    unit length), and any metadata. `info` is what `create` was given, with `engine`.
    """

    info: dict
    columns: list[str]

    def add(self, rows: pa.Table) -> None:
        """Write entries between `begin` and `finish`; they are found after `finish`."""

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        """For each of (Q, d) unit-length queries at most `top` entries that satisfy all conditions, best first, with
        their cosine as "score" and without their embeddings."""

    def delete(self, row_ids: np.ndarray) -> int:
        """Take entries out of all results; returns how many of these were there."""

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean, which of these are there."""

    def begin(self) -> None:
        """Before adding, in the main process."""

    def finish(self) -> None:
        """After adding, in the main process: all that any process added is found from now on."""

    def refresh(self) -> None:
        """See what other processes have written."""

    def rebuild(self, engine: str) -> None:
        """Change to an engine of this name without embedding anything again; drop what was deleted."""

    def close(self) -> None:
        """Let go of files and connections."""

    def __len__(self) -> int: ...


def create_store(index: str | os.PathLike, info: dict, engine: str) -> VectorStore:
    """An empty store: a folder (FAISS), a file that ends in .db or a server's address (Milvus)."""
    return _kind_of(index).create(os.fspath(index), info, engine)


def open_store(index: str | os.PathLike) -> VectorStore:
    """The store that is there. Raises `ValueError` if none is, or if its engine is not installed."""
    return _kind_of(index)(os.fspath(index))


def store_exists(index: str | os.PathLike) -> bool:
    """Whether `open_store` would find one. Raises `ValueError` where a server does not answer."""
    if is_milvus_uri(os.fspath(index)):
        return _kind_of(index).exists(os.fspath(index))
    return os.path.isfile(os.path.join(index, "index.json"))


def _kind_of(index: str | os.PathLike) -> Any:
    is_milvus = is_milvus_uri(os.fspath(index))
    needed, extra = ("pymilvus", "milvus") if is_milvus else ("faiss", "search")
    if importlib.util.find_spec(needed) is None:
        raise ValueError(f"The index {os.fspath(index)!r} needs {needed}: pip install 'modeling_cots[{extra}]'.")
    if is_milvus:
        return MilvusStore
    from .faiss_store import FaissStore  # a client of a cluster needs no FAISS

    return FaissStore
