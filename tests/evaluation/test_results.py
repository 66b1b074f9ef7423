"""What stands in results.json, and when a number may carry the name of a protocol."""

import json

import pytest

from modeling_cots.evaluation.results import (
    check_test_set,
    stated_zero_shot_protocol,
    write_results,
)
from modeling_cots.evaluation.retrieval_metrics import PROTOCOLS
from modeling_cots.hub.model_card import write_card_of_measured


class Captions(list):
    """A data set of items with as many captions as the numbers say."""

    def iter_captions(self):
        return iter(range(sum(self)))


def test_a_model_that_is_trained_here_is_not_zero_shot():
    assert stated_zero_shot_protocol(None, True) == stated_zero_shot_protocol("none", True) == "none"
    with pytest.raises(ValueError, match="'pretrained', but this run trains on the data set"):
        stated_zero_shot_protocol("pretrained", True)


def test_a_model_that_is_only_measured_needs_a_statement():
    for stated in ("pretrained", "fine-tuned-elsewhere", "none"):
        assert stated_zero_shot_protocol(stated, False) == stated
    for stated in (None, "zero-shot"):
        with pytest.raises(ValueError, match=f"one of pretrained, fine-tuned-elsewhere, none; got {stated!r}"):
            stated_zero_shot_protocol(stated, False)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_counts_of_a_protocol_are_checked_beforehand(protocol):
    num_images, num_texts = PROTOCOLS[protocol]
    share, rest = divmod(num_texts, num_images)
    check_test_set(Captions([share + 1] * rest + [share] * (num_images - rest)), protocol)
    for wrong in ([share] * (num_images - 1), [share] * num_images + [share + 1]):
        with pytest.raises(ValueError, match=f"{protocol} has"):
            check_test_set(Captions(wrong), protocol)
    check_test_set(Captions([1, 2]), None)


def test_what_is_written(tmp_path):
    path = tmp_path / "new" / "results.json"
    metrics = {"eval_t2v_recall_at_1": 12.5, "eval_recall_sum": 100.0, "epoch": 3.0}
    results = write_results(str(path), metrics, protocol="msrvtt-full", zero_shot_protocol="none", num_videos=2990)
    assert json.loads(path.read_text()) == results
    assert results == {
        "zero_shot_protocol": "none",
        "num_videos": 2990,
        "protocol": "msrvtt-full",
        "num_skipped": 0,
        "metrics": {"t2v_recall_at_1": 12.5, "recall_sum": 100.0},
    }


def test_a_test_set_with_holes_is_not_the_protocols(tmp_path):
    metrics = {"eval_recall_sum": 100.0, "eval_skipped_images": 2}
    results = write_results(str(tmp_path / "results.json"), metrics, protocol="msrvtt-1ka")
    assert results["protocol"] is None and results["num_skipped"] == 2
    assert results["note"] == "2 of the test set could not be read, so this is not msrvtt-1ka."
    assert results["metrics"] == {"recall_sum": 100.0}
    assert "note" not in write_results(str(tmp_path / "results.json"), metrics, protocol=None)


def measured(on: str, value: float, side: str = "i") -> dict:
    names = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank")
    metrics = {f"{way}_{name}": value for way in (f"{side}2t", f"t2{side}") for name in names}
    return {"measured_on": on, "protocol": None, "zero_shot_protocol": "pretrained", "metrics": metrics}


@pytest.mark.parametrize("modality, side", [("image", "i"), ("video", "v")])
def test_a_card_grows_by_what_is_measured_later_and_a_repeated_number_is_replaced(tmp_path, modality, side):
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nWritten by hand.\n")
    for on, value in (("a test", 1.0), ("b test", 2.0), ("a test", 3.5)):
        write_card_of_measured(str(model), str(model), measured(on, value, side), modality)
    text = (model / "README.md").read_text()
    assert text.count("## Measured later") == 1 and text.count("median rank") == 1 and "Written by hand." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        f"| {on} |  | pretrained | {way} | {value} | {value} | {value} | {float(value):g} |"
        for on, value in (("b test", "2.0"), ("a test", "3.5"))
        for way in (f"{modality} to text", f"text to {modality}")
    ]
    assert text.count("name: a test") == 1 and "value: 1.0" not in text


def test_a_checkpoint_without_a_card_gets_one(tmp_path):
    (tmp_path / "model").mkdir()
    write_card_of_measured(str(tmp_path), str(tmp_path / "model"), measured("a test", 1.0))
    assert "| a test |" in (tmp_path / "README.md").read_text()
