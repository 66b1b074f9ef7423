"""Averages between two lines of training logs."""

import torch
from accelerate import Accelerator
from objective_results import make_result

from modeling_cots.method.feature_queue import PairQueue
from modeling_cots.training.log import TrainingLog


def queue_with(num_pairs: int) -> PairQueue:
    queue = PairQueue(4, 2)
    queue.push(torch.zeros(num_pairs, 2), torch.zeros(num_pairs, 2), torch.zeros(num_pairs), torch.arange(num_pairs))
    return queue


def test_reports_means_of_losses_sums_of_counts_and_the_last_state():
    log, accelerator = TrainingLog(), Accelerator(cpu=True)
    readable = [True, True, True, True, False]
    for value, kept in ((1.0, 3), (2.0, 1)):
        keep_mask = [number < kept for number in range(5)]
        losses = {"loss_i2t": value, "loss_kl": 10 * value}
        log.add(
            make_result(losses=losses, scores=[0.0] * 5, valid=readable, keep_mask=keep_mask),
            queue_with(int(2 * value)),
        )
    assert log.drain(accelerator) == {
        "loss_i2t": 1.5,
        "loss_kl": 15.0,
        "chance_loss": 9.0,
        "kept_fraction": 0.5,
        "filter_threshold": -1.0,
        "queue_fill": 1.0,
        "skipped_images": 2,
    }
    assert log.drain(accelerator) == {}
    log.add(make_result(losses={"loss_i2t": 4.0}, scores=[0.0] * 5, valid=readable, threshold=0.25), queue_with(4))
    later = log.drain(accelerator, skipped_before=2)
    assert (later["loss_i2t"], later["filter_threshold"], later["skipped_images"]) == (4.0, 0.25, 3)


def test_rows_that_only_fill_up_a_batch_are_not_counted_as_skipped():
    log, result = TrainingLog(), make_result(losses={"loss_i2t": 1.0}, valid=[True, True, False, False])
    result.batch.pair_ids[3] = -1
    log.add(result, queue_with(1))
    assert log.drain(Accelerator(cpu=True))["skipped_images"] == 1


def test_what_was_collected_survives_a_restart():
    log, restarted = TrainingLog(), TrainingLog()
    log.add(make_result(losses={"loss_i2t": 1.0}), queue_with(2))
    restarted.load_state_dict({**log.state_dict(), "loss": log.state_dict()["num_batches"]})
    for each in (log, restarted):
        each.add(make_result(losses={"loss_i2t": 2.0}), queue_with(3))
    assert log.drain(Accelerator(cpu=True)) == restarted.drain(Accelerator(cpu=True))


def test_reports_the_drift_of_keys_once_it_has_been_measured():
    log, queue = TrainingLog(), queue_with(4)
    log.add(make_result(losses={"loss_i2t": 1.0}), queue)
    assert "key_drift" not in log.drain(Accelerator(cpu=True))
    queue.fresh_keys.update_(torch.tensor(0.0625), 0.1, 3, 4)
    log.add(make_result(losses={"loss_i2t": 1.0}), queue)
    queue.fresh_keys.update_(torch.tensor(5.0), 0.1, 3, 4)  # after the batch, as in training
    logged = log.drain(Accelerator(cpu=True))
    assert (logged["key_drift"], logged["fresh_keys"]) == (0.0625, 3)
