"""Averages between two logs, and the warning of a collapsed model."""

import math

import pytest
import torch
from accelerate import Accelerator

from modeling_cots import COTSTrainingArguments
from modeling_cots.training import log as module
from modeling_cots.training.log import CollapseWatch, TrainingLog


@pytest.fixture
def watch(tmp_path) -> CollapseWatch:
    return CollapseWatch(COTSTrainingArguments(output_dir=str(tmp_path), kl_warmup_steps=10, use_cpu=True))


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


def line(*, mcl: float, kl: float, fill: float = 1.0) -> dict[str, float]:
    return {"loss_i2t": mcl / 2, "loss_t2i": mcl / 2, "loss_kl": kl, "queue_fill": fill}


CHANCE = 2 * math.log(1 + 100)


def test_reports_means_of_losses_sums_of_counts_and_the_last_state():
    log, accelerator = TrainingLog(), Accelerator(cpu=True)
    for value, kept in ((1.0, 3), (2.0, 1)):
        log.add_losses({"loss_i2t": torch.tensor(value), "loss_kl": torch.tensor(10 * value)})
        log.add_counts(kept=torch.tensor(kept), readable=torch.tensor(4), skipped_images=torch.tensor(1))
        log.set_latest(filter_threshold=torch.tensor(-math.inf), queue_fill=value / 2)
    assert log.drain(accelerator) == {
        "loss_i2t": 1.5,
        "loss_kl": 15.0,
        "kept_fraction": 0.5,
        "filter_threshold": -1.0,
        "queue_fill": 1.0,
        "skipped_images": 2,
    }
    assert log.drain(accelerator) == {}
    log.add_losses({"loss_i2t": torch.tensor(4.0)})
    log.add_counts(kept=torch.tensor(4), readable=torch.tensor(4), skipped_images=torch.tensor(1))
    log.set_latest(filter_threshold=torch.tensor(0.25), queue_fill=1.0)
    later = log.drain(accelerator, skipped_before=2)
    assert (later["loss_i2t"], later["filter_threshold"], later["skipped_images"]) == (4.0, 0.25, 3)


def test_warns_once_of_flat_rows(watch, warnings):
    for step in range(20, 30):
        watch.check(line(mcl=CHANCE, kl=1e-5), step, 100)
    assert len(warnings) == 1
    assert "collapsed" in warnings[0] and "kl_warmup_steps" in warnings[0]


@pytest.mark.parametrize(
    "logs",
    [
        line(mcl=0.9 * CHANCE, kl=1e-5),  # learning, the directions agree
        line(mcl=CHANCE, kl=0.1),  # not learning yet, but not flat
        line(mcl=CHANCE, kl=1e-5, fill=0.5),  # the first steps of any fresh model
    ],
)
def test_does_not_warn_of_a_model_that_has_not_collapsed(watch, warnings, logs):
    for step in range(20, 30):
        watch.check(logs, step, 100)
    assert warnings == []


def test_waits_for_the_warm_up_and_for_several_logs_in_a_row(watch, warnings):
    flat, fine = line(mcl=CHANCE, kl=1e-5), line(mcl=0.8 * CHANCE, kl=0.2)
    for step in range(10):
        watch.check(flat, step, 100)
    for logs in (flat, flat, fine, flat, flat):
        watch.check(logs, 20, 100)
    assert warnings == []
    watch.check(flat, 20, 100)
    assert len(warnings) == 1


@pytest.mark.parametrize("num_before", range(7))
def test_goes_on_from_the_history_of_a_run(watch, warnings, num_before):
    """Stopped after any line, the warning comes at the sixth, or has come and does not come again."""
    flat, fine = line(mcl=CHANCE, kl=1e-5), line(mcl=0.8 * CHANCE, kl=0.2)
    lines = [{**logs, "step": 20 + number} for number, logs in enumerate([flat, flat, fine, flat, flat, flat, flat])]
    watch.num_flat_logs = 2  # of an earlier run
    watch.restore([*lines[:num_before], {"eval_recall_sum": 1.0, "step": 26}], 100)
    assert warnings == []
    for logs in lines[num_before:]:
        watch.check(logs, logs["step"], 100)
    assert [message.split(":")[0] for message in warnings] == (["Step 25"] if num_before < 6 else [])
