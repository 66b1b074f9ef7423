"""What a script prints at its end."""

import torch

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.reporting import format_example_retrievals, format_recall


def test_recall_stands_beside_chance():
    metrics = {f"eval_{side}_recall_at_{k}": 10.0 * k for side in ("i2t", "t2i") for k in (1, 5, 10)}
    metrics |= {"eval_i2t_median_rank": 2.0, "eval_t2i_median_rank": 3.5}
    text = format_recall(metrics, num_images=1000, num_captions=5000)
    assert "1,000 images and 5,000 captions" in text
    # One of 1,000 images is right: k / 1,000. Five of 5,000 captions are: 1 - C(4995, k) / C(5000, k).
    assert "R@1  10.0 (0.1)   R@5  50.0 (0.5)   R@10 100.0 (1.0)   median rank 3.5" in text
    assert text.count("(0.1)") == 2 and text.count("(1.0)") == 2


def test_three_captions_with_three_pictures_each(tiny_config, tiny_processor):
    torch.manual_seed(0)
    dataset = ScenesDataset("validation", 6, 32)
    text = format_example_retrievals(COTSModel(tiny_config), dataset, tiny_processor, 24)
    queries = [row for row in text.splitlines() if row.startswith('  "')]
    found = [row for row in text.splitlines() if "validation-0" in row]
    assert len(queries) == 3 and len(found) == 9
    assert queries[0] == f'  "{dataset[0]["captions"][0]}"'
    for query, rows in zip((0, 2, 5), (found[:3], found[3:6], found[6:]), strict=True):
        assert all(("<-" in row) == (f"validation-{query:05d}" in row) for row in rows)


def test_videos_are_called_videos_and_fewer_than_three_are_enough(tiny_config, tiny_processor):
    metrics = {f"eval_{side}_recall_at_{k}": 10.0 for side in ("i2t", "t2i") for k in (1, 5, 10)}
    metrics |= {"eval_i2t_median_rank": 2.0, "eval_t2i_median_rank": 3.5}
    text = format_recall(metrics, num_images=20, num_captions=20, unit="video")
    assert "among 20 videos and" in text and "  video to text:  R@1" in text and "  text to video:  R@1" in text
    model, dataset = COTSModel(tiny_config), ScenesDataset("validation", 2, 32)
    text = format_example_retrievals(model, dataset, tiny_processor, 24, unit="video")
    assert "among 2 held-out videos" in text and text.count("<- its own video") == 2
    assert text.count("validation-0") == 4
