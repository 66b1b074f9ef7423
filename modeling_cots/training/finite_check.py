"""`FiniteCheck`: refuses an optimizer step whose losses or gradients are not finite, or whose data cannot be read.

It runs after the backward passes of a step and before the weights move, with one copy to the host, and decides alike
on every process. `StepSnapshot` undoes the step; saving the run is the trainer's business.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object

from ..data.items import decode_name
from ..data.skip_report import and_more
from ..method.feature_queue import PairQueue

MIN_IMAGES = 1_000
MAX_REPORTED = 10


class NonFiniteLossError(FloatingPointError):
    """A loss, or the gradient, became infinite or NaN; the message says which, at which step and for which samples."""


class UnreadableDataError(ValueError):
    """More images than `max_skipped_fraction` cannot be read; the message names some."""


@dataclass
class _Batch:
    """What is kept of one batch of this process until its step is checked, on the device."""

    losses: dict[str, torch.Tensor]
    logits_are_finite: torch.Tensor  # (B,) bool, the contrastive logits of each pair
    valid: torch.Tensor  # (B,) bool
    pair_ids: torch.Tensor  # (B,)
    names: torch.Tensor | None  # (B, 120) uint8


class FiniteCheck:
    """
    Watches the batches of one optimizer step.

    Args:
        max_skipped_fraction: Share of unreadable images, among at least 1,000 in a row, beyond which a run stops.
    """

    def __init__(self, max_skipped_fraction: float):
        self.max_skipped_fraction = max_skipped_fraction
        self._batches: list[_Batch] = []
        self._num_seen = self._num_skipped = 0
        self._skipped_names: list[str] = []

    def begin_step(self) -> None:
        """Forget the batches of the last step."""
        self._batches = []

    def add(self, losses: dict[str, torch.Tensor], logits: tuple[torch.Tensor, ...], inputs: dict) -> None:
        """
        Note a batch of this process.

        Args:
            losses: Its terms, () each.
            logits: Contrastive logits (B, 1 + C), of both directions.
            inputs: Has `valid` (B,), `pair_ids` (B,) and, if known, `names` (B, 120).
        """
        finite = torch.stack([direction.detach().isfinite() for direction in logits]).all(dim=0)
        own, all_candidates = finite[:, 0], finite.all(dim=1)  # a sample's bad key is a candidate of all others, too
        finite = torch.where(own.all(), all_candidates, own)
        losses = {name: loss.detach() for name, loss in losses.items()}
        self._batches.append(_Batch(losses, finite, inputs["valid"], inputs["pair_ids"], inputs.get("names")))

    def check(self, accelerator, step: int, grad_norm: torch.Tensor | float | None) -> None:
        """
        Check the step. `grad_norm` is `None` where gradients may overflow (a scaler of float16 skips such steps).

        Raises [`NonFiniteLossError`] and [`UnreadableDataError`], on every process or on none.
        """
        if not self._batches:
            return
        counts = self._counts(grad_norm)
        names = list(counts)
        totals = accelerator.reduce(torch.stack([counts[name].float() for name in names]), reduction="sum").tolist()
        totals = dict(zip(names, (int(total) for total in totals), strict=True))
        num_seen, num_skipped = totals.pop("num_seen"), totals.pop("num_skipped")
        terms = [name for name, count in totals.items() if count > 0]
        if terms:
            self._stop_for_losses(terms, step)
        self._watch_skipped(num_seen, num_skipped, step)

    def _counts(self, grad_norm) -> dict[str, torch.Tensor]:
        """Batches of this process whose term is not finite, by term, and its images seen and skipped: () each."""

        terms = self._batches[0].losses
        counts = {name: _total(~batch.losses[name].isfinite() for batch in self._batches) for name in terms}
        if grad_norm is not None:
            device = self._batches[0].valid.device
            counts["gradient"] = ~torch.as_tensor(grad_norm, device=device).detach().isfinite()
        counts["num_seen"] = _total((batch.pair_ids >= 0).sum() for batch in self._batches)
        counts["num_skipped"] = _total((~batch.valid & (batch.pair_ids >= 0)).sum() for batch in self._batches)
        return counts

    def _stop_for_losses(self, terms: list[str], step: int) -> None:
        losses = [item for batch in self._batches for item in batch.losses.items()]
        values = {name: float(loss) for name, loss in losses if not loss.isfinite()}
        local = [
            label
            for batch in self._batches
            if not all(loss.isfinite() for loss in batch.losses.values()) or terms == ["gradient"]
            for label in _labels(batch, ~batch.logits_are_finite if not batch.logits_are_finite.all() else batch.valid)
        ]
        gathered = gather_object([(values, local)])
        shown = [_describe_term(name, [part[0].get(name) for part in gathered]) for name in terms]
        labels = [label for _, part in gathered for label in part]
        raise NonFiniteLossError(
            f"Step {step}: {', '.join(shown)}. Samples with which it happened: {and_more(labels, MAX_REPORTED)}."
        )

    def _watch_skipped(self, num_seen: int, num_skipped: int, step: int) -> None:
        """Counts are of all processes, and so is the decision; names are gathered only for the message."""
        self._num_seen += num_seen
        self._num_skipped += num_skipped
        if num_skipped > 0 and len(self._skipped_names) < MAX_REPORTED:
            self._skipped_names += [name for b in self._batches for name in _labels(b, ~b.valid & (b.pair_ids >= 0))]
        if self._num_seen < MIN_IMAGES:
            return
        if self._num_skipped > self.max_skipped_fraction * self._num_seen:
            names = and_more(gather_object(self._skipped_names), MAX_REPORTED)
            raise UnreadableDataError(
                f"Step {step}: {self._num_skipped:,} of the last {self._num_seen:,} images could not be read, which "
                f"is more than max_skipped_fraction={self.max_skipped_fraction:g} allows: {names}. Look whether the "
                "storage is still there and the files are whole, or allow more."
            )
        self._num_seen = self._num_skipped = 0
        self._skipped_names = []


def _total(counts: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(counts)).sum()


def _labels(batch: _Batch, rows: torch.Tensor) -> list[str]:
    """Name and id of some rows of a batch."""
    chosen = rows.nonzero().flatten()
    ids = batch.pair_ids[chosen].tolist()
    if batch.names is None:
        return [str(pair_id) for pair_id in ids]
    names = [decode_name(name) for name in batch.names[chosen].cpu()]
    return [f"{name} (pair {pair_id})" for name, pair_id in zip(names, ids, strict=True)]


def _describe_term(name: str, values: list[float | None]) -> str:
    bad = [value for value in values if value is not None]
    return f"{name} is {bad[0]}" if bad else f"the {name} is not finite"


class StepSnapshot:
    """
    What an optimizer step changes before the weights move, as it was when the step began: the queue, the generators
    and the logs since the last line. Putting it back undoes the step.
    """

    def __init__(self, queue: PairQueue, device: torch.device):
        self.queue, self.device = queue, device
        self._generators = None

    def take_generators(self) -> None:
        """Remember the random number generators alone."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self._generators = random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device

    def take(self, **extras) -> None:
        """Remember the queue, and values that `put_back` returns."""
        self._queue = {name: value.clone() for name, value in self.queue.state_dict().items()}
        self._extras = extras

    def put_back(self) -> dict:
        """Restore the queue and the generators."""
        self.queue.load_state_dict(self._queue)
        random.setstate(self._generators[0])
        np.random.set_state(self._generators[1])
        torch.set_rng_state(self._generators[2])
        if self._generators[3] is not None:
            torch.cuda.set_rng_state(self._generators[3], self.device)
        return self._extras
