"""Adaptive momentum filter (COTS, CVPR 2022, section 5 of the supplement): which pairs of a batch look like noise.

The score of a pair is the similarity of its two momentum embeddings. A pair is noise if it scores far below the last
N_Q pairs: more than k standard deviations below their mean (the paper), or, as pairs without relation score
(`mixture_threshold`). Not here: the queue of scores (`feature_queue.py`), and losses without the dropped pairs
(`losses.py`).
"""

import torch

NUM_EM_STEPS = 50
NUM_PLACES = 1_001  # between the two means, at which the components are compared
SMALLEST_STD = 1e-4  # of scores, which lie between -1 and 1


def filter_threshold(queue_scores: torch.Tensor, num_std: float) -> torch.Tensor:
    """mean - `num_std` * (population) standard deviation of the (N_Q,) scores of a full queue; () float32."""
    scores = queue_scores.float()
    # Relative to the first score: equal scores (a collapsed model) must give exactly that score, not one rounded up.
    centered = scores - scores[0]
    return scores[0] + (centered.mean() - num_std * centered.std(correction=0))


def mixture_threshold(queue_scores: torch.Tensor, unpaired_scores: torch.Tensor) -> torch.Tensor:
    """
    Where a pair is as likely to be noise as not, by a mixture of two normal distributions. Not in the paper.

    Noisy-label work (DivideMix, Li et al., ICLR 2020) fits both components to the losses. Here one is known: a caption
    that does not belong to its image scores as the captions of other images do. Only its share and the other
    component are fitted (EM), so that clean data, which have no second component, are not cut in two.

    Args:
        queue_scores: (N_Q,) scores of a full queue.
        unpaired_scores: (N,) scores of images with captions of other pairs.

    Returns the threshold, () float32: -inf where noise is nowhere the likelier of the two.
    """
    scores, noise = queue_scores.float(), _Normal.fit(unpaired_scores.float())
    clean, noise_share = (
        _Normal(scores.median(), scores.std(correction=0).clamp(min=SMALLEST_STD)),
        scores.new_tensor(0.5),
    )
    for _ in range(NUM_EM_STEPS):
        is_noise = torch.sigmoid(_log_odds(scores, noise, clean, noise_share))
        noise_share = is_noise.mean().clamp(1e-4, 1 - 1e-4)
        clean = _Normal.fit(scores, 1 - is_noise)
    places = noise.mean + (clean.mean - noise.mean) * torch.linspace(0, 1, NUM_PLACES, device=scores.device)
    is_likelier = (_log_odds(places, noise, clean, noise_share) > 0) & (clean.mean > noise.mean)
    return torch.where(is_likelier, places, -torch.inf).amax()


class _Normal:
    """A normal distribution: mean and standard deviation, () each."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.mean, self.std = mean, std

    @classmethod
    def fit(cls, values: torch.Tensor, weights: torch.Tensor | None = None) -> "_Normal":
        weights = torch.ones_like(values) if weights is None else weights
        total = weights.sum().clamp(min=1e-6)
        mean = (weights * values).sum() / total
        variance = (weights * (values - mean).square()).sum() / total
        return cls(mean, variance.sqrt().clamp(min=SMALLEST_STD))

    def log_density(self, values: torch.Tensor) -> torch.Tensor:
        """Up to a constant."""
        return -0.5 * ((values - self.mean) / self.std).square() - self.std.log()


def _log_odds(values: torch.Tensor, noise: _Normal, clean: _Normal, noise_share: torch.Tensor) -> torch.Tensor:
    return noise.log_density(values) - clean.log_density(values) + torch.logit(noise_share)


def keep_above(scores: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """Which of the (B,) scores do not lie below the threshold, (B,) bool."""
    # Not `>=`: a NaN score is kept, so that the loss of a diverged model is NaN and not 0.
    return ~(scores.float() < threshold)
