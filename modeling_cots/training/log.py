"""What `COTSTrainer` reports beside the loss: averages between two logs, and a warning when a model collapses."""

import math
from collections import defaultdict

import torch
from transformers.utils import logging

from .arguments import COTSTrainingArguments

logger = logging.get_logger(__name__)

LOWEST_COSINE = -1.0


class TrainingLog:
    """Collects tensors on the device between two logs; nothing is copied to the host before `drain`."""

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, torch.Tensor] = defaultdict(float)
        self._num_batches = 0
        self._totals: dict[str, torch.Tensor] = defaultdict(int)
        self._latest: dict[str, torch.Tensor | float] = {}

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """Losses of one batch of this process; their mean over batches and processes is reported."""
        for name, value in losses.items():
            self._sums[name] += value.detach()
        self._num_batches += 1

    def add_counts(self, **counts: torch.Tensor) -> None:
        """Counts over the global batch, equal on every process; reported as sums."""
        for name, value in counts.items():
            self._totals[name] += value

    def set_latest(self, **values) -> None:
        """State of which the last value is reported."""
        self._latest.update(values)

    def drain(self, accelerator, *, skipped_before: int = 0) -> dict[str, float]:
        """Everything since the last call, as Python numbers; all processes must call it together.

        `skipped_images` is the sum of a whole run, of which `skipped_before` have been reported.
        """
        if self._num_batches == 0:
            return {}
        means = torch.stack([value / self._num_batches for value in self._sums.values()])
        means = accelerator.reduce(means, reduction="mean").tolist()
        logs = dict(zip(self._sums, means, strict=True))
        counts = {name: int(value) for name, value in self._totals.items()}
        logs["kept_fraction"] = counts["kept"] / max(1, counts["readable"])
        # An idle filter has the threshold -inf, which JSON cannot hold; no cosine lies below -1 either.
        logs["filter_threshold"] = max(LOWEST_COSINE, float(self._latest["filter_threshold"]))
        logs["queue_fill"] = self._latest["queue_fill"]
        logs["skipped_images"] = skipped_before + counts["skipped_images"]
        self._clear()
        return logs

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of what has been collected since the last log, by this process."""
        parts = {"sum": self._sums, "total": self._totals}  # the latest values are set anew before the next log
        state = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        state["num_batches"] = self._num_batches
        return {name: torch.as_tensor(value).detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._clear()
        parts = {"sum": self._sums, "total": self._totals}
        for key, value in state.items():
            part, _, name = key.partition(".")
            if part in parts:
                parts[part][name] = value.clone()
        self._num_batches = int(state["num_batches"])


def _chance(num_candidates: int) -> float:
    """What the two contrastive losses sum to where all rows are uniform."""
    return 2 * math.log(1 + num_candidates)


class CollapseWatch:
    """
    Warns, once, when training has found the cheap solution of the KL alignment: flat rows.

    Both rows uniform make the KL loss zero while each contrastive loss stands at its chance level, ln(1 + N_Q); a
    model that got there does not come back. The look is taken once the queue is full and the warm-ups are over, and
    has to hold for `PATIENCE` logs in a row, as every fresh model begins flat.
    """

    PATIENCE = 3
    FLAT_KL = 1e-3
    CHANCE_SHARE = 0.98

    def __init__(self, args: COTSTrainingArguments):
        self.args = args
        self.num_flat_logs = 0
        self.has_warned = False

    def restore(self, log_history: list[dict], num_candidates: int) -> None:
        """Go on as after the lines of logs of a run; what has been said then is not said again."""
        self.num_flat_logs, self.has_warned = 0, False
        for logs in log_history:
            if "loss_i2t" in logs:
                self._look(logs, logs["step"], num_candidates)

    def _look(self, logs: dict[str, float], step: int, num_candidates: int) -> bool:
        """Whether it is to be said at this line."""
        if self.has_warned or logs["queue_fill"] < 1 or step < self.args.kl_warmup_steps:
            return False
        at_chance = logs["loss_i2t"] + logs["loss_t2i"] >= self.CHANCE_SHARE * _chance(num_candidates)
        self.num_flat_logs = self.num_flat_logs + 1 if at_chance and logs["loss_kl"] < self.FLAT_KL else 0
        self.has_warned = self.num_flat_logs >= self.PATIENCE
        return self.has_warned

    def check(self, logs: dict[str, float], step: int, num_candidates: int) -> None:
        """Look at one line of logs at optimizer step `step`, of rows with `num_candidates` negatives."""
        if logs and self._look(logs, step, num_candidates):
            logger.warning(
                f"Step {step}: the model seems to have collapsed. loss_kl is {logs['loss_kl']:.1e}, and the two "
                f"contrastive losses sum to {logs['loss_i2t'] + logs['loss_t2i']:.2f}, where chance is "
                f"{_chance(num_candidates):.2f}: all pairs look alike to it. Start again with a larger "
                "kl_warmup_steps or a smaller kl_weight, a longer warm-up of the learning rate, or pre-trained "
                "encoders."
            )
