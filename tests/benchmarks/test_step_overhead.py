"""The benchmark of the step's overhead: times add up, and the package is left as it was."""

import time

import pytest
import step_overhead

from modeling_cots import COTSTrainer
from modeling_cots.training import short_captions


def test_every_part_has_its_share_and_nothing_stays_timed():
    before = {name: getattr(owner, name) for parts in step_overhead.PARTS.values() for owner, name in parts}
    rows = list(step_overhead.measure("cpu", quick=True))
    shares = [entry for entry in rows if entry["id"] == "overhead"]
    *parts, ours = [entry["ratio"] for entry in shares]
    assert sum(parts) == pytest.approx(100) and min(parts) > 0 and 0 < ours < 100
    assert [entry["id"] for entry in rows[len(shares) :]] == ["copied", "copied", "lengths"]
    assert short_captions.NUM_GROUPS == 4
    assert before == {name: getattr(owner, name) for parts in step_overhead.PARTS.values() for owner, name in parts}


def test_time_in_an_inner_part_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    times = step_overhead.PartTimes()
    with times.part("outer"):
        now[0] += 1
        with times.part("inner"):
            now[0] += 10
        now[0] += 100
    now[0] += 1000
    with times.part("outer"):
        now[0] += 0.5
    assert times.seconds == {"outer": 101.5, "inner": 10}


def test_a_gpu_has_no_such_rows():
    assert [entry["ratio"] for entry in step_overhead.measure("cuda", quick=True)] == [None]


def test_the_recipe_is_the_quick_starts(tmp_path):
    trainer = step_overhead.build_trainer(str(tmp_path), 64)
    assert isinstance(trainer, COTSTrainer) and trainer.args.num_train_epochs == 12
    assert trainer.args.per_device_train_batch_size == 64 and trainer.args.learning_rate == pytest.approx(0.06 / 128)
