"""The vectors of a local search index in FAISS, exact or approximate. Vector p belongs to row p; none is removed.

Each search is given a mask of the rows that it may find; deletion and filters both work by this mask. Index types that
keep codes instead of vectors (ivfpq, int8, binary) divide these into lists, and a query compares the nearest lists.
They find candidates, whose scores are then computed from the stored float32 embeddings. Where a filter leaves few
rows, these are compared directly, because a graph or a list would miss them.

An index of before has its int8 or binary codes in no lists, and compares all of them. It is read, searched and added
to as it is until it is rebuilt.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ..data.atomic_write import atomic_write
from .index_types import FAISS, FEW_ROWS, INDEX_TYPES, TUNED_TOP, Candidates, SearchEffort, check_index_type

NUM_TRAINING = 250_000  # vectors that codes are trained on, or more where more lists need them
VECTORS_PER_LIST = 39  # that FAISS asks for to find the centroid of one
LEAST_NPROBE = 14  # finds 0.95 of the ten best or more in each collection of docs/search.md
UNLISTED_BINARY = Candidates(times=50, minimum=1_000)  # of binary codes of before
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 100, 128


def num_lists_of(num_rows: int) -> int:
    """How many lists so many vectors are divided into, where these are enough to train them."""
    return int(2 * num_rows**0.5)


def nprobe_of(num_lists: int) -> int:
    """How many lists a query compares: 14, and the cube root of the lists where that is more.

    A fixed share of the lists would read a fixed share of all vectors, whatever the number of lists.
    """
    return min(num_lists, max(LEAST_NPROBE, math.ceil(num_lists ** (1 / 3))))


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
        self.thresholds: np.ndarray | None = None  # of binary codes of before

    def __len__(self) -> int:
        return 0 if self.index is None else self.index.ntotal

    def grow(self, num_rows: int, rows_per_step: int = 16_384) -> None:
        """Add the vectors of rows N to `num_rows`. The first call also trains the codes, on the rows that it adds."""
        if num_rows == 0:
            return
        if self.index is None:
            self._check_enough(num_rows)
            self._build(num_rows)
        for start in range(len(self), num_rows, rows_per_step):
            self.index.add(self._code(self.fetch(slice(start, min(start + rows_per_step, num_rows)))))

    def search(self, queries: np.ndarray, top: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """
        The best of the allowed rows for each query.

        Args:
            queries: (Q, d) float32 of unit length.
            top: How many at most.
            allowed: (M,) boolean. Rows beyond this index, as of a run that has not ended, are compared directly.
                `None` for all rows of the index: looking through a mask of a million takes a third of a search.

        Returns scores (Q, k) float32, best first, and positions (Q, k), k at most `top`; -1 where an approximate
        search found fewer.
        """
        num_indexed = len(self)
        if allowed is not None and num_indexed < len(allowed):
            rest = num_indexed + np.flatnonzero(allowed[num_indexed:])
            inside = self.search(queries, top, allowed[:num_indexed])
            beyond = self._rescore(queries, [rest] * len(queries), min(top, len(rest)))
            scores, positions = (np.concatenate(both, axis=1) for both in zip(inside, beyond, strict=True))
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            return np.take_along_axis(scores, best, axis=1), np.take_along_axis(positions, best, axis=1)
        num_allowed = num_indexed if allowed is None else int(np.count_nonzero(allowed))
        allowed = None if num_allowed == num_indexed else allowed
        top = min(top, num_allowed)
        if top == 0:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        if self.index_type != "exact" and allowed is not None and num_allowed <= max(FEW_ROWS, top):
            return self._rescore(queries, [np.flatnonzero(allowed)] * len(queries), top)
        if INDEX_TYPES[self.index_type].candidates is not None:
            return self.search_codes(queries, top, allowed)
        return self._search_index(queries, top, allowed)

    def search_codes(self, queries: np.ndarray, top: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """`search` by the codes, which propose candidates, however few rows are allowed; `top` is at most these."""
        return self._rescore(queries, self.propose(queries, self._num_candidates(top), allowed, top=top), top)

    def propose(
        self, queries: np.ndarray, num: int, allowed: np.ndarray | None, nprobe: int = 0, top: int = 0
    ) -> list[np.ndarray]:
        """
        For each query the positions of at most `num` candidates, the best codes first.

        Args:
            queries, allowed: As `search` takes them.
            nprobe: Lists that a query compares where all rows are allowed; 0 for those of the index.
            top: How many results are wanted at least; more lists are compared where fewer would not hold them.
        """
        if self.num_lists:
            num_allowed = len(self) if allowed is None else int(np.count_nonzero(allowed))
            own = nprobe_of(self.num_lists) if self.effort is None else self.effort.nprobe
            # As large a share of the lists as an index of the allowed rows alone would compare.
            nprobe = round((nprobe or own) * (len(self) / max(num_allowed, 1)) ** 0.5)
            nprobe = min(max(nprobe, -(-2 * top * self.num_lists // max(num_allowed, 1))), self.num_lists)
        _, positions = self._search_index(queries, min(num, len(self)), allowed, nprobe)
        return [row[row >= 0] for row in positions]

    def _search_index(self, queries, num: int, allowed: np.ndarray | None, nprobe: int = 0):
        # FAISS keeps no reference to the bits.
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        return self.index.search(self._code(queries), num, params=self._parameters(num, bits, nprobe))

    @property
    def num_lists(self) -> int:
        """How many lists the vectors are divided into; 0 for exact, for hnsw and for codes of before."""
        return getattr(self.index, "nlist", 0)

    def _num_candidates(self, top: int) -> int:
        if self.effort is not None:
            return max(self.effort.candidates, -(-self.effort.candidates * top // TUNED_TOP))
        candidates = INDEX_TYPES[self.index_type].candidates if self.thresholds is None else UNLISTED_BINARY
        assert candidates is not None
        return max(candidates.times * top, candidates.minimum)

    def over(self, fetch: Callable[[np.ndarray | slice], np.ndarray], effort: SearchEffort | None) -> "FaissVectors":
        """The same index, with its vectors stored elsewhere and another effort."""
        other = FaissVectors(self.index_type, self.dim, fetch, effort)
        other.index, other.thresholds = self.index, self.thresholds
        return other

    def save(self, vectors: Path, thresholds: Path) -> list[Path]:
        """Write the index to a file and thresholds, where there are any, to another; returns what was written."""
        written = [vectors]
        if self.thresholds is not None:
            with atomic_write(thresholds) as partial, open(partial, "wb") as file:
                np.save(file, self.thresholds, allow_pickle=False)
            written.append(thresholds)
        write = faiss.write_index if self.thresholds is None else faiss.write_index_binary
        with atomic_write(vectors) as partial:
            write(self.index, str(partial))
        return written

    def load(self, vectors: Path, thresholds: Path | None = None) -> None:
        """Read the files that `save` wrote. Raises `RuntimeError` for a file of something else."""
        read = faiss.read_index if thresholds is None else faiss.read_index_binary
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

    def _training_sample(self, num_rows: int) -> np.ndarray:
        wanted = max(NUM_TRAINING, VECTORS_PER_LIST * num_lists_of(num_rows))
        if num_rows <= wanted:
            return self.fetch(slice(0, num_rows))
        return self.fetch(np.linspace(0, num_rows - 1, wanted).astype(np.int64))

    def _build(self, num_rows: int) -> None:
        if self.index_type == "exact":
            self.index = faiss.IndexFlatIP(self.dim)
        elif self.index_type == "hnsw":
            self.index = faiss.IndexHNSWFlat(self.dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            self.index.hnsw.efConstruction = HNSW_BUILD
        else:
            sample = self._training_sample(num_rows)
            num_lists = max(1, min(num_lists_of(num_rows), len(sample) // VECTORS_PER_LIST))
            name = f"IVF{num_lists},{self._codes()}"
            self.index = faiss.index_factory(self.dim, name, faiss.METRIC_INNER_PRODUCT)
            self.index.nprobe = nprobe_of(num_lists)  # for those who search the file without this package
            self.index.train(sample)

    def _codes(self) -> str:
        """FAISS' name of the codes, all of residuals: others would spend bits on the mean that all vectors share."""
        if self.index_type == "int8":
            return "SQ8"
        if self.index_type == "binary":
            return "RaBitQ"
        if self.dim % 2:
            raise ValueError(f"'ivfpq' codes pairs of numbers, and the embeddings have {self.dim}: use 'int8'.")
        # FAISS compares 4-bit codes in registers, many at a time; rescoring makes up for what they lose beside 8 bits.
        return f"PQ{self.dim // 2}x4fsr"

    def _code(self, vectors: np.ndarray) -> np.ndarray:
        if self.thresholds is not None:
            return np.packbits(vectors > self.thresholds, axis=1)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _parameters(self, num_candidates: int, allowed_bits: np.ndarray | None, nprobe: int):
        options = {} if allowed_bits is None else {"sel": faiss.IDSelectorBitmap(allowed_bits)}
        if self.index_type == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(HNSW_SEARCH, 2 * num_candidates), **options)
        if self.num_lists:
            return faiss.SearchParametersIVF(nprobe=nprobe, **options)
        return faiss.SearchParameters(**options)

    def _rescore(self, queries: np.ndarray, candidates: list[np.ndarray], top: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full((len(queries), top), -np.inf, np.float32)
        positions = np.full((len(queries), top), -1, np.int64)
        for row, (query, found) in enumerate(zip(queries, candidates, strict=True)):
            exact = self.fetch(found) @ query
            best = np.argsort(-exact, kind="stable")[:top]
            scores[row, : len(best)], positions[row, : len(best)] = exact[best], found[best]
        return scores, positions
