"""The vectors of a local index in FAISS: exact or approximate, by name. Vector p belongs to row p; nothing is removed.

What may be found is told at each search by a mask, which is how both deletion and filters work. Engines that keep
codes instead of vectors (ivfpq, int8, binary) find candidates, whose scores are then computed from the stored float32
embeddings; and where a filter leaves few rows, those are compared directly, as a graph or a list would miss them.
"""

import os
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from ..data.atomic_write import atomic_write

ENGINES = {
    "exact": "all vectors in memory, all compared",
    "hnsw": "all vectors in memory and a graph through them",
    "ivfpq": "half a byte for two numbers, in lists of which some are read; candidates rescored",
    "int8": "a byte a number, all compared; candidates rescored",
    "binary": "a bit a number, all compared; candidates rescored",
}
TRAINED_FROM = {"exact": 1, "hnsw": 1, "ivfpq": 1000, "int8": 100, "binary": 100}  # vectors needed to fit the codes
NUM_CANDIDATES = {"ivfpq": (10, 200), "int8": (4, 40), "binary": (50, 1_000)}  # times the number wanted, and at least
NUM_TRAINING = 250_000
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 100, 128
FEW_ROWS = 20_000  # after a filter: compared directly
VECTORS, THRESHOLDS = "vectors.faiss", "thresholds.npy"


