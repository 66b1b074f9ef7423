"""`FaissStore`: a search index in one local folder, rows as a `datasets` folder and vectors in FAISS.

The rows are authoritative, and the vectors' index is derived from them. Rows that a killed run did not add to the
vectors' index are added when the search index is next opened.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from ..data.atomic_write import atomic_write
from .conditions import Condition, matching_rows
from .faiss_vectors import FaissVectors
from .index_types import FAISS, check_index_type
from .rows import RowFolder, as_hit

INFO, LOCK = "index.json", "writer.lock"


class FaissStore:
    """
    Entries in a folder that `create` made; `stores.VectorStore` documents the methods.

    Args:
        folder: The index.

    Raises `ValueError` where there is no index.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / INFO).is_file():
            raise ValueError(f"There is no index in {str(folder)!r}: make one with `cots-search index`.")
        self._lock = FileLock(self.folder / LOCK)
        self._open()

    @classmethod
    def create(cls, folder: str | os.PathLike, info: dict, index_type: str) -> "FaissStore":
        """Make an empty index that stores `info`, which must hold `dim`.

        Raises `ValueError` for an unknown index type and for a folder in use.
        """
        folder = Path(folder)
        check_index_type(index_type, FAISS)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} exists and is not an empty folder: name a new folder for the index.")
        RowFolder.create(folder, info["dim"])
        # Written last: with this file the folder counts as an index.
        with atomic_write(folder / INFO) as partial:
            partial.write_text(json.dumps({**info, "engine": index_type}, indent=2), encoding="utf-8")
        return cls(folder)

    def __len__(self) -> int:
        return int(self._rows.is_alive.sum())

    @property
    def columns(self) -> list[str]:
        """The columns that conditions may name."""
        return self._rows.filterable().column_names

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""
        return np.isin(row_ids, self._rows.row_ids[self._rows.is_alive])

    def begin(self) -> None:
        """Become the only writer, and list the parts of a killed one. Raises `ValueError` if there is another."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"Another process is writing to {str(self.folder)!r}: wait for its end.") from error
        self._rows.remove_leftovers()
        self._rows.adopt()

    def add(self, rows: pa.Table) -> None:
        """Write entries to the disk; they are found after `finish`."""
        self._rows.check_metadata(rows.schema)
        self._rows.append(rows)

    def finish(self) -> None:
        """Add to the vectors' index all rows that processes have written, and let another process write."""
        self._rows.adopt()
        num_before = len(self._vectors)
        self._vectors.grow(len(self._rows))
        if len(self._vectors) > num_before:
            self._vectors.save(self.folder)
        self._lock.release()

    def refresh(self) -> None:
        """Read what other processes have written."""
        self._rows.reload()

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        """The best entries for each query; see `VectorStore`. Raises `ValueError` while a first run is unfinished."""
        allowed = self._rows.is_alive
        if where:
            allowed = allowed & matching_rows(self._rows.filterable(), where, allowed)
        if not allowed.any():
            return [[] for _ in queries]
        if len(self._vectors) < len(self._rows):
            raise ValueError(f"{str(self.folder)!r} is unfinished: repeat the command that makes it; it continues.")
        scores, positions = self._vectors.search(queries, top, allowed)
        results = []
        for row_scores, row_positions in zip(scores, positions, strict=True):
            found = row_positions >= 0
            rows = self._rows.take(row_positions[found])
            results.append([as_hit(row, float(score)) for row, score in zip(rows, row_scores[found], strict=True)])
        return results

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""
        alive = self._rows.is_alive
        return self._rows.row_ids[alive & matching_rows(self._rows.filterable(), where, alive)]

    def delete(self, row_ids: np.ndarray) -> int:
        """Remove entries from all results; returns how many of these ids were in the index."""
        self.begin()
        try:
            positions = self._rows.positions_of(row_ids)
            if len(positions):
                self._rows.delete(positions)
        finally:
            self._lock.release()
        return len(positions)

    def rebuild(self, index_type: str) -> None:
        """Write all entries that are not deleted again, with another index type; nothing is embedded again."""
        self.begin()
        fresh = self.folder.with_name(self.folder.name + ".rebuilding")
        old = self.folder.with_name(self.folder.name + ".replaced")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            store = FaissStore.create(fresh, self.info, index_type)
            for table in self._rows.living_tables():
                store.add(table)
            store.finish()
            self.folder.rename(old)
            fresh.rename(self.folder)
            shutil.rmtree(old)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        finally:
            self._lock.release()
        self._open()

    def close(self) -> None:
        """Nothing is held open."""

    def _open(self) -> None:
        self.info = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
        self._rows = RowFolder(self.folder, self.info["dim"])
        self._vectors = FaissVectors(self.info["engine"], self.info["dim"], self._rows_embeddings)
        self._vectors.load(self.folder)
        if len(self._vectors) > len(self._rows):
            raise ValueError(f"{str(self.folder)!r} is damaged: it has more vectors than rows.")
        # Add the rows of a killed run. Without trained codes this waits: the run itself has to continue to train them.
        if len(self._rows) > len(self._vectors) > 0:
            self._vectors.grow(len(self._rows))

    def _rows_embeddings(self, positions: np.ndarray | slice) -> np.ndarray:
        return self._rows.embeddings(positions)
