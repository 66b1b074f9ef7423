"""The table of recall and chance, and the names of the metrics of each modality."""

from math import comb

import pytest

from modeling_cots.evaluation.recall_table import PREFIXES, recall_rows, rename_metrics

METRICS = {f"{side}_recall_at_{k}": 10.0 * k for side in ("i2t", "t2i") for k in (1, 5, 10)}
METRICS |= {"i2t_median_rank": 2.0, "t2i_median_rank": 3.5, "i2t_mean_rank": 7.25, "t2i_mean_rank": 9.0}


def test_metrics_are_named_by_modality():
    of_videos = rename_metrics({**METRICS, "recall_sum": 1.0, "eval_t2i_recall_at_1": 2.0}, "video")
    assert {name.removeprefix("eval_")[:3] for name in of_videos} == {*PREFIXES["video"], "rec"}
    assert of_videos["v2t_median_rank"] == 2.0 and of_videos["t2v_mean_rank"] == 9.0
    assert of_videos["recall_sum"] == 1.0 and of_videos["eval_t2v_recall_at_1"] == 2.0
    back = rename_metrics(of_videos, "image")
    assert back == rename_metrics(back, "image") == {**METRICS, "recall_sum": 1.0, "eval_t2i_recall_at_1": 2.0}


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("modality, written_as", [("image", "image"), ("video", "image"), ("video", "video")])
def test_rows_of_both_directions(modality, written_as, prefix):
    metrics = {prefix + name: value for name, value in rename_metrics(METRICS, written_as).items()}
    to_text, to_items = recall_rows(metrics, modality, 200, 1000)
    assert (to_text.direction, to_items.direction) == (f"{modality} to text", f"text to {modality}")
    assert to_text.recalls == to_items.recalls == {1: 10.0, 5: 50.0, 10: 100.0}
    assert to_items.chances == pytest.approx({1: 0.5, 5: 2.5, 10: 5.0})
    assert to_text.chances == pytest.approx({k: 100 * (1 - comb(995, k) / comb(1000, k)) for k in (1, 5, 10)})
    assert (to_text.median_rank, to_text.mean_rank, to_items.median_rank, to_items.mean_rank) == (2.0, 7.25, 3.5, 9.0)


@pytest.mark.parametrize("counts", [(), (200, None), (None, 1000)])
def test_without_the_counts_there_is_no_chance(counts):
    assert [row.chances for row in recall_rows(METRICS, "image", *counts)] == [{}, {}]
