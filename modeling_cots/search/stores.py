"""`VectorStore`, the interface between a search index and FAISS or Milvus; the index's name chooses between them."""

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from .conditions import Condition
from .milvus_store import MilvusStore, is_milvus_uri


class VectorStore(Protocol):
    """
    Entries with embeddings, which can be added, searched and deleted.

    An entry has the columns row_id (the 32 letters of `row_ids_of`), name, source, captions, thumbnail (a JPEG or
    none), embedding (float32, unit length), and any metadata. `info` is the dictionary that `create` was given, with
    the index type as `engine`.
    Every call answers from the newest state of the index, whoever has written it.
    """

    @property
    def info(self) -> dict: ...

    @property
    def columns(self) -> list[str]: ...

    def adding(self, unfinished: Mapping[str, dict[str, int]] = ...) -> AbstractContextManager[None]:
        """The time of adding, in the main process: what all processes added is found from its end on. Where the block
        raises, others may write again, and the next writer takes up what was written.

        `unfinished` announces a run by its source, with numbers about it: until a block with the same source ends, the
        store's own `unfinished` has it, and what was written is found already.
        """

    @property
    def unfinished(self) -> dict[str, dict[str, int]]:
        """The announced runs that have not ended, killed ones and those that are under way."""

    def refresh(self) -> None:
        """Take part in the `adding` of the main process, in another process, once it has begun."""

    def add(self, rows: pa.Table) -> None:
        """Write entries during `adding`, in any process; they are found after it."""

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        """For each of (Q, d) unit-length queries at most `top` entries that satisfy all conditions, best first, with
        their cosine as "score" and without their embeddings."""

    def delete(self, row_ids: np.ndarray) -> int:
        """Remove entries from all results; returns how many of these ids were in the index."""

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""

    def count(self, where: list[Condition]) -> int:
        """How many entries satisfy all conditions."""

    def names_of(self, row_ids: np.ndarray) -> list[str]:
        """The names of those of these entries that are in the index."""

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""

    def was_deleted(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids `delete` has removed, and nobody has added again; `rebuild` keeps them."""

    def rebuild(self, index_type: str) -> None:
        """Change the index type without embedding anything again, and drop deleted entries."""

    def close(self) -> None:
        """Close files and connections."""

    def __len__(self) -> int: ...


def create_store(index: str | os.PathLike, info: dict, index_type: str) -> VectorStore:
    """Make an empty store: FAISS for a folder, Milvus for a file that ends in .db and for a server's address.

    Raises `ValueError` for an index type that the store lacks and for a name in use.
    """
    return _kind_of(index).create(os.fspath(index), info, index_type)


def check_can_create(index: str | os.PathLike, index_type: str) -> None:
    """Raise `ValueError` where `create_store` would, as far as that can be told without making anything."""
    _kind_of(index).check_can_create(os.fspath(index), index_type)


def open_store(index: str | os.PathLike) -> VectorStore:
    """Open an existing store. Raises `ValueError` if there is none, or if FAISS or Milvus is not installed."""
    return _kind_of(index)(os.fspath(index))


def store_exists(index: str | os.PathLike) -> bool:
    """Whether the index exists. Raises `ValueError` where a server does not answer."""
    if is_milvus_uri(os.fspath(index)):
        return _kind_of(index).exists(os.fspath(index))
    return os.path.isfile(os.path.join(index, "index.json"))


def _kind_of(index: str | os.PathLike) -> Any:
    is_milvus = is_milvus_uri(os.fspath(index))
    needed, packages = ("pymilvus", "pymilvus milvus-lite") if is_milvus else ("faiss", "faiss-cpu")
    if importlib.util.find_spec(needed) is None:
        raise ValueError(f"The index {os.fspath(index)!r} needs {needed}: pip install {packages}.")
    if is_milvus:
        return MilvusStore
    from .faiss_store import FaissStore  # a client of a cluster needs no FAISS

    return FaissStore
