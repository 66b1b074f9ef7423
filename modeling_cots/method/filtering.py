"""Adaptive momentum filter (COTS, CVPR 2022, section 5 of the supplement): which pairs of a batch look like noise.

The score of a pair is the similarity of its two momentum embeddings. A pair is noise if it scores far below the last
N_Q pairs. Not here: the queue of scores (`feature_queue.py`), and losses without the dropped pairs (`losses.py`).
"""

import torch


def filter_threshold(queue_scores: torch.Tensor, num_std: float) -> torch.Tensor:
    """mean - `num_std` * (population) standard deviation of the (N_Q,) scores of a full queue; () float32."""
    scores = queue_scores.float()
    # Relative to the first score: equal scores (a collapsed model) must give exactly that score, not one rounded up.
    centered = scores - scores[0]
    return scores[0] + (centered.mean() - num_std * centered.std(correction=0))


def adaptive_momentum_filter(
    scores: torch.Tensor, queue_scores: torch.Tensor | None, num_std: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the pairs that do not score below the threshold.

    Args:
        scores: (B,), momentum similarity g_i^v . g_i^l of every pair.
        queue_scores: (N_Q,) earlier scores, or None while the queue is not full: then every pair is kept.
        num_std: k, the number of standard deviations below the mean at which noise begins.

    Returns:
        keep_mask (B,) bool, and the threshold () float32, which is -inf while the filter is idle.
    """
    if queue_scores is None:
        threshold = torch.full((), float("-inf"), device=scores.device)
    else:
        threshold = filter_threshold(queue_scores, num_std)
    # Not `>=`: a NaN score is kept, so that the loss of a diverged model is NaN and not 0.
    return ~(scores.float() < threshold), threshold
