"""The benchmark of the training step runs, and says what it says of all rows; its ratios mean nothing at this size."""

import sys
from pathlib import Path

import pytest

from modeling_cots import modeling_cots_pretraining


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import step

    yield step
    del sys.modules["step"], sys.modules["side_by_side"]


def test_measures_every_row_and_leaves_the_package_as_it_was(step):
    limit = modeling_cots_pretraining.MAX_JOINED_POSITIONS
    rows = step.measure("cpu", quick=True)
    assert {entry["id"] for entry in rows} == {"3a", "3c", "4", "views", "optim", "update", "texts", "compile"}
    for entry in rows:
        assert set(entry) == {"id", "title", "ratio", "goal", "note"}
        assert (entry["ratio"] is None) == (entry["id"] == "compile")
        assert entry["ratio"] is None or entry["ratio"] > 0
    assert modeling_cots_pretraining.MAX_JOINED_POSITIONS == limit
