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


def make_pairs(num: int, num_captions: int, dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of images, (num, dim), and of captions, (num_captions, dim), which lie in another cone.

    Both modalities show eight topics, the captions less exactly, and each has a mean and noise of its own.
    """
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((8, dim)) * np.linspace(1, 0.3, 8)[:, None] / 8**0.5
    topics = rng.standard_normal((num, 8))
    told = topics[rng.integers(0, num, num_captions)] + 0.3 * rng.standard_normal((num_captions, 8))
    images = topics @ directions + 0.1 * rng.standard_normal((num, dim)) + 0.5
    captions = told @ directions + 0.3 * rng.standard_normal((num_captions, dim)) - 0.2
    images, captions = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, captions))
    return images.astype(np.float32), captions.astype(np.float32)


@pytest.mark.parametrize("index_type", ["ivfpq", "int8", "binary"])
@pytest.mark.parametrize("num", [4_000, 20_000])
def test_captions_find_nineteen_of_their_twenty_nearest_images_by_default(index_type, num):
    images, captions = make_pairs(num, 200)
    vectors = FaissVectors(index_type, images.shape[1], lambda positions: images[positions])
    vectors.grow(num)
    exact = np.argsort(-(captions @ images.T), axis=1)[:, :10]

    def recall(positions) -> float:
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(positions, exact, strict=True)]))

    assert recall(vectors.search(captions, 10, None)[1]) >= 0.95
    assert recall(vectors.propose(captions, 200, None, nprobe=4)) < 0.9  # these are not to be found by any nprobe


@pytest.mark.parametrize("index_type", ["ivfpq", "int8", "binary"])
def test_a_filter_costs_no_recall_and_all_results_are_given(index_type, monkeypatch):
    """More lists are compared where few rows of each are allowed, and where many results are asked for."""
    monkeypatch.setattr("modeling_cots.search.faiss_vectors.FEW_ROWS", 50)  # so that filters reach FAISS
    images, captions = make_pairs(20_000, 100)
    vectors = FaissVectors(index_type, images.shape[1], lambda positions: images[positions])
    vectors.grow(len(images))
    allowed = np.random.default_rng(1).random(len(images)) < 0.05
    _, positions = vectors.search(captions, 10, allowed)
    exact = np.argsort(np.where(allowed, -(captions @ images.T), np.inf), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(positions, exact, strict=True)]) >= 0.95
    for mask in (None, allowed):
        for top in (500, 15_000):
            scores, positions = vectors.search(captions[:3], top, mask)
            assert positions.shape == scores.shape == (3, min(top, 20_000 if mask is None else allowed.sum()))
            assert (positions >= 0).all()


@pytest.mark.parametrize("index_type", IN_FAISS)
def test_no_mask_is_a_mask_of_all_rows(index_type):
    vectors = make(index_type)
    for without, with_mask in zip(
        vectors.search(VECTORS[:20], 10, None), vectors.search(VECTORS[:20], 10, np.ones(3000, bool)), strict=True
    ):
        np.testing.assert_array_equal(without, with_mask)
    if vectors.num_lists:
        assert vectors.index.nprobe == nprobe_of(vectors.num_lists)  # for those who search the file without us


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
    # 141 lists would need 5,499 vectors: all of the 5,000 train as many lists as they can.
    assert num_lists_of(5_000) == 141 and fetched[0] == 5_000 and vectors.num_lists == 5_000 // 39
    monkeypatch.setattr("modeling_cots.search.faiss_vectors.VECTORS_PER_LIST", 10)
    fetched.clear()
    vectors = FaissVectors("ivfpq", DIM, fetch)
    vectors.grow(5_000)
    assert fetched[0] == 1_410 and vectors.num_lists == 141


@pytest.mark.parametrize("num_rows", [10**5, 10**6, 10**7, 10**8, 10**9])
def test_a_query_reads_a_smaller_share_of_more_vectors(num_rows):
    shares = [nprobe_of(num_lists) / num_lists for num_lists in map(num_lists_of, (num_rows // 10, num_rows))]
    assert shares[1] < shares[0]
    if num_rows == 10**8:
        assert num_lists_of(num_rows) == 20_000 and shares[1] * num_rows == 28 * 5_000
