"""The vectors of a local search index in FAISS, exact or approximate. Vector p belongs to row p; none is removed.

Each search is given a mask of the rows that it may find; deletion and filters both work by this mask. Index types that
keep codes instead of vectors (ivfpq, int8, binary) find candidates, whose scores are then computed from the stored
float32 embeddings. Where a filter leaves few rows, these are compared directly, because a graph or a list would miss
them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ..data.atomic_write import atomic_write
from .index_types import FAISS, FEW_ROWS, INDEX_TYPES, TUNED_TOP, SearchEffort, check_index_type

NUM_TRAINING = 250_000  # vectors that codes are trained on, or more where more lists need them
VECTORS_PER_LIST = 39  # that FAISS asks for to find the centroid of one
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 100, 128


def num_lists_of(num_rows: int) -> int:
    """How many lists `ivfpq` divides so many vectors into, where these are enough to train them."""
    return int(4 * num_rows**0.5)


def nprobe_of(num_lists: int) -> int:
    """How many lists a query of `ivfpq` compares: a 64th of them, and of more than 4,096 lists their square root.

    A fixed share of the lists would read a fixed share of all vectors, whatever the number of lists.
    """
    return max(min(num_lists, 16), min(num_lists // 64, int(num_lists**0.5)))


class FaissVectors:
    """
    An index of N unit vectors of d numbers; scores are inner products.

    Args:
        index_type: A name out of `INDEX_TYPES`.
        dim: d.
        fetch: Takes positions (n,), or a slice of them, and returns the stored vectors (n, d).
        effort: nprobe and candidates of a query, in place of the index type's defaults.

    Raises `ValueError` for an unknown index type.
    """

    def __init__(
        self,
        index_type: str,
        dim: int,
        fetch: Callable[[np.ndarray | slice], np.ndarray],
        effort: SearchEffort | None = None,
    ):
        check_index_type(index_type, FAISS)
        self.index_type, self.dim, self.fetch, self.effort = index_type, dim, fetch, effort
        self.index: Any = None
        self.thresholds: np.ndarray | None = None

    def __len__(self) -> int:
        return 0 if self.index is None else self.index.ntotal

    def grow(self, num_rows: int, rows_per_step: int = 16_384) -> None:
        """Add the vectors of rows N to `num_rows`. The first call also trains the codes, on the rows that it adds."""
        if num_rows == 0:
            return
        if self.index is None:
            self._check_enough(num_rows)
            self._build(self._training_sample(num_rows), num_rows)
        for start in range(len(self), num_rows, rows_per_step):
            self.index.add(self._code(self.fetch(slice(start, min(start + rows_per_step, num_rows)))))

    def search(self, queries: np.ndarray, top: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        The best of the allowed rows for each query.

        Args:
            queries: (Q, d) float32 of unit length.
            top: How many at most.
            allowed: (M,) boolean. Rows beyond this index, as of a run that has not ended, are compared directly.

        Returns scores (Q, k) float32, best first, and positions (Q, k), k at most `top`; -1 where an approximate
        search found fewer.
        """
        num_indexed = len(self)
        if num_indexed < len(allowed):
            rest = num_indexed + np.flatnonzero(allowed[num_indexed:])
            inside = self.search(queries, top, allowed[:num_indexed])
            beyond = self._rescore(queries, [rest] * len(queries), min(top, len(rest)))
            scores, positions = (np.concatenate(both, axis=1) for both in zip(inside, beyond, strict=True))
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            return np.take_along_axis(scores, best, axis=1), np.take_along_axis(positions, best, axis=1)
        num_allowed = int(np.count_nonzero(allowed))
        top = min(top, num_allowed)
        if top == 0:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if self.index_type != "exact" and num_allowed < len(allowed) and num_allowed <= max(FEW_ROWS, top):
            return self._rescore(queries, [np.flatnonzero(allowed)] * len(queries), top)
        if INDEX_TYPES[self.index_type].candidates is not None:
            return self.search_codes(queries, top, allowed)
        return self._search_index(queries, top, allowed)

    def search_codes(self, queries: np.ndarray, top: int, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`search` by the codes, which propose candidates, however few rows are allowed; `top` is at most these."""
        num_candidates = min(self._num_candidates(top), int(np.count_nonzero(allowed)))
        return self._rescore(queries, self.propose(queries, num_candidates, allowed), top)

    def propose(self, queries: np.ndarray, num: int, allowed: np.ndarray, nprobe: int = 0) -> list[np.ndarray]:
        """For each query the positions of at most `num` candidates, the best codes first; nprobe 0 is the index's."""
        _, positions = self._search_index(queries, num, allowed, nprobe)
        return [row[row >= 0] for row in positions]

    def _search_index(self, queries, num: int, allowed: np.ndarray, nprobe: int = 0) -> tuple[np.ndarray, np.ndarray]:
        # FAISS keeps no reference to the bits.
        bits = None if allowed.all() else np.packbits(allowed, bitorder="little")
        parameters = self._parameters(num, bits, nprobe)
        return self.index.search(self._code(queries, is_query=True), num, params=parameters)

    @property
    def num_lists(self) -> int:
        """How many lists the vectors are divided into; 0 for index types without lists."""
        return self.index.nlist if self.index_type == "ivfpq" else 0

    def _num_candidates(self, top: int) -> int:
        if self.effort is not None:
            return max(self.effort.candidates, -(-self.effort.candidates * top // TUNED_TOP))
        candidates = INDEX_TYPES[self.index_type].candidates
        assert candidates is not None
        return max(candidates.times * top, candidates.minimum)

    def over(self, fetch: Callable[[np.ndarray | slice], np.ndarray], effort: SearchEffort | None) -> "FaissVectors":
        """The same index, with its vectors stored elsewhere and another effort."""
        other = FaissVectors(self.index_type, self.dim, fetch, effort)
        other.index, other.thresholds = self.index, self.thresholds
        return other

    def save(self, vectors: Path, thresholds: Path) -> list[Path]:
        """Write the index to one file and, for binary codes, their thresholds to another; returns what was written."""
        written = [vectors]
        if self.thresholds is not None:
            with atomic_write(thresholds) as partial, open(partial, "wb") as file:
                np.save(file, self.thresholds, allow_pickle=False)
            written.append(thresholds)
        write = faiss.write_index_binary if self.index_type == "binary" else faiss.write_index
        with atomic_write(vectors) as partial:
            write(self.index, str(partial))
        return written

    def load(self, vectors: Path, thresholds: Path | None = None) -> None:
        """Read the files that `save` wrote. Raises `RuntimeError` for a file of something else."""
        read = faiss.read_index_binary if self.index_type == "binary" else faiss.read_index
        self.index = read(str(vectors))
        if thresholds is not None:
            self.thresholds = np.load(thresholds, allow_pickle=False)

    def _check_enough(self, num_rows: int) -> None:
        min_vectors = INDEX_TYPES[self.index_type].min_vectors
        if num_rows < min_vectors:
            raise ValueError(
                f"The index type {self.index_type!r} trains its codes on at least {min_vectors:,} vectors and there "
                f"are {num_rows:,}: use 'exact', which is fast for so few."
            )

    def _training_sample(self, num_rows: int) -> np.ndarray | None:
        if INDEX_TYPES[self.index_type].candidates is None:  # no codes to train
            return None
        wanted = NUM_TRAINING
        if self.index_type == "ivfpq":
            wanted = max(wanted, VECTORS_PER_LIST * num_lists_of(num_rows))
        if num_rows <= wanted:
            return self.fetch(slice(0, num_rows))
        return self.fetch(np.linspace(0, num_rows - 1, wanted).astype(np.int64))

    def _build(self, sample: np.ndarray | None, num_rows: int) -> None:
        if self.index_type == "binary":
            # Thresholds of zero would split badly: embeddings of images lie in a cone, away from the origin.
            self.thresholds = sample.mean(axis=0)
            self.index = faiss.IndexBinaryFlat(8 * -(-self.dim // 8))
            return
        if self.index_type == "exact":
            self.index = faiss.IndexFlatIP(self.dim)
        elif self.index_type == "hnsw":
            self.index = faiss.IndexHNSWFlat(self.dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = HNSW_BUILD
        elif self.index_type == "int8":
            self.index = faiss.IndexScalarQuantizer(
                self.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
        else:
            if self.dim % 2:
                raise ValueError(f"'ivfpq' codes pairs of numbers, and the embeddings have {self.dim}: use 'int8'.")
            num_lists = max(1, min(num_lists_of(num_rows), len(sample) // VECTORS_PER_LIST))
            # FAISS compares 4-bit codes in registers, 16 at a time; rescoring makes up for what they lose beside 8-bit
            # codes. Residuals are coded because codes of the vectors would spend most bits on the mean they all share.
            self.index = faiss.index_factory(
                self.dim, f"IVF{num_lists},PQ{self.dim // 2}x4fsr", faiss.METRIC_INNER_PRODUCT
            )
        if sample is not None:
            self.index.train(sample)

    def _code(self, vectors: np.ndarray, is_query: bool = False) -> np.ndarray:
        if self.index_type == "binary":
            return np.packbits(vectors > self.thresholds, axis=1)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _parameters(self, num_candidates: int, allowed_bits: np.ndarray | None, nprobe: int):
        options = {} if allowed_bits is None else {"sel": faiss.IDSelectorBitmap(allowed_bits)}
        if self.index_type == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * num_candidates), **options)
        if self.index_type == "ivfpq":
            own = nprobe_of(self.index.nlist) if self.effort is None else self.effort.nprobe
            return faiss.SearchParametersIVF(nprobe=nprobe or own, **options)
        return faiss.SearchParameters(**options)

    def _rescore(self, queries: np.ndarray, candidates: list[np.ndarray], top: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), top), -np.inf, np.float32)
        positions = np.full((len(queries), top), -1, np.int64)
        for row, (query, found) in enumerate(zip(queries, candidates, strict=True)):
            exact = self.fetch(found) @ query
            best = np.argsort(-exact, kind="stable")[:top]
            scores[row, : len(best)], positions[row, : len(best)] = exact[best], found[best]
        return scores, positions
