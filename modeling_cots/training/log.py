"""What `COTSTrainer` reports beside the loss: averages and counts between two lines of training logs."""

import torch

from ..method.feature_queue import PairQueue
from .objective import ObjectiveOutput

LOWEST_COSINE = -1.0


class TrainingLog:
    """
    Collects tensors on the device between two logs; nothing is copied to the host before `drain`.

    All that has to survive a restart is one flat dictionary: `sum.NAME` of every loss, `total.NAME` of every count.
    """

    def __init__(self):
        self._clear()

    def _clear(self) -> None:
        self._collected: dict[str, torch.Tensor] = {}
        self._num_batches = 0
        self._latest: dict[str, torch.Tensor | float] = {}

    def add(self, result: ObjectiveOutput, queue: PairQueue) -> None:
        """
        Note the objective of one batch.

        Losses are reported as means over batches and processes, and counts as sums over the global batches (they are
        equal on every process). Of the filter's threshold and of the queue (its fill, the number and the drift of its
        fresh keys) the last value is reported.
        """
        valid, is_real = result.batch.valid, result.batch.pair_ids >= 0
        counts = {
            "kept": result.keep_mask.sum(),
            "readable": valid.sum(),
            "skipped_images": (~valid & is_real).sum(),
        }
        for name, loss in {**result.losses, "chance_loss": result.chance_loss}.items():
            self._collected[f"sum.{name}"] = self._collected.get(f"sum.{name}", 0.0) + loss.detach()
        for name, count in counts.items():
            self._collected[f"total.{name}"] = self._collected.get(f"total.{name}", 0) + count
        self._num_batches += 1
        self._latest = {
            "filter_threshold": result.filter_threshold,
            "queue_fill": queue.fill,
            "fresh_keys": queue.fresh_keys.num_fresh.clone(),
            "key_drift": queue.fresh_keys.drift.clone(),
        }

    def _parts(self, kind: str) -> dict[str, torch.Tensor]:
        prefix = f"{kind}."
        return {key.removeprefix(prefix): value for key, value in self._collected.items() if key.startswith(prefix)}

    def drain(self, accelerator, *, skipped_before: int = 0) -> dict[str, float]:
        """Everything since the last call, as Python numbers; all processes must call it together.

        `skipped_images` is the sum of a whole run, of which `skipped_before` have been reported.
        """
        if self._num_batches == 0:
            return {}
        sums = self._parts("sum")
        means = torch.stack([value / self._num_batches for value in sums.values()])
        means = accelerator.reduce(means, reduction="mean").tolist()
        logs = dict(zip(sums, means, strict=True))
        counts = {name: int(value) for name, value in self._parts("total").items()}
        logs["kept_fraction"] = counts["kept"] / max(1, counts["readable"])
        # An idle filter has the threshold -inf, which JSON cannot hold; no cosine lies below -1 either.
        logs["filter_threshold"] = max(LOWEST_COSINE, float(self._latest["filter_threshold"]))
        logs["queue_fill"] = self._latest["queue_fill"]
        if (drift := float(self._latest["key_drift"])) >= 0:  # else it has not been measured
            logs["fresh_keys"], logs["key_drift"] = int(self._latest["fresh_keys"]), drift
        logs["skipped_images"] = skipped_before + counts["skipped_images"]
        self._clear()
        return logs

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of what this process has collected since the last log; last values come anew before the next one."""
        state = {**self._collected, "num_batches": torch.tensor(self._num_batches)}
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave; other keys are left alone."""
        self._clear()
        self._collected = {key: value.clone() for key, value in state.items() if key.startswith(("sum.", "total."))}
        self._num_batches = int(state["num_batches"])
