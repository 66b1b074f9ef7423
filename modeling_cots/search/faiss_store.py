"""`FaissStore`: a search index in one local folder, rows as a `datasets` folder and vectors in FAISS.

The rows are the truth. The vectors' index is derived from them: what a killed run left out of it is added when the
index is next opened.
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
from .faiss_vectors import ENGINES, FaissVectors
from .rows import RowFolder

INFO, LOCK = "index.json", "writer.lock"


class FaissStore:
    """
    Entries in a folder that `create` made; see `vector_stores.VectorStore` for what the methods promise.

    Args:
        folder: The index.

    Raises `ValueError` where there is no index.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / INFO).is_file():
            raise ValueError(f"There is no index in {str(folder)!r}: make one with `cots-search index`.")
        self.info = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
        self._lock = FileLock(self.folder / LOCK)
        self._open()

    @classmethod
    def create(cls, folder: str | os.PathLike, info: dict, engine: str) -> "FaissStore":
        """Make an empty index that keeps `info`, of which it needs `dim`. Raises `ValueError` for a folder in use."""
        folder = Path(folder)
        if engine not in ENGINES:
            raise ValueError(f"The engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{str(folder)!r} is there and is no index: name a new folder.")
        RowFolder.create(folder, info["dim"])
        # Last, as it makes the folder an index.
        with atomic_write(folder / INFO) as partial:
            partial.write_text(json.dumps({**info, "engine": engine}, indent=2), encoding="utf-8")
        return cls(folder)

    def __len__(self) -> int:
        return int(self._rows.is_alive.sum())

    @property
    def columns(self) -> list[str]:
        """What can be filtered by."""
        return self._rows.filterable().column_names

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""
        return np.isin(row_ids, self._rows.row_ids[self._rows.is_alive])

    def begin(self) -> None:
        """Become the one writer, and take up what a killed one left. Raises `ValueError` if there is another."""
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
        """Take all that processes have added into the vectors' index, and let another write."""
        self._rows.adopt()
        num_before = len(self._vectors)
        self._vectors.grow(len(self._rows))
        if len(self._vectors) > num_before:
            self._vectors.save(self.folder)
        self._lock.release()

    def refresh(self) -> None:
        """See what another process has written."""
        self._rows.reload()

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        allowed = self._rows.is_alive
        if where:
            allowed = allowed & matching_rows(self._rows.filterable(), where)
        if not allowed.any():
            return [[] for _ in queries]
        if len(self._vectors) < len(self._rows):
            raise ValueError(f"{str(self.folder)!r} is unfinished: run the command that makes it again, it goes on.")
        scores, positions = self._vectors.search(queries, top, allowed)
        results = []
        for row_scores, row_positions in zip(scores, positions, strict=True):
            found = row_positions >= 0
            rows = self._rows.take(row_positions[found])
            results.append(
                [{**row, "score": float(score)} for row, score in zip(rows, row_scores[found], strict=True)]
            )
        return results

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""
        return self._rows.row_ids[self._rows.is_alive & matching_rows(self._rows.filterable(), where)]

    def delete(self, row_ids: np.ndarray) -> int:
        self.begin()
        try:
            positions = self._rows.positions_of(row_ids)
            if len(positions):
                self._rows.delete(positions)
        finally:
            self._lock.release()
        return len(positions)

    def rebuild(self, engine: str) -> None:
        """Write all again without what was deleted, for an engine of this name; nothing is embedded anew."""
        self.begin()
        fresh = self.folder.with_name(self.folder.name + ".rebuilding")
        old = self.folder.with_name(self.folder.name + ".replaced")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            store = FaissStore.create(fresh, {**self.info, "engine": engine}, engine)
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
        self.__init__(self.folder)

    def close(self) -> None:
        """Nothing is held open."""

    def _open(self) -> None:
        self._rows = RowFolder(self.folder, self.info["dim"])
        self._vectors = FaissVectors(self.info["engine"], self.info["dim"], self._rows_embeddings)
        self._vectors.load(self.folder)
        if len(self._vectors) > len(self._rows):
            raise ValueError(f"{str(self.folder)!r} is damaged: it has more vectors than rows.")
        # Rows of a run that was killed; where there are no codes yet, that run has to go on to fit them.
        if len(self._rows) > len(self._vectors) > 0:
            self._vectors.grow(len(self._rows))

    def _rows_embeddings(self, positions: np.ndarray | slice) -> np.ndarray:
        return self._rows.embeddings(positions)
