"""What `COTSTrainer` reports beside the loss: averages between two logs, and a warning when a model collapses."""

import math

import torch

from .objective import ObjectiveOutput

LOWEST_COSINE = -1.0
# A line of logs is flat below this KL loss and above this share of the contrastive losses' chance level.
FLAT_KL, CHANCE_SHARE = 1e-3, 0.98
COLLAPSE_PATIENCE = 3


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

    def add(self, result: ObjectiveOutput, queue_fill: float) -> None:
        """
        Note the objective of one batch.

        Losses are reported as means over batches and processes, counts as sums over the global batches (they are equal
        on every process), and of the filter's threshold and the queue's fill the last value.
        """
        valid, is_real = result.batch.valid, result.batch.pair_ids >= 0
        counts = {
            "kept": result.keep_mask.sum(),
            "readable": valid.sum(),
            "skipped_images": (~valid & is_real).sum(),
        }
        for name, loss in result.losses.items():
            self._collected[f"sum.{name}"] = self._collected.get(f"sum.{name}", 0.0) + loss.detach()
        for name, count in counts.items():
            self._collected[f"total.{name}"] = self._collected.get(f"total.{name}", 0) + count
        self._num_batches += 1
        self._latest = {"filter_threshold": result.filter_threshold, "queue_fill": queue_fill}

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


def chance_loss(num_candidates: int) -> float:
    """What the two contrastive losses sum to where all distributions are uniform over 1 + `num_candidates` classes."""
    return 2 * math.log(1 + num_candidates)


def collapse_warning(logs: list[dict[str, float]], num_candidates: int, kl_warmup_steps: int) -> str | None:
    """
    What to say of a model that has found the cheap solution of the KL alignment: flat distributions.

    Both distributions uniform make the KL loss zero while each contrastive loss stands at its chance level,
    ln(1 + N_Q); a model that got there does not come back. Lines count once the queue is full and the warm-up of KL is
    over, and `COLLAPSE_PATIENCE` flat ones in a row are needed, as every fresh model begins flat.

    Args:
        logs: Lines of logs of the whole run, in order, with their `step`.
        num_candidates: N_Q, negatives of a pair.
        kl_warmup_steps: Of the run.

    Returns the warning where the last line is the first to call for it, else `None`.
    """
    if not logs or "loss_i2t" not in logs[-1]:
        return None
    chance, num_flat = chance_loss(num_candidates), 0
    lines = [entry for entry in logs if "loss_i2t" in entry]
    for index, entry in enumerate(lines):
        if entry["queue_fill"] < 1 or entry["step"] < kl_warmup_steps:
            continue
        contrastive = entry["loss_i2t"] + entry["loss_t2i"]
        is_flat = contrastive >= CHANCE_SHARE * chance and entry["loss_kl"] < FLAT_KL
        num_flat = num_flat + 1 if is_flat else 0
        if num_flat == COLLAPSE_PATIENCE:
            if index < len(lines) - 1:
                return None  # it has been said
            return (
                f"Step {entry['step']}: the model seems to have collapsed. loss_kl is {entry['loss_kl']:.1e}, and the "
                f"two contrastive losses sum to {contrastive:.2f}, where chance is {chance:.2f}: all pairs look alike "
                "to it. Start again with a larger kl_warmup_steps or a smaller kl_weight, a longer warm-up of the "
                "learning rate, or pre-trained encoders."
            )
    return None
