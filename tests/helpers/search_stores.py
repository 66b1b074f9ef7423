"""Entries for the tests of vector stores: clustered unit vectors with metadata."""

import numpy as np
import pyarrow as pa

from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.rows import fixed_features

DIM = 16
INFO = {"dim": DIM, "model": "m", "model_identity": "i"}


def make_vectors(num: int, seed: int = 0) -> np.ndarray:
    """(num, 16) unit vectors around eight centers."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).standard_normal((8, DIM))
    vectors = centers[rng.integers(0, 8, num)] + 0.5 * rng.standard_normal((num, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_rows(vectors: np.ndarray, first: int = 0, **metadata) -> pa.Table:
    """A table of entries "pic0", "pic1", ... with these vectors."""
    names = [f"pic{first + number}" for number in range(len(vectors))]
    schema = fixed_features(vectors.shape[1]).arrow_schema
    columns = {
        "row_id": row_ids_of(names).astype(str),
        "name": names,
        "source": ["test"] * len(names),
        "captions": [[f"caption of {name}", "b"] for name in names],
        "thumbnail": [{"bytes": b"jpeg", "path": None}] * len(names),
        "embedding": vectors.tolist(),
    }
    fixed = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    return pa.table({**fixed, **{name: pa.array(values) for name, values in metadata.items()}})


def build_without_lists(vectors, num_rows: int) -> None:
    """In place of `FaissVectors._build`: int8 and binary codes as earlier indexes have them, in no lists."""
    import faiss

    sample = vectors.fetch(slice(0, num_rows))
    if vectors.index_type == "binary":
        vectors.thresholds = sample.mean(axis=0)
        vectors.index = faiss.IndexBinaryFlat(8 * -(-vectors.dim // 8))
        return
    assert vectors.index_type == "int8"
    vectors.index = faiss.IndexScalarQuantizer(vectors.dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    vectors.index.train(sample)


def fill(store, rows: pa.Table) -> None:
    """Add rows as `SearchIndex.add` does."""
    with store.adding():
        store.add(rows)


def names(hits: list[dict]) -> list[str]:
    """Names of the entries found."""
    return [hit["name"] for hit in hits]
