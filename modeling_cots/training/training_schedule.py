"""The learning rate of COTS (CVPR 2022): "5e-5 for the first epochs, then linear decay over the rest"."""

import math
from collections.abc import Callable

from ..data.streaming.dataset import StreamingPairs


def schedule_of(trainer, num_training_steps: int) -> Callable[[int], float]:
    """Share of the full learning rate at a step of a trainer's run, whose arguments give warm-up and epochs."""
    args = trainer.args
    hold_share = args.lr_hold_epochs / _num_epochs(trainer, num_training_steps)
    return hold_then_decay(
        num_training_steps,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_hold_steps=round(hold_share * num_training_steps),
    )


def _num_epochs(trainer, num_training_steps: int) -> float:
    args = trainer.args
    if args.max_steps <= 0 or isinstance(trainer.train_dataset, StreamingPairs):
        return args.num_train_epochs  # of a stream, all steps together stand for so many
    batches = len(trainer.get_train_dataloader())
    return num_training_steps / max(1, math.ceil(batches / args.gradient_accumulation_steps))


def hold_then_decay(num_training_steps: int, *, num_warmup_steps: int, num_hold_steps: int) -> Callable[[int], float]:
    """Share of the full learning rate at a step: linear warm-up, constant until `num_hold_steps`, linear to zero."""
    decay_from = min(max(num_warmup_steps, num_hold_steps), num_training_steps)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        if step < decay_from:
            return 1.0
        return max(0.0, (num_training_steps - step) / max(1, num_training_steps - decay_from))

    return factor
