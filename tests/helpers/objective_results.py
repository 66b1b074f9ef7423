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
    numbers = torch.arange(len(scores))
    batch = GlobalBatch(embeds, embeds, numbers, numbers, valid)
    losses = {name: torch.tensor(value) for name, value in (losses or {}).items()}
    return ObjectiveOutput(
        loss=torch.zeros(()),
        losses=losses,
        logits=(),
        chance_loss=torch.tensor(9.0),
        batch=batch,
        local=slice(0, len(scores)),
        key_drift=torch.tensor(math.nan),
        scores=scores,
        keep_mask=keep_mask,
        filter_threshold=torch.tensor(threshold),
        model_output=None,
    )