class FaissVectors:
    """
    An index of N unit vectors of d numbers; scores are inner products.

    Args:
        engine: A name out of `ENGINES`.
        dim: d.
        fetch: From positions (n,), or a slice of them, to the stored vectors (n, d).

    Raises `ValueError` for an unknown engine.
    """

    def __init__(self, engine: str, dim: int, fetch: Callable[[np.ndarray | slice], np.ndarray]):
        if engine not in ENGINES:
            raise ValueError(f"The engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
        self.engine, self.dim, self._fetch = engine, dim, fetch
        self.index, self.thresholds = None, None

    def __len__(self) -> int:
        return 0 if self.index is None else self.index.ntotal

    def grow(self, num_rows: int, rows_per_step: int = 16_384) -> None:
        """Add the vectors of rows N to `num_rows`; the first of all are what codes are fitted to."""
        if num_rows == 0:
            return
        if self.index is None:
            self._check_enough(num_rows)
            self._build(self._training_sample(num_rows), num_rows)
        for start in range(len(self), num_rows, rows_per_step):
            self.index.add(self._code(self._fetch(slice(start, min(start + rows_per_step, num_rows)))))

    def search(self, queries: np.ndarray, top: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The best of the allowed rows for each query.

        Args:
            queries: (Q, d) float32 of unit length.
            top: How many at most.
            allowed: (N,) boolean.

        Returns scores (Q, k) float32, best first, and positions (Q, k), k at most `top`; -1 where an approximate
        engine found fewer.
        """
        num_allowed = int(np.count_nonzero(allowed))
        top = min(top, num_allowed)
        if top == 0:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if self.engine != "exact" and num_allowed < len(allowed) and num_allowed <= max(FEW_ROWS, top):
            candidates = np.flatnonzero(allowed)
            return self._rescore(queries, [candidates] * len(queries), top)
        times, least = NUM_CANDIDATES.get(self.engine, (1, 0))
        num_candidates = min(max(times * top, least), num_allowed)
        parameters = self._parameters(num_candidates, allowed, is_filtered=num_allowed < len(allowed))
        scores, positions = self.index.search(self._code(queries, is_query=True), num_candidates, params=parameters)
        if self.engine not in NUM_CANDIDATES:
            return scores, positions
        return self._rescore(queries, [row[row >= 0] for row in positions], top)

    def save(self, folder: str | os.PathLike) -> None:
        """Write vectors.faiss as a whole."""
        if self.index is None:
            return
        if self.thresholds is not None:
            with atomic_write(Path(folder) / THRESHOLDS) as partial, open(partial, "wb") as file:
                np.save(file, self.thresholds, allow_pickle=False)
        write = faiss.write_index_binary if self.engine == "binary" else faiss.write_index
        with atomic_write(Path(folder) / VECTORS) as partial:
            write(self.index, str(partial))

    def load(self, folder: str | os.PathLike) -> None:
        """Read what `save` wrote, if it did."""
        path = Path(folder) / VECTORS
        if not path.exists():
            return
        read = faiss.read_index_binary if self.engine == "binary" else faiss.read_index
        self.index = read(str(path))
        if self.engine == "binary":
            self.thresholds = np.load(Path(folder) / THRESHOLDS, allow_pickle=False)

    def _check_enough(self, num_rows: int) -> None:
        if num_rows < TRAINED_FROM[self.engine]:
            raise ValueError(
                f"The engine {self.engine!r} fits its codes to at least {TRAINED_FROM[self.engine]:,} vectors and "
                f"there are {num_rows:,}: use 'exact', which is fast for so few."
            )

    def _training_sample(self, num_rows: int) -> np.ndarray | None:
        if self.engine in ("exact", "hnsw"):
            return None
        if num_rows <= NUM_TRAINING:
            return self._fetch(slice(0, num_rows))
        return self._fetch(np.linspace(0, num_rows - 1, NUM_TRAINING).astype(np.int64))

    def _build(self, sample: np.ndarray | None, num_rows: int) -> None:
        if self.engine == "binary":
            # Zero is no middle: embeddings of one kind of thing lie in a cone.
            self.thresholds = sample.mean(axis=0)
            self.index = faiss.IndexBinaryFlat(8 * -(-self.dim // 8))
            return
        if self.engine == "exact":
            self.index = faiss.IndexFlatIP(self.dim)
        elif self.engine == "hnsw":
            self.index = faiss.IndexHNSWFlat(self.dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = HNSW_BUILD
        elif self.engine == "int8":
            self.index = faiss.IndexScalarQuantizer(
                self.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
        else:
            if self.dim % 2:
                raise ValueError(f"'ivfpq' codes pairs of numbers, and the embeddings have {self.dim}: use 'int8'.")
            num_lists = max(1, min(int(4 * num_rows**0.5), len(sample) // 39))  # FAISS asks for 39 vectors a list
            # 4-bit codes, 16 at a time in registers; what they lose beside 8-bit ones, rescoring gives back. Codes are
            # of residuals: else the mean that all embeddings share takes up most of what they can tell.
            self.index = faiss.index_factory(
                self.dim, f"IVF{num_lists},PQ{self.dim // 2}x4fsr", faiss.METRIC_INNER_PRODUCT
            )
        if sample is not None:
            self.index.train(sample)

    def _code(self, vectors: np.ndarray, is_query: bool = False) -> np.ndarray:
        if self.engine == "binary":
            return np.packbits(vectors > self.thresholds, axis=1)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _parameters(self, num_candidates: int, allowed: np.ndarray, is_filtered: bool):
        options = {}
        if is_filtered:
            self._selected = np.packbits(allowed, bitorder="little")  # FAISS keeps no reference of its own
            options["sel"] = faiss.IDSelectorBitmap(self._selected)
        if self.engine == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * num_candidates), **options)
        if self.engine == "ivfpq":
            num_lists = self.index.nlist
            return faiss.SearchParametersIVF(nprobe=max(min(num_lists, 16), num_lists // 64), **options)
        return faiss.SearchParameters(**options)

    def _rescore(self, queries: np.ndarray, candidates: list[np.ndarray], top: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), top), -np.inf, np.float32)
        positions = np.full((len(queries), top), -1, np.int64)
        for row, (query, found) in enumerate(zip(queries, candidates, strict=True)):
            exact = self._fetch(found) @ query
            best = np.argsort(-exact, kind="stable")[:top]
            scores[row, : len(best)], positions[row, : len(best)] = exact[best], found[best]
        return scores, positions
