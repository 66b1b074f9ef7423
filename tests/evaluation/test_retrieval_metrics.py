"""Ranks against a dense twin with exact ties, the peak of memory as its docstring states it, every protocol."""

import re
import statistics
from pathlib import Path

import evaluate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_cots.evaluation import retrieval_metrics as module
from modeling_cots.evaluation.retrieval_metrics import (
    PROTOCOLS,
    TIE_TOLERANCE,
    best_positive_ranks,
    chance_recall,
    full_float32,
    rank_statistics,
    retrieval_metrics,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def coarse_embeds(num: int, dim: int, generator: torch.Generator, dtype=torch.float32) -> torch.Tensor:
    """Multiples of 1/4, which every floating type holds and whose products are exact: equal scores are truly equal."""
    return torch.randint(-2, 3, (num, dim), generator=generator).to(dtype) / 4


def ids_for(num_queries: int, num_candidates: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids, several candidates to most of them and several queries to some."""
    query_ids = torch.randint(0, num_queries, (num_queries,), generator=generator)
    others = torch.randint(0, num_queries + 3, (num_candidates,), generator=generator)
    return query_ids, torch.cat([query_ids, others])


def dense_ranks(queries, candidates, query_ids, candidate_ids) -> list[int]:
    """The definition, one query at a time over plain numbers."""
    ranks = []
    for query, query_id in zip(queries.double(), query_ids.tolist(), strict=True):
        scores = [float(query @ candidate) for candidate in candidates.double()]
        relevant = [candidate_id == query_id for candidate_id in candidate_ids.tolist()]
        best = max(score for score, is_relevant in zip(scores, relevant, strict=True) if is_relevant)
        above = [s for s, is_relevant in zip(scores, relevant, strict=True) if not is_relevant and s >= best]
        ranks.append(1 + len(above))
    return ranks


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=30)
@given(
    num_queries=st.integers(1, 9), others=st.integers(0, 12), chunk_size=st.integers(1, 8), seed=st.integers(0, 2**31)
)
def test_ranks_equal_the_dense_twin_with_ties(dtype, num_queries, others, chunk_size, seed):
    generator = torch.Generator().manual_seed(seed)
    query_ids, candidate_ids = ids_for(num_queries, others, generator)
    queries = coarse_embeds(len(query_ids), 3, generator, dtype)
    candidates = coarse_embeds(len(candidate_ids), 3, generator, dtype)
    ranks = best_positive_ranks(queries, candidates, query_ids, candidate_ids, chunk_size=chunk_size)
    assert ranks.dtype == torch.int64 and ranks.device == queries.device
    assert ranks.tolist() == dense_ranks(queries, candidates, query_ids, candidate_ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_means_rounded_embeddings_but_not_rounded_scores(dtype):
    """4097/4096 and 1 differ in float32; a product that was rounded to half precision would call them a tie."""
    queries = torch.tensor([[1.0, 1.0]], dtype=dtype)
    candidates = torch.tensor([[1.0, 2.0**-12], [1.0, 0.0]], dtype=dtype)
    ids = torch.tensor([0]), torch.tensor([0, 1])
    assert best_positive_ranks(queries, candidates, *ids).tolist() == [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert best_positive_ranks(queries.float(), candidates.float(), *ids).tolist() == [1]


def test_a_collapsed_model_ranks_last_however_its_scores_round():
    """All embeddings equal: every irrelevant candidate ties, in products of any shape and with any last bits."""
    embeds = F.normalize(torch.randn(1, 256, generator=torch.Generator().manual_seed(0)), dim=1).expand(203, -1)
    embeds = embeds * (1 + 1e-7 * torch.linspace(-1, 1, 203).unsqueeze(1))
    ids = torch.arange(203)
    for chunk_size in (7, 64, 4096):
        assert best_positive_ranks(embeds, embeds, ids, ids, chunk_size=chunk_size).tolist() == [203] * 203


def test_a_lead_above_the_tolerance_is_no_tie():
    queries = torch.tensor([[1.0, 0.0]])
    for lead, rank in ((0.5 * TIE_TOLERANCE, 2), (4 * TIE_TOLERANCE, 1)):
        candidates = torch.tensor([[0.5 + lead, 0.0], [0.5, 0.0]])
        assert best_positive_ranks(queries, candidates, torch.tensor([7]), torch.tensor([7, 8])).tolist() == [rank]


def test_ranks_do_not_depend_on_the_order_of_candidates():
    generator = torch.Generator().manual_seed(3)
    query_ids, candidate_ids = ids_for(20, 50, generator)
    queries, candidates = coarse_embeds(20, 4, generator), coarse_embeds(70, 4, generator)
    order = torch.randperm(70, generator=generator)
    expected = best_positive_ranks(queries, candidates, query_ids, candidate_ids)
    assert torch.equal(best_positive_ranks(queries, candidates[order], query_ids, candidate_ids[order]), expected)


def peak_bytes(num_queries: int, num_candidates: int, chunk_size: int, dtype=torch.float32) -> int:
    """Most bytes held at once beside the inputs: the running sum of all that torch allocates and frees."""
    generator = torch.Generator().manual_seed(0)
    queries = coarse_embeds(num_queries, 8, generator, dtype)
    candidates = coarse_embeds(num_candidates, 8, generator, dtype)
    ids = torch.arange(num_queries), torch.arange(num_candidates) % num_queries
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        best_positive_ranks(queries, candidates, *ids, chunk_size=chunk_size)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_memory_is_what_the_docstring_says(dtype):
    """5 bytes a score of one chunk; with more candidates only what finds the relevant ones grows."""
    chunk_size, num_queries = 64, 300
    small = peak_bytes(num_queries, 600, chunk_size, dtype)
    large = peak_bytes(num_queries, 9600, chunk_size, dtype)
    copies = 4 * 8 * 9 * chunk_size
    rows_of_statistics = 64 * chunk_size + 8 * num_queries
    for num_candidates, peak in ((600, small), (9600, large)):
        assert peak <= 40 * chunk_size**2 + copies + rows_of_statistics + 26 * (num_candidates + num_queries)
    assert small > 4 * 8 * chunk_size**2
    assert large < 4 * num_queries * 9600 / 20  # the full matrix would be twenty times this


@settings(deadline=None, max_examples=30)
@given(num_queries=st.integers(1, 30), num_processes=st.integers(1, 4), chunk_size=st.integers(1, 9))
def test_processes_that_share_the_queries_find_the_ranks_of_one(num_queries, num_processes, chunk_size):
    """Random directions, whose products have last bits: the chunks are those of one process, and so are the bits."""
    generator = torch.Generator().manual_seed(num_queries)
    query_ids, candidate_ids = ids_for(num_queries, 20, generator)
    queries, candidates = (
        F.normalize(torch.randn(len(ids), 5, generator=generator), dim=1) for ids in (query_ids, candidate_ids)
    )
    given = queries, candidates, query_ids, candidate_ids
    expected = best_positive_ranks(*given, chunk_size=chunk_size)
    parts = [
        best_positive_ranks(*given, chunk_size=chunk_size, process_index=index, num_processes=num_processes)
        for index in range(num_processes)
    ]
    assert torch.equal(sum(parts), expected)
    assert ((torch.stack(parts) > 0).sum(dim=0) == 1).all(), "each query is ranked by one process alone"


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_scores_keep_their_digits_where_a_run_has_chosen_faster_products(chosen):
    """TF32 would round scores to 10 bits, and ties are told apart at 1e-6; what was chosen holds again afterwards."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(chosen)
        with full_float32():
            if hasattr(torch.backends, "fp32_precision"):
                assert (
                    torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"
                )
            else:
                assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(before)


def test_statistics_of_known_ranks():
    ranks = [1, 1, 2, 5, 6, 10, 11, 40]
    found = rank_statistics(torch.tensor(ranks))
    assert found == {
        "recall_at_1": 25.0,
        "recall_at_5": 50.0,
        "recall_at_10": 75.0,
        "median_rank": 5.5,
        "mean_rank": statistics.mean(ranks),
    }
    assert rank_statistics(torch.tensor(ranks[:-1]))["median_rank"] == 5.0


def test_both_directions_of_a_hand_made_set():
    """Image 0 has a perfect caption and one that fits image 1; the caption of image 1 fits neither."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    metrics = retrieval_metrics(images, texts, torch.tensor([4, 9]), torch.tensor([4, 4, 9]))
    # Ranks of the images: 1, and 3, as one caption is better than its own and one ties. Of the captions: 1, 2, 1.
    assert metrics["i2t_recall_at_1"] == 50.0 and metrics["i2t_mean_rank"] == 2.0 and metrics["i2t_median_rank"] == 2.0
    assert metrics["t2i_recall_at_1"] == pytest.approx(200 / 3) and metrics["t2i_mean_rank"] == pytest.approx(4 / 3)
    assert metrics["t2i_median_rank"] == 1.0 and metrics["t2i_recall_at_5"] == metrics["i2t_recall_at_10"] == 100.0
    assert metrics["recall_sum"] == pytest.approx(50 + 200 / 3 + 4 * 100)
    sides = [f"{side}_{name}" for side in ("i2t", "t2i") for name in rank_statistics(torch.ones(1))]
    assert set(metrics) == {*sides, "recall_sum"}


def test_swapping_the_roles_swaps_the_directions():
    generator = torch.Generator().manual_seed(5)
    images, texts, ids = coarse_embeds(30, 4, generator), coarse_embeds(30, 4, generator), torch.arange(30)
    forward, backward = retrieval_metrics(images, texts, ids, ids), retrieval_metrics(texts, images, ids, ids)
    assert all(forward[f"i2t_{name}"] == backward[f"t2i_{name}"] for name in rank_statistics(torch.ones(1)))
    assert forward["i2t_mean_rank"] != forward["t2i_mean_rank"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_embeddings_that_are_not_finite_are_refused(bad, side):
    embeds = {"query": torch.eye(5), "candidate": torch.eye(5)}
    embeds[side][4, 2] = bad
    with pytest.raises(ValueError, match=f"{side} embeddings are not finite"):
        best_positive_ranks(embeds["query"], embeds["candidate"], torch.arange(5), torch.arange(5), chunk_size=2)


@pytest.mark.parametrize(
    ("num_queries", "query_ids", "candidate_ids", "message"),
    [
        (3, [0, 1, 7], [0, 1, 2], "no relevant candidate"),
        (3, [0, 1, 2, 3], [0, 1, 2], "3 query embeddings and 4 ids"),
        (3, [0, 1, 2], [0], "3 candidate embeddings and 1 ids"),
        (0, [], [0, 1, 2], "no queries"),
    ],
)
def test_what_cannot_be_ranked_is_refused(num_queries, query_ids, candidate_ids, message):
    with pytest.raises(ValueError, match=message):
        best_positive_ranks(
            torch.eye(3)[:num_queries], torch.eye(3), torch.tensor(query_ids), torch.tensor(candidate_ids)
        )


# Protocols


@pytest.mark.parametrize(
    ("protocol", "num_images", "num_texts"),
    [
        ("flickr8k-1k", 1_000, 5_000),
        ("flickr30k-1k", 1_000, 5_000),
        ("coco-5k", 5_000, 25_010),
        ("coco-1k", 5_000, 25_010),
        ("msrvtt-full", 2_990, 59_800),
        ("msrvtt-1ka", 1_000, 1_000),
    ],
)
def test_protocols_assert_their_counts(protocol, num_images, num_texts):
    images, texts = torch.zeros(num_images, 2), torch.zeros(num_texts, 2)
    ids = torch.arange(num_images), torch.arange(num_texts) % num_images
    counts = f"{num_images:,} images or videos and {num_texts:,} captions"
    with pytest.raises(ValueError, match=f"{protocol} has {counts}, got {num_images - 1:,}"):
        retrieval_metrics(images[1:], texts, ids[0][1:], ids[1], protocol=protocol)
    with pytest.raises(ValueError, match=f"{protocol} has {counts}"):
        retrieval_metrics(images, texts[1:], ids[0], ids[1][1:], protocol=protocol)
    assert PROTOCOLS[protocol] == (num_images, num_texts)


def test_an_unknown_protocol_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'coco-2k'; there are .*coco-1k"):
        retrieval_metrics(torch.eye(2), torch.eye(2), torch.arange(2), torch.arange(2), protocol="coco-2k")


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "flickr30k-1k"])  # as flickr8k-1k
def test_protocols_take_a_whole_test_set_of_their_counts(protocol):
    """Every caption is its image's twin but for those of the first image, which are the opposite of it."""
    num_images, num_texts = PROTOCOLS[protocol]
    ids = torch.arange(num_images), torch.arange(num_texts) % num_images
    images = F.normalize(torch.randn(num_images, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    texts = torch.where((ids[1] == 0)[:, None], -images[ids[1]], images[ids[1]])
    metrics = retrieval_metrics(images, texts, *ids, protocol=protocol)
    folds, gallery = (5, 1000) if protocol == "coco-1k" else (1, num_images)
    assert metrics["i2t_recall_at_1"] == pytest.approx(100 * (1 - 1 / gallery / folds))
    assert metrics["t2i_median_rank"] == 1 and metrics["i2t_median_rank"] == 1
    assert metrics["t2i_recall_at_10"] < 100 and metrics["recall_sum"] < 600


@pytest.fixture(scope="module")
def msrvtt_1ka():
    """1,000 videos and captions, each caption close to its video."""
    generator = torch.Generator().manual_seed(1)
    videos = F.normalize(torch.randn(1000, 8, generator=generator), dim=1)
    texts = F.normalize(videos + 0.3 * torch.randn(1000, 8, generator=generator), dim=1)
    return videos, texts, torch.arange(1000), torch.arange(1000)


def test_a_protocol_changes_no_number(msrvtt_1ka):
    metrics = retrieval_metrics(*msrvtt_1ka, protocol="msrvtt-1ka")
    assert metrics == retrieval_metrics(*msrvtt_1ka)
    assert 1 < metrics["t2i_recall_at_1"] < 99


def test_coco_1k_is_the_mean_of_five_consecutive_folds(monkeypatch):
    """At a hundredth of its size: 50 images in folds of 10, captions in any order, some images with six."""
    generator = torch.Generator().manual_seed(2)
    image_ids = torch.randperm(50, generator=generator)
    text_ids = torch.cat([torch.arange(50).repeat(5), torch.arange(3)])
    text_ids = text_ids[torch.randperm(len(text_ids), generator=generator)]
    monkeypatch.setitem(PROTOCOLS, "coco-1k", (50, 253))
    images = F.normalize(torch.randn(50, 4, generator=generator), dim=1)
    by_id = torch.empty_like(images)
    by_id[image_ids] = images
    texts = F.normalize(by_id[text_ids] + 0.5 * torch.randn(253, 4, generator=generator), dim=1)
    metrics = retrieval_metrics(images, texts, image_ids, text_ids, protocol="coco-1k")
    folds = []
    for start in range(0, 50, 10):
        fold_ids = image_ids[start : start + 10]
        of_fold = torch.tensor([text_id in fold_ids.tolist() for text_id in text_ids.tolist()])
        folds.append(retrieval_metrics(images[start : start + 10], texts[of_fold], fold_ids, text_ids[of_fold]))
    assert metrics == pytest.approx({name: statistics.mean(fold[name] for fold in folds) for name in folds[0]})
    assert metrics["recall_sum"] > retrieval_metrics(images, texts, image_ids, text_ids)["recall_sum"]


# Chance


@pytest.mark.parametrize(("k", "num_candidates", "num_relevant"), [(1, 10, 1), (5, 10, 1), (3, 8, 2), (10, 4, 1)])
def test_chance_recall_is_the_share_of_all_draws(k, num_candidates, num_relevant):
    subsets = torch.combinations(torch.arange(num_candidates), min(k, num_candidates))
    hits = (subsets < num_relevant).any(dim=1).double().mean().item()
    assert chance_recall(k, num_candidates, num_relevant) == pytest.approx(100 * hits)


def test_random_embeddings_reach_chance():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(2000, 16, generator=generator), dim=1) for _ in range(2))
    ids = torch.arange(2000) // 2  # two of each
    metrics = retrieval_metrics(images, texts, ids, ids)
    expected = chance_recall(10, 2000, 2)
    spread = 100 * (expected / 100 / 2000) ** 0.5
    assert abs(metrics["t2i_recall_at_10"] - expected) < 4 * spread


# evaluate


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    """As a user loads it, from a copy of the file that stands alone."""
    file = tmp_path_factory.mktemp("metric") / "retrieval_metrics.py"
    file.write_bytes(Path(module.__file__).read_bytes())
    cache = tmp_path_factory.mktemp("cache")
    return evaluate.load(str(file), cache_dir=str(cache))


def test_evaluate_metric_gives_the_same_numbers_batch_by_batch(metric):
    generator = torch.Generator().manual_seed(4)
    images = F.normalize(torch.randn(5, 6, generator=generator), dim=1)
    num_captions = [1, 3, 2, 1, 2]
    text_ids = torch.arange(5).repeat_interleave(torch.tensor(num_captions))
    texts = F.normalize(torch.randn(9, 6, generator=generator), dim=1)
    captions = texts.split(num_captions)
    metric.add_batch(predictions=images[:3], references=captions[:3])
    metric.add_batch(predictions=images[3:].numpy(), references=[rows.numpy() for rows in captions[3:]])
    assert metric.compute() == pytest.approx(retrieval_metrics(images, texts, torch.arange(5), text_ids))
    metric.add_batch(predictions=images, references=images[:, None])
    assert metric.compute()["recall_sum"] == 600.0


def test_evaluate_metric_knows_protocols(metric, msrvtt_1ka):
    videos, texts, *ids = msrvtt_1ka
    found = metric.compute(predictions=videos, references=texts[:, None], protocol="msrvtt-1ka")
    assert found == pytest.approx(retrieval_metrics(videos, texts, *ids))
    with pytest.raises(ValueError, match="coco-5k has 5,000 images"):
        metric.compute(predictions=videos[:2], references=texts[:2, None], protocol="coco-5k")


def test_the_code_of_the_documentation_runs(monkeypatch, capsys, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_EVALUATE_CACHE", str(tmp_path))
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "retrieval.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/retrieval.md", "exec"), {})
    assert capsys.readouterr().out.split() == ["600.0", "600.0"]
