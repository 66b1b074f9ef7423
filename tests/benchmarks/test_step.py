"""The benchmark of the training step runs, and says what it says of all rows; its ratios mean nothing at this size."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_cots import modeling_cots_pretraining


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import step

    yield step
    del sys.modules["step"], sys.modules["side_by_side"]


def test_measures_every_row_and_leaves_the_package_as_it_was(step):
    limit = modeling_cots_pretraining.MAX_JOINED_POSITIONS
    rows = list(step.measure("cpu", quick=True))
    optimizations = {"views", "optim", "update", "texts", "dvae", "compile", "recompute"}
    assert {entry["id"] for entry in rows} == {"3a", "3b", "3c", "4", *optimizations}
    for entry in rows:
        assert set(entry) == {"id", "title", "ratio", "goal", "note"}
        assert (entry["ratio"] is None) == (entry["id"] in ("3b", "compile"))
        assert entry["ratio"] is None or entry["ratio"] > 0
    assert modeling_cots_pretraining.MAX_JOINED_POSITIONS == limit


def test_pairs_a_second_are_the_batch_over_the_time_of_a_step(step, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    cached, on_line = step.speed_rows("cuda", step.Sizes(batch=128), whole=0.4, cached=0.2)
    assert (cached["id"], cached["ratio"], cached["goal"]) == ("3b", 640, ">= 625 on an H200")
    assert (on_line["id"], on_line["ratio"], on_line["goal"]) == ("3b", 320, ">= 494 on an H200")
    assert cached["note"].startswith("a GPU: 12 layers of 768, 384 pixels, 128 pairs")


def test_too_little_memory_halves_the_batch_until_it_fits(step, monkeypatch):
    tried = []

    def rows_of(device, sizes):
        tried.append(sizes.batch)
        if sizes.batch > limit:
            raise torch.cuda.OutOfMemoryError("too little")
        return [sizes.describe()]

    monkeypatch.setattr(step, "choose_sizes", lambda *_: step.Sizes(batch=256))
    limit = 64
    (described,) = step.of_largest_batch(rows_of, "cpu", quick=True)
    assert tried == [256, 128, 64] and described.endswith("64 pairs, as 128 did not fit")
    limit = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step.of_largest_batch(rows_of, "cpu", quick=True)


def test_passes_that_do_not_fit_leave_the_package_as_it_was(step, monkeypatch):
    limit = modeling_cots_pretraining.MAX_JOINED_POSITIONS

    def speed(joined, *_):
        modeling_cots_pretraining.MAX_JOINED_POSITIONS = 2**40
        raise torch.cuda.OutOfMemoryError("too little")

    monkeypatch.setattr(step, "speed", speed)
    sizes = step.choose_sizes("cpu", quick=True)
    batch = {name: torch.ones(1, 2) for name in ("bool_masked_pos", "masked_input_ids", "attention_mask")}
    holder = SimpleNamespace(trainer=SimpleNamespace(model=None), batch=batch)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step.pass_rows("cpu", sizes, holder)
    assert modeling_cots_pretraining.MAX_JOINED_POSITIONS == limit
