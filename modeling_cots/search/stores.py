"""`VectorStore`: what a search index asks of FAISS, PostgreSQL or Milvus, between which its name chooses."""

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from .conditions import Condition
from .index_types import check_target_recall
from .milvus_store import MilvusStore, is_milvus_uri
from .options import is_postgres_uri
from .postgres_store import PostgresStore

if TYPE_CHECKING:
    from .tuning import Tuned  # needs FAISS

EXTRAS = {  # the packages of the extras that stores need, as pip takes them
    "search": "faiss-cpu",
    "milvus": "pymilvus milvus-lite",
    "postgres": "'psycopg[binary]' pgvector",
}


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

    def sample_captions(self, num: int) -> list[str]:
        """At most `num` different captions of the entries; FAISS alone, as `tune`."""

    def tune(self, target: float, queries: np.ndarray | None = None) -> "Tuned":
        """Choose what a search costs for a target of recall; see `FaissStore.tune` and `check_can_tune`."""

    def close(self) -> None:
        """Close files and connections."""

    def __len__(self) -> int: ...


def create_store(index: str | os.PathLike, info: dict, index_type: str) -> VectorStore:
    """Make an empty store: FAISS for a folder, PostgreSQL or Milvus for an address, Milvus Lite for a .db file.

    Raises `ValueError` for an index type that the store lacks and for a name in use.
    """
    return _kind_of(index).create(os.fspath(index), info, index_type)


def check_can_create(index: str | os.PathLike, index_type: str) -> None:
    """Raise `ValueError` where `create_store` would, as far as that can be told without making anything."""
    _kind_of(index).check_can_create(os.fspath(index), index_type)


def check_can_tune(index: str | os.PathLike, index_type: str, target: float) -> None:
    """Raise `ValueError` unless an index of this name and type can have this target of recall."""
    name = os.fspath(index)
    if is_postgres_uri(name) or is_milvus_uri(name):
        raise ValueError(
            f"A target of recall needs an index in a folder (FAISS); {name!r} has its own settings: leave "
            "--target_recall out."
        )
    check_target_recall(target, index_type)


def open_store(index: str | os.PathLike) -> VectorStore:
    """Open an existing store. Raises `ValueError` if there is none, or if what it needs is not installed."""
    return _kind_of(index)(os.fspath(index))


def store_exists(index: str | os.PathLike) -> bool:
    """Whether the index exists. Raises `ValueError` where a server does not answer."""
    name = os.fspath(index)
    if is_postgres_uri(name) or is_milvus_uri(name):
        return _kind_of(index).exists(name)
    return os.path.isfile(os.path.join(name, "index.json"))


def _kind_of(index: str | os.PathLike) -> Any:
    name = os.fspath(index)
    if is_postgres_uri(name):
        _check_installed(name, "psycopg", "pgvector", extra="postgres")
        return PostgresStore
    if is_milvus_uri(name):
        _check_installed(name, "pymilvus", extra="milvus")
        return MilvusStore
    _check_installed(name, "faiss", extra="search")
    from .faiss_store import FaissStore  # a client of a server needs no FAISS

    return FaissStore


def _check_installed(index: str, *modules: str, extra: str) -> None:
    """Raise `ValueError` unless the modules of an extra of this package are there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"The index {index!r} needs {' and '.join(missing)}: pip install {EXTRAS[extra]}.")
