"""What a script prints at its end."""

from modeling_cots import ScenesDataset
from modeling_cots.evaluation.embedding import ExampleRetrievals
from modeling_cots.evaluation.report import format_example_retrievals, format_recall, format_report


def test_recall_stands_beside_chance():
    metrics = {f"eval_{side}_recall_at_{k}": 10.0 * k for side in ("i2t", "t2i") for k in (1, 5, 10)}
    metrics |= {"eval_i2t_median_rank": 2.0, "eval_t2i_median_rank": 3.5, "eval_i2t_mean_rank": 7.0}
    metrics["eval_t2i_mean_rank"] = 9.0
    text = format_recall(metrics, num_images=1000, num_captions=5000)
    assert "1,000 images and 5,000 captions" in text
    # One of 1,000 images is right: k / 1,000. Five of 5,000 captions are: 1 - C(4995, k) / C(5000, k).
    assert "R@1  10.0 (0.1)   R@5  50.0 (0.5)   R@10 100.0 (1.0)   median rank 3.5" in text
    assert text.count("(0.1)") == 2 and text.count("(1.0)") == 2


def test_each_caption_stands_above_what_it_finds():
    dataset = ScenesDataset("validation", 6, 32)
    examples = ExampleRetrievals(1234, [0, 5], [[0, 3, 1], [2, 5, 4]])
    told = [dataset[number]["captions"][0] for number in range(6)]
    assert format_example_retrievals(examples, dataset).splitlines() == [
        "What the model finds for a few captions among 1,234 held-out images:",
        f'  "{told[0]}"',
        f'    1. validation-00000: "{told[0]}"  <- its own image',
        f'    2. validation-00003: "{told[3]}"',
        f'    3. validation-00001: "{told[1]}"',
        f'  "{told[5]}"',
        f'    1. validation-00002: "{told[2]}"',
        f'    2. validation-00005: "{told[5]}"  <- its own image',
        f'    3. validation-00004: "{told[4]}"',
    ]


def test_videos_are_called_videos_and_chance_is_that_of_a_fold():
    metrics = {f"eval_{side}_recall_at_{k}": 10.0 for side in ("i2t", "t2i") for k in (1, 5, 10)}
    metrics |= {"eval_i2t_median_rank": 2.0, "eval_t2i_median_rank": 3.5, "eval_i2t_mean_rank": 7.0}
    metrics["eval_t2i_mean_rank"] = 9.0
    dataset, examples = ScenesDataset("validation", 20, 32), ExampleRetrievals(20, [1], [[1]])
    text = format_report(metrics, examples, dataset, modality="video")
    assert "among 20 videos and 100 captions" in text
    assert "  video to text:  R@1" in text and "  text to video:  R@1" in text
    assert "among 20 held-out videos" in text and text.count("<- its own video") == 1
    assert "among 4 images and 20 captions" in format_report(metrics, examples, dataset, num_folds=5)
