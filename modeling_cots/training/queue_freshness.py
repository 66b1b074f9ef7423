"""`QueueFreshness`: how far the weights have moved away from the oldest keys of the queue, as a cosine."""

import torch
from torch.nn import functional as F

from .objective import COTSObjective, ObjectiveOutput

NUM_PAIRS = 16  # of each process, at the beginning of a batch
_INPUTS, _KEYS = "freshness.inputs.", "freshness.keys."


class QueueFreshness:
    """
    The mean cosine between queued keys and the embeddings that the momentum encoders give the same pairs now.

    Between two lines of training logs a few pairs are remembered. They are encoded again when they are the oldest of
    the queue, or at the next line if that comes first. 1 is a key as fresh as those of the batch.
    """

    def __init__(self, objective: COTSObjective):
        self.objective = objective
        self._clear()

    def _clear(self) -> None:
        self._inputs: dict[str, torch.Tensor] = {}
        self._keys: dict[str, torch.Tensor] = {}
        self._age = 0
        self._cosine: torch.Tensor | None = None

    def add(self, inputs: dict, result: ObjectiveOutput) -> None:
        """Note a batch of this process, whose objective is `result`, before its keys are queued."""
        num_pairs = len(result.batch.pair_ids)
        if self._cosine is not None:
            return
        if not self._keys:
            self._remember(inputs, result)
        elif self._age + num_pairs < self.objective.queue.size:
            self._age += num_pairs
        else:  # this batch overwrites them, or the next one
            self._cosine = self._measure()

    def _remember(self, inputs: dict, result: ObjectiveOutput) -> None:
        size = len(inputs["valid"])
        rows = slice(0, min(NUM_PAIRS, size))
        own = result.batch[result.local][rows]
        self._inputs = {
            name: value[rows].clone(memory_format=torch.contiguous_format)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.shape[:1] == (size,)
        }
        self._keys = {"image": own.image_embeds, "text": own.text_embeds}
        self._age = 0

    def _measure(self) -> torch.Tensor:
        """(), over the readable pairs; NaN where there are none."""
        image_embeds, text_embeds = self.objective.momentum_encode(self._inputs)
        valid = self._inputs["valid"].bool()
        cosines = F.cosine_similarity(self._keys["image"].float(), image_embeds.float())
        cosines = cosines + F.cosine_similarity(self._keys["text"].float(), text_embeds.float())
        return cosines[valid].mean() / 2

    def drain(self, accelerator) -> float | None:
        """The mean over the processes since the last call, `None` without a batch; all must call it together."""
        if not self._keys:
            return None
        cosine = self._measure() if self._cosine is None else self._cosine
        known = torch.stack([cosine.nan_to_num(), (~cosine.isnan()).float()])
        total, count = accelerator.reduce(known, reduction="sum").tolist()
        self._clear()
        return total / count if count else None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has to survive a restart, not copied: it is never written in place."""
        if not self._keys:
            return {}
        state = {f"{_INPUTS}{name}": value for name, value in self._inputs.items()}
        state.update({f"{_KEYS}{name}": value for name, value in self._keys.items()})
        state["freshness.age"] = torch.tensor(self._age)
        if self._cosine is not None:
            state["freshness.cosine"] = self._cosine
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave; other keys are left alone."""
        self._clear()
        for name, value in state.items():
            if name.startswith(_INPUTS):
                self._inputs[name.removeprefix(_INPUTS)] = value
            elif name.startswith(_KEYS):
                self._keys[name.removeprefix(_KEYS)] = value
        self._age = int(state.get("freshness.age", 0))
        self._cosine = state.get("freshness.cosine")
