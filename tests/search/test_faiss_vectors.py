"""Index types in FAISS: only allowed rows are found, candidates are rescored exactly, and files load as saved."""

import numpy as np
import pytest
from search_stores import DIM, make_vectors

faiss = pytest.importorskip("faiss")

from modeling_cots.search.faiss_vectors import FaissVectors, nprobe_of, num_lists_of  # noqa: E402
from modeling_cots.search.index_types import FAISS, INDEX_TYPES  # noqa: E402

IN_FAISS = [name for name, index_type in INDEX_TYPES.items() if FAISS in index_type.stores]

VECTORS = make_vectors(3000)


def make(index_type: str, num: int = 3000) -> FaissVectors:
    vectors = FaissVectors(index_type, DIM, lambda positions: VECTORS[positions])
    vectors.grow(num)
    return vectors


@pytest.mark.parametrize("index_type", IN_FAISS)
def test_finds_the_best_allowed_rows_with_their_exact_scores(index_type, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_cots.search.faiss_vectors.FEW_ROWS", 50)  # so that filters reach FAISS
    vectors = make(index_type, 2000)
    vectors.grow(3000)  # more of them later
    allowed = np.arange(3000) % 3 == 0
    scores, positions = vectors.search(VECTORS[:30], 10, allowed)
    assert allowed[positions].all()
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", VECTORS[:30], VECTORS[positions]), atol=1e-5)
    exact = np.argsort(np.where(allowed, -(VECTORS[:30] @ VECTORS.T), np.inf), axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(positions, exact, strict=True)])
    assert recall == 1 if index_type == "exact" else recall > 0.9

    written = vectors.save(tmp_path / "v", tmp_path / "t")
    again = FaissVectors(index_type, DIM, lambda positions: VECTORS[positions])
    again.load(*written)
    assert len(again) == 3000
    np.testing.assert_array_equal(again.search(VECTORS[:30], 10, allowed)[1], positions)


@pytest.mark.parametrize("index_type", IN_FAISS)
def test_few_allowed_rows_are_compared_directly(index_type):
    allowed = np.zeros(3000, dtype=bool)
    allowed[[5, 1700, 2999]] = True
    scores, positions = make(index_type).search(VECTORS[:1], 10, allowed)
    best = np.array([5, 1700, 2999])[np.argsort(-(VECTORS[[5, 1700, 2999]] @ VECTORS[0]))]
    assert positions.tolist() == [best.tolist()] and scores.shape == (1, 3)
    assert make(index_type).search(VECTORS[:2], 10, np.zeros(3000, bool))[0].shape == (2, 0)


def test_ivfpq_finds_what_lies_in_a_narrow_cone():
    """Embeddings share a large mean, on which codes of the vectors would spend their bits, with a recall of 0.76."""
    rng = np.random.default_rng(0)
    cone = rng.standard_normal((5000, DIM), dtype=np.float32) * np.linspace(1, 0.1, DIM, dtype=np.float32) + 2
    cone /= np.linalg.norm(cone, axis=1, keepdims=True)
    vectors = FaissVectors("ivfpq", DIM, lambda positions: cone[positions])
    vectors.grow(len(cone))
    _, positions = vectors.search(cone[:50], 10, np.ones(len(cone), dtype=bool))
    exact = np.argsort(-(cone[:50] @ cone.T), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(positions, exact, strict=True)]) > 0.85


def test_refusals():
    with pytest.raises(ValueError, match="index type must be one of"):
        FaissVectors("tree", DIM, None)
    with pytest.raises(ValueError, match="at least 1,000 vectors and there are 10: use 'exact'"):
        make("ivfpq", 10)


def test_lists_and_their_training_grow_with_the_vectors(monkeypatch):
    monkeypatch.setattr("modeling_cots.search.faiss_vectors.NUM_TRAINING", 1_000)
    stored, fetched = make_vectors(5_000), []

    def fetch(positions):
        found = stored[positions]
        fetched.append(len(found))
        return found

    vectors = FaissVectors("ivfpq", DIM, fetch)
    vectors.grow(5_000)
    # 282 lists would need 10,998 vectors: all of the 5,000 train as many lists as they can.
    assert num_lists_of(5_000) == 282 and fetched[0] == 5_000 and vectors.index.nlist == 5_000 // 39
    monkeypatch.setattr("modeling_cots.search.faiss_vectors.VECTORS_PER_LIST", 10)
    fetched.clear()
    vectors = FaissVectors("ivfpq", DIM, fetch)
    vectors.grow(5_000)
    assert fetched[0] == 2_820 and vectors.index.nlist == 282


@pytest.mark.parametrize("num_rows", [10**5, 10**6, 10**7, 10**8, 10**9])
def test_a_query_reads_a_smaller_share_of_more_vectors(num_rows):
    shares = [nprobe_of(num_lists) / num_lists for num_lists in map(num_lists_of, (num_rows // 10, num_rows))]
    assert shares[1] <= 1 / 64 and (shares[1] < shares[0] or num_rows <= 10**6)
    if num_rows == 10**8:
        assert num_lists_of(num_rows) == 40_000 and shares[1] * num_rows == 500_000
