"""The index types that a search index can have: one table, and one check of a name.

An index type says what is kept of a vector and how a search goes through it; docs/search.md has their recall, speed
and memory. How FAISS builds each is in `faiss_vectors.py`; the names and parameters in Milvus are here.
"""

from dataclasses import dataclass
from typing import NamedTuple

FAISS, MILVUS_SERVER, MILVUS_LITE = "FAISS", "a Milvus server", "a Milvus Lite file"
POSTGRES = "PostgreSQL"
FEW_ROWS = 20_000  # a filter that leaves no more than these has them compared directly
TUNED_TOP, TUNED_QUERIES = 10, 200  # nprobe and candidates are chosen for so many results of so many queries


class Candidates(NamedTuple):
    """How many candidates the codes propose: `times` the number that is wanted, and at least `minimum`."""

    times: int
    minimum: int


class SearchEffort(NamedTuple):
    """What `tuning.py` has chosen: the lists that a query compares (0 without lists), and the candidates that are
    rescored for ten results, in proportion for more."""

    nprobe: int
    candidates: int


class MilvusIndex(NamedTuple):
    """Milvus' own name of an index type, with the parameters of building and of searching."""

    name: str
    build_params: dict
    search_params: dict


class PostgresIndex(NamedTuple):
    """The type of pgvector's column, the operators of the graph over it (`None` without a graph), its most numbers."""

    column: str
    operators: str | None
    max_dim: int


@dataclass(frozen=True)
class IndexType:
    """
    One index type.

    Args:
        description: What is kept of the vectors, and what a search does with it.
        milvus: Its form in Milvus; `None` where Milvus has none.
        in_milvus_lite: Whether the embedded file has it, too.
        postgres: Its form in PostgreSQL; `None` where pgvector has none.
        in_faiss: Whether the local folder has it.
        min_vectors: Vectors that FAISS needs to train the codes.
        candidates: How many candidates FAISS finds, to be rescored from the stored embeddings; `None` where FAISS'
            own scores are exact.
    """

    description: str
    milvus: MilvusIndex | None
    in_milvus_lite: bool = True
    postgres: PostgresIndex | None = None
    in_faiss: bool = True
    min_vectors: int = 1
    candidates: Candidates | None = None

    @property
    def is_tunable(self) -> bool:
        """Whether `tuning.py` can choose what a search costs."""
        return self.in_faiss and self.candidates is not None

    @property
    def stores(self) -> list[str]:
        """The vector stores that have this index type."""
        has_it = {
            FAISS: self.in_faiss,
            MILVUS_SERVER: self.milvus is not None,
            MILVUS_LITE: self.milvus is not None and self.in_milvus_lite,
            POSTGRES: self.postgres is not None,
        }
        return [store for store, has in has_it.items() if has]


INDEX_TYPES = {
    "exact": IndexType(
        "all vectors in memory, all compared",
        milvus=MilvusIndex("FLAT", {}, {}),
        postgres=PostgresIndex("vector", None, 16_000),
    ),
    "hnsw": IndexType(
        "all vectors in memory, and a graph through them",
        milvus=MilvusIndex("HNSW", {"M": 32, "efConstruction": 100}, {"ef": 128}),
        postgres=PostgresIndex("vector", "vector_ip_ops", 2_000),
    ),
    "ivfpq": IndexType(
        "half a byte for two numbers, in lists; candidates rescored",
        milvus=MilvusIndex("IVF_PQ", {"nlist": 1024, "nbits": 8}, {"nprobe": 32}),
        # Milvus Lite takes the name, compares all vectors, and fails when the file is next opened.
        in_milvus_lite=False,
        min_vectors=1_000,
        candidates=Candidates(times=10, minimum=200),
    ),
    "int8": IndexType(
        "a byte a number, in lists; candidates rescored",
        milvus=MilvusIndex("IVF_SQ8", {"nlist": 1024}, {"nprobe": 32}),
        min_vectors=100,
        candidates=Candidates(times=4, minimum=40),
    ),
    "binary": IndexType(
        "a bit a number, in lists; candidates rescored",
        milvus=None,
        min_vectors=100,
        candidates=Candidates(times=10, minimum=200),
    ),
    "halfvec": IndexType(
        "two bytes a number, and a graph through the vectors",
        milvus=None,
        postgres=PostgresIndex("halfvec", "halfvec_ip_ops", 4_000),
        in_faiss=False,
    ),
}


def check_index_type(name: str, store: str) -> None:
    """
    Raise `ValueError` unless the vector store has an index type of this name.

    Args:
        name: What the user asked for.
        store: FAISS, MILVUS_SERVER, MILVUS_LITE or POSTGRES.
    """
    present = [index_type for index_type, what in INDEX_TYPES.items() if store in what.stores]
    if name in present:
        return
    elsewhere = f", which needs {' or '.join(INDEX_TYPES[name].stores)}" if name in INDEX_TYPES else ""
    raise ValueError(f"With {store} the index type must be one of {', '.join(present)}; got {name!r}{elsewhere}.")


def check_target_recall(target: float, index_type: str) -> None:
    """Raise `ValueError` unless an index type of FAISS can be tuned to a target of recall, and it is a share."""
    if not 0 < target <= 1:
        raise ValueError(f"The target of recall is a share above 0 and at most 1, such as 0.95; got {target}.")
    if not INDEX_TYPES[index_type].is_tunable:
        tunable = ", ".join(name for name, what in INDEX_TYPES.items() if what.is_tunable)
        what = "compares all vectors exactly" if index_type == "exact" else "rescores no candidates"
        raise ValueError(
            f"A target of recall needs one of the index types {tunable}; {index_type!r} {what}: choose another "
            "--engine, or leave --target_recall out."
        )


def effort_of(info: dict) -> SearchEffort | None:
    """What was chosen for an index, as its `info` says; `None` where its index type's defaults hold."""
    return SearchEffort(info["nprobe"], info["candidates"]) if "candidates" in info else None
