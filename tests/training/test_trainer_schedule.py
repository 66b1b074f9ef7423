"""The schedule of the paper: any warm-up, the full rate for the first epochs, then linearly to zero."""

import pytest
import torch


def shares_of(make_trainer, num_steps: int, **arguments) -> list[float]:
    """Share of the full learning rate at each step of a run of `num_steps` steps."""
    trainer = make_trainer(**{"max_steps": -1, "num_train_epochs": 10, **arguments})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = trainer.create_scheduler(num_steps, optimizer)
    (factor,) = schedule.lr_lambdas
    return [factor(step) for step in range(num_steps + 1)]


def test_warm_up_hold_and_decay_step_by_step(make_trainer):
    shares = shares_of(make_trainer, 10, warmup_steps=2, lr_hold_epochs=5)
    assert shares == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


@pytest.mark.parametrize(("warmup", "hold"), [(0, 0.1), (0, 10), (0, 99), (4, 2), (10, 0.1)])
def test_it_rises_once_falls_once_and_stays_between_0_and_1(make_trainer, warmup, hold):
    shares = shares_of(make_trainer, 10, warmup_steps=warmup, lr_hold_epochs=hold)[:-1]
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 <= min(shares) and max(shares) <= 1


def test_epochs_are_counted_in_steps_of_the_run(make_trainer):
    """Whatever the batch and the accumulation: half of the epochs are half of the steps."""
    shares = shares_of(make_trainer, 40, num_train_epochs=4, lr_hold_epochs=2, gradient_accumulation_steps=2)
    assert [shares[step] == 1 for step in (0, 20, 21)] == [True, True, False]
    steps_per_epoch = 3  # 24 scenes by 8
    by_steps = shares_of(make_trainer, 4 * steps_per_epoch, max_steps=3, lr_hold_epochs=1)
    assert by_steps[steps_per_epoch] == 1 > by_steps[steps_per_epoch + 1]
