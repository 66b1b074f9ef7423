"""What the objective returns for a batch, without a model: for the tests of those that only read it."""

import math

import torch

from modeling_cots.method.global_batch import GlobalBatch
from modeling_cots.training.objective import ObjectiveOutput


def make_result(
    *,
    losses: dict[str, float] | None = None,
    scores: list[float] | None = None,
    keep_mask: list[bool] | None = None,
    valid: list[bool] | None = None,
    threshold: float = -math.inf,
) -> ObjectiveOutput:
    """A result of one process whose pairs have the given scores; all of them are valid and kept unless told."""
    scores = torch.zeros(4) if scores is None else torch.tensor(scores)
    valid = torch.ones(len(scores), dtype=torch.bool) if valid is None else torch.tensor(valid)
    keep_mask = valid.clone() if keep_mask is None else torch.tensor(keep_mask)
    embeds = torch.zeros(len(scores), 2)
    batch = GlobalBatch(embeds, embeds, torch.arange(len(scores)), valid, slice(0, len(scores)))
    losses = {name: torch.tensor(value) for name, value in (losses or {}).items()}
    return ObjectiveOutput(torch.zeros(()), losses, (), batch, scores, keep_mask, torch.tensor(threshold), None)
