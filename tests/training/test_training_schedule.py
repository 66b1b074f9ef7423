"""The schedule of the paper: a warm-up of one's own, the full rate for the first epochs, then linearly to zero."""

import pytest

from modeling_cots.training.training_schedule import hold_then_decay, schedule_of


def test_warm_up_hold_and_decay_step_by_step():
    factor = hold_then_decay(10, num_warmup_steps=2, num_hold_steps=5)
    assert [factor(step) for step in range(11)] == [0, 0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]


@pytest.mark.parametrize(("warmup", "hold"), [(0, 0), (0, 10), (0, 99), (4, 2), (10, 0)])
def test_it_rises_once_falls_once_and_stays_between_0_and_1(warmup, hold):
    factors = [hold_then_decay(10, num_warmup_steps=warmup, num_hold_steps=hold)(step) for step in range(10)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 <= min(factors) and max(factors) <= 1


def test_epochs_are_counted_in_steps_of_the_run(make_trainer):
    """Whatever the batch and the accumulation: half of the epochs are half of the steps."""
    trainer = make_trainer(max_steps=-1, num_train_epochs=4, lr_hold_epochs=2, gradient_accumulation_steps=2)
    factor = schedule_of(trainer, 40)
    assert [factor(step) == 1 for step in (0, 20, 21)] == [True, True, False]
    by_steps = make_trainer(max_steps=3, lr_hold_epochs=1)
    steps_per_epoch = len(by_steps.get_train_dataloader())
    factor = schedule_of(by_steps, 4 * steps_per_epoch)
    assert factor(steps_per_epoch) == 1 > factor(steps_per_epoch + 1)
