"""Averages between two logs, and the warning of a collapsed model."""

import math

import pytest
from accelerate import Accelerator
from objective_results import make_result

from modeling_cots.training.log import TrainingLog, collapse_warning

CHANCE = 2 * math.log(1 + 100)


def line(*, mcl: float, kl: float, fill: float = 1.0, step: int = 20) -> dict[str, float]:
    return {"loss_i2t": mcl / 2, "loss_t2i": mcl / 2, "loss_kl": kl, "queue_fill": fill, "step": step}


FLAT, FINE = line(mcl=CHANCE, kl=1e-5), line(mcl=0.8 * CHANCE, kl=0.2)


def warnings_of(lines: list[dict], kl_warmup_steps: int = 10) -> list[str | None]:
    """What is said at each line of a run."""
    return [collapse_warning(lines[: number + 1], 100, kl_warmup_steps) for number in range(len(lines))]


def test_reports_means_of_losses_sums_of_counts_and_the_last_state():
    log, accelerator = TrainingLog(), Accelerator(cpu=True)
    readable = [True, True, True, True, False]
    for value, kept in ((1.0, 3), (2.0, 1)):
        keep_mask = [number < kept for number in range(5)]
        losses = {"loss_i2t": value, "loss_kl": 10 * value}
        log.add(make_result(losses=losses, scores=[0.0] * 5, valid=readable, keep_mask=keep_mask), value / 2)
    assert log.drain(accelerator) == {
        "loss_i2t": 1.5,
        "loss_kl": 15.0,
        "kept_fraction": 0.5,
        "filter_threshold": -1.0,
        "queue_fill": 1.0,
        "skipped_images": 2,
    }
    assert log.drain(accelerator) == {}
    log.add(make_result(losses={"loss_i2t": 4.0}, scores=[0.0] * 5, valid=readable, threshold=0.25), 1.0)
    later = log.drain(accelerator, skipped_before=2)
    assert (later["loss_i2t"], later["filter_threshold"], later["skipped_images"]) == (4.0, 0.25, 3)


def test_rows_that_only_fill_up_a_batch_are_not_counted_as_skipped():
    log, result = TrainingLog(), make_result(losses={"loss_i2t": 1.0}, valid=[True, True, False, False])
    result.batch.pair_ids[3] = -1
    log.add(result, 1.0)
    assert log.drain(Accelerator(cpu=True))["skipped_images"] == 1


def test_what_was_collected_survives_a_restart():
    log, restarted = TrainingLog(), TrainingLog()
    log.add(make_result(losses={"loss_i2t": 1.0}), 0.5)
    restarted.load_state_dict({**log.state_dict(), "loss": log.state_dict()["num_batches"]})
    for each in (log, restarted):
        each.add(make_result(losses={"loss_i2t": 2.0}), 0.75)
    assert log.drain(Accelerator(cpu=True)) == restarted.drain(Accelerator(cpu=True))


def test_warns_once_of_flat_distributions():
    said = [warning for warning in warnings_of([FLAT] * 10) if warning is not None]
    assert len(said) == 1
    assert "collapsed" in said[0] and "kl_warmup_steps" in said[0]


@pytest.mark.parametrize(
    "logs",
    [
        line(mcl=0.9 * CHANCE, kl=1e-5),  # learning, the directions agree
        line(mcl=CHANCE, kl=0.1),  # not learning yet, but not flat
        line(mcl=CHANCE, kl=1e-5, fill=0.5),  # the first steps of any fresh model
    ],
    ids=["learning", "not flat", "not full"],
)
def test_does_not_warn_of_a_model_that_has_not_collapsed(logs):
    assert warnings_of([logs] * 10) == [None] * 10


def test_waits_for_the_warm_up_and_for_several_logs_in_a_row():
    early = [line(mcl=CHANCE, kl=1e-5, step=step) for step in range(10)]
    *before, last = warnings_of([*early, FLAT, FLAT, FINE, FLAT, FLAT, FLAT])
    assert before == [None] * len(before) and last is not None


def test_other_lines_of_the_history_do_not_count():
    evaluation = {"eval_recall_sum": 1.0, "step": 26}
    said = warnings_of([FLAT, evaluation, FLAT, evaluation, FLAT, evaluation, {"step": 27}])
    assert [warning is not None for warning in said] == [False, False, False, False, True, False, False]
