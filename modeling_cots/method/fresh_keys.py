"""`FreshKeys`: how many keys of the queue are fresh enough to be candidates. Not in the paper.

A query is attracted by its own key and repelled by the candidates. Keys that earlier weights made lie, on average,
where the embeddings were, and the query's own key where they are. The difference of the two means repels all queries
alike, away from where the embeddings were: whatever movement there is grows, the next keys follow, and all embeddings
run from the queue together. The loss falls by that and nothing is learned. While weights move fast, keys that are one
step old are enough.

So the drift of keys is measured in the unit of the loss: how much lower a query's logits are with queued keys than
with the fresh keys of its own batch, on average over queries and keys (`mean_drift`). The newest `num_fresh` keys of
the queue count. They become more by one batch with every batch whose drift is small, and half as many with any other.
Their share of the queue decides all else:

* share 0: in-batch contrast. The momentum is 0, so that the keys are those of the weights as they are, and the
  gradient flows through the keys of the batch too.
* share 1: the paper. The whole queue counts, the momentum is m, and no gradient flows through keys.
* between: m * share, and a gradient through the keys of the batch times 1 - share.
"""

import torch
from torch import nn

SMOOTHING = 0.9  # of the drift from batch to batch: one batch of 50 tells it to about 0.05


class FreshKeys(nn.Module):
    """
    The drift of the queue's newest keys, and how many of them count. Everything stays on the device.

    Buffers: `drift`, (), in nats, -1 before the first measurement; `num_fresh`, () int64.
    """

    drift: torch.Tensor
    num_fresh: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drift", torch.tensor(-1.0))
        self.register_buffer("num_fresh", torch.tensor(0))

    def share(self, queue_size: int) -> torch.Tensor:
        """The share of the queue that counts, (), 0 to 1."""
        return self.num_fresh / queue_size

    def is_fresh(self, age: torch.Tensor) -> torch.Tensor:
        """Whether a key counts, by the number of pairs that were pushed after it; (N_Q,) bool."""
        return age < self.num_fresh

    def is_measured(self, age: torch.Tensor, batch_size: torch.Tensor | int) -> torch.Tensor:
        """The keys whose drift decides: those that count and one batch more, (N_Q,) bool."""
        return age < self.num_fresh + batch_size

    @torch.no_grad()
    def update_(self, drift: torch.Tensor, max_drift: float, num_pairs: int, queue_size: int) -> None:
        """
        After a batch of `num_pairs` pairs, whose `drift` () is NaN where it had nothing to compare.

        A drift that is not below `max_drift` halves the number of keys that count.
        """
        previous = self.drift
        smoothed = torch.where(previous < 0, drift, SMOOTHING * previous + (1 - SMOOTHING) * drift)
        is_known = ~drift.isnan()
        self.drift.copy_(torch.where(is_known, smoothed, previous))
        more = (self.num_fresh + num_pairs).clamp(max=queue_size)
        changed = torch.where(self.drift < max_drift, more, self.num_fresh // 2)
        self.num_fresh.copy_(torch.where(is_known, changed, self.num_fresh))


def pass_gradient(keys: torch.Tensor, embeds: torch.Tensor, weight: torch.Tensor | float) -> torch.Tensor:
    """
    The keys with their values as they are, and with `weight` times the gradient of the same pairs' online embeddings.

    Args:
        keys: (G, d) momentum embeddings.
        embeds: (G, d) online embeddings, with their graph.
    """
    return keys + weight * (embeds - embeds.detach()).to(keys.dtype)


def key_drift(
    queue_logits: torch.Tensor, fresh_logits: torch.Tensor, queue_counts: torch.Tensor, fresh_counts: torch.Tensor
) -> torch.Tensor:
    """
    Sums over the queries, from which `mean_drift` makes the drift: how much lower the logits of each query are with
    queued keys than with fresh ones, the variance of those with fresh ones, and the number of queries that have both.

    Args:
        queue_logits: (B, N_Q), queries and queued keys.
        fresh_logits: (B, G), the same queries and the keys of their own batch.
        queue_counts, fresh_counts: Of the same shapes, bool: negatives of the query, to be averaged over.

    Returns the three sums, (3,).
    """
    fresh = _row_means(fresh_logits, fresh_counts)
    variance = _row_means((fresh_logits - fresh.unsqueeze(1)).square(), fresh_counts)
    difference = fresh - _row_means(queue_logits, queue_counts)
    has_both = queue_counts.any(dim=1) & fresh_counts.any(dim=1)
    return torch.stack([torch.where(has_both, each, 0.0).sum() for each in (difference, variance, has_both.float())])


def mean_drift(sums: torch.Tensor) -> torch.Tensor:
    """
    The drift, (), of the sums of `key_drift` over all queries; NaN where there are none.

    In nats; where the logits of a query spread by less than one nat, as a model's do that tells nothing apart yet, in
    their standard deviations.
    """
    difference, variance, count = sums
    return (difference / count).abs() / (variance / count).sqrt().clamp(min=1e-6, max=1.0)


def _row_means(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return torch.where(counts, values, 0.0).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
