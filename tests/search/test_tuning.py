"""The cheapest nprobe and candidates that reach a target of recall, stored in an index and used by its queries."""

import numpy as np
import pytest
from search_stores import DIM, INFO, fill, make_rows, make_vectors

pytest.importorskip("faiss")

from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.faiss_store import FaissStore
from modeling_cots.search.faiss_vectors import FaissVectors
from modeling_cots.search.index_types import INDEX_TYPES, SearchEffort, check_target_recall, effort_of
from modeling_cots.search.tuning import Sample, choose_effort, nearest_of, nprobes_of

VECTORS = make_vectors(3000)
ALL = np.ones(3000, dtype=bool)


def make(index_type: str, effort: SearchEffort | None = None) -> FaissVectors:
    vectors = FaissVectors(index_type, DIM, lambda positions: VECTORS[positions], effort)
    vectors.grow(3000)
    return vectors


def make_queries(num: int = 60) -> np.ndarray:
    """(num, DIM) unit vectors away from all stored ones, as those of captions are."""
    queries = make_vectors(num, seed=3) + 0.4 * np.random.default_rng(4).standard_normal((num, DIM))
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def recall_of(vectors: FaissVectors, queries: np.ndarray, effort: SearchEffort, allowed: np.ndarray = ALL) -> float:
    """Recall@10 by the plain definition."""
    _, found = vectors.over(vectors.fetch, effort).search_codes(queries, 10, allowed)
    exact = np.argsort(np.where(allowed, -(queries @ VECTORS.T), np.inf), axis=1)[:, :10]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))


@pytest.mark.parametrize("index_type", [name for name, what in INDEX_TYPES.items() if what.is_tunable])
@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1])
def test_reaches_the_target_with_the_fewest_candidates(index_type, target):
    vectors, queries, allowed = make(index_type), make_queries(), np.arange(3000) % 3 > 0
    effort, recall = choose_effort(vectors, Sample(queries, np.full(60, -1)), allowed, target)
    assert recall >= target
    assert recall == pytest.approx(recall_of(vectors, queries, effort, allowed))
    assert 0 < effort.nprobe <= vectors.num_lists
    # FAISS' fast scan orders codes of equal scores anew where fewer are asked for.
    fewer = effort.candidates // 2 if index_type == "ivfpq" else effort.candidates - 1
    if fewer >= 10:
        assert recall_of(vectors, queries, effort._replace(candidates=fewer), allowed) < target


def test_more_candidates_than_are_tried_at_first(monkeypatch):
    monkeypatch.setattr("modeling_cots.search.tuning.MAX_CANDIDATES", 12)
    vectors, queries = make("binary"), make_queries()
    effort, recall = choose_effort(vectors, Sample(queries, np.full(60, -1)), ALL, 0.99)
    assert effort.candidates > 12 and recall >= 0.99


def test_neighbors_of_a_stored_vector_are_others_and_copies_count_alike(monkeypatch):
    monkeypatch.setattr("modeling_cots.search.tuning.ROWS_PER_STEP", 700)
    stored = np.concatenate([VECTORS[:2000], VECTORS[:1], VECTORS[np.argsort(-(VECTORS[:2000] @ VECTORS[0]))[10:11]]])
    vectors = FaissVectors("int8", DIM, lambda positions: stored[positions])
    (near,) = nearest_of(vectors, Sample(stored[:1], np.array([0])), np.ones(len(stored), dtype=bool))
    scores = stored @ stored[0]
    scores[0] = -np.inf
    assert 0 not in near and 2000 in near
    assert set(near) == set(np.flatnonzero(scores >= np.sort(scores)[-10] - 1e-6))


def test_every_nprobe_up_to_all_lists():
    vectors = make("ivfpq")
    assert nprobes_of(vectors)[:8] == [1, 2, 3, 4, 6, 8, 12, 16] and nprobes_of(vectors)[-1] == vectors.num_lists
    exact = make("exact")
    assert exact.num_lists == 0 and nprobes_of(exact) == [0]


def test_queries_use_the_effort_and_more_results_more_candidates():
    asked = []
    vectors = make("ivfpq", SearchEffort(nprobe=3, candidates=25))
    search = vectors.index.search
    vectors.index.search = lambda coded, num, params: (
        asked.append((params.nprobe, num)) or search(coded, num, params=params)
    )
    for top in (1, 10, 20, 21):
        vectors.search(VECTORS[:1], top, ALL)
    assert asked == [(3, 25), (3, 25), (3, 50), (3, 53)]


@pytest.mark.parametrize(
    ("target", "index_type", "message"),
    [
        (0, "ivfpq", "above 0 and at most 1, such as 0.95; got 0"),
        (-0.1, "int8", "got -0.1"),
        (1.01, "binary", "got 1.01"),
        (float("nan"), "ivfpq", "got nan"),
        (0.95, "exact", "ivfpq, int8, binary; 'exact' compares all vectors exactly: choose another --engine"),
        (0.95, "hnsw", "'hnsw' rescores no candidates"),
        (0.95, "halfvec", "'halfvec' rescores no candidates"),
    ],
)
def test_refusals(target, index_type, message):
    with pytest.raises(ValueError, match=message):
        check_target_recall(target, index_type)


def test_a_store_keeps_what_was_chosen_until_it_is_rebuilt(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "ivfpq")
    with pytest.raises(ValueError, match="has no images yet"):
        store.tune(0.9)
    fill(store, make_rows(VECTORS[:1200]))
    reader = FaissStore(tmp_path / "index")
    assert len(reader.search(VECTORS[:1], 3, [])[0]) == 3  # its vectors are in memory, without the effort
    tuned = store.tune(0.9, make_queries())
    for handle in (store, reader, FaissStore(tmp_path / "index")):
        assert effort_of(handle.info) == tuned.effort and handle.info["target_recall"] == 0.9
        handle.search(VECTORS[:1], 3, [])
        assert handle._newest().vectors().effort == tuned.effort
    fill(store, make_rows(VECTORS[1200:1300], first=1200))
    assert store.delete(row_ids_of(["pic3"])) == 1 and effort_of(store.info) == tuned.effort
    by_vectors = store.tune(0.95)
    assert by_vectors.recall >= 0.95 and effort_of(reader.info) == by_vectors.effort
    store.rebuild("ivfpq")
    assert effort_of(store.info) is None and store.info["target_recall"] == 0.95
    store.rebuild("exact")
    assert "target_recall" not in store.info
    with pytest.raises(ValueError, match="'exact' compares all vectors exactly"):
        store.tune(0.9)


def test_captions_are_drawn_once_each_from_entries_that_are_there(tmp_path):
    rows = make_rows(VECTORS[:30])
    texts = [[], [" "], ["same"], ["same"], *([f"text {number}"] for number in range(26))]
    rows = rows.set_column(rows.schema.get_field_index("captions"), rows.schema.field("captions"), [texts])
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, rows)
    store.delete(row_ids_of(["pic4"]))
    everything = store.sample_captions(100)
    assert sorted(everything) == sorted(["same", *(f"text {number}" for number in range(1, 26))])
    assert store.sample_captions(5) == everything[:5]
