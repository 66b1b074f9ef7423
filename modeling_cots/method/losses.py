"""The losses of COTS (Lu et al., CVPR 2022) as pure functions of tensors: instance, task and token level.

B pairs of this process, C candidates (the queue), d = embedding size. Logits come first and losses second: the
contrastive and the KL loss consume the same logits, so they cannot disagree. Everything is computed in float32, under
autocast too. Not here: the queue, the filter that chooses `keep_mask`, and the weights of the sum.

`num_kept` and `num_tokens` are the counts over the *global* batch divided by the number of processes, so that the
mean of the processes' gradients is the gradient of the mean over the global batch.
"""

import torch
from torch.nn import functional as F

from .global_batch import GlobalBatch

# Added up in a softmax this counts as nothing, and unlike -inf it stays finite in p * log p.
EXCLUDED_LOGIT = -1e9


def excluded_candidates(batch: GlobalBatch, candidates: GlobalBatch, equal_captions: bool = True) -> torch.Tensor:
    """Which candidates are no negatives of which pair: (B, C) bool.

    Entries of the queue that are not filled yet never count, nor do pairs of the same image, nor, with
    `equal_captions`, pairs of the same caption: the image of one is as good an answer to the caption as the other.
    """
    same_image = batch.pair_ids.unsqueeze(1) == candidates.pair_ids
    excluded = ~candidates.valid | same_image
    if equal_captions:
        is_known = candidates.caption_ids >= 0
        excluded |= (batch.caption_ids.unsqueeze(1) == candidates.caption_ids) & is_known
    return excluded


def queue_logits(
    query_embeds: torch.Tensor,
    positive_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    excluded: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Scores of every query's own pair (column 0) and of the candidates, (B, 1 + C) float32.

    COTS, instance level: [f_i . g_i, f_i . Q_1 ... f_i . Q_C] / tau, with the online embedding f of one encoder, the
    momentum embedding g of the other, and the other encoder's queue Q.

    Args:
        query_embeds: (B, d) online embeddings, unit length.
        positive_embeds: (B, d) momentum embeddings of the other encoder, unit length.
        candidate_embeds: (C, d) momentum embeddings of the other encoder, unit length.
        excluded: (B, C) bool, candidates that do not count.
        temperature: The similarities are divided by it.
    """
    with torch.autocast(query_embeds.device.type, enabled=False):
        query_embeds, positive_embeds = query_embeds.float(), positive_embeds.float()
        positives = (query_embeds * positive_embeds).sum(dim=1, keepdim=True)
        negatives = query_embeds @ candidate_embeds.float().t()
        negatives = negatives.masked_fill(excluded, EXCLUDED_LOGIT * temperature)
        return torch.cat([positives, negatives], dim=1) / temperature


def momentum_contrastive_loss(
    logits: torch.Tensor, keep_mask: torch.Tensor, num_kept: torch.Tensor | float
) -> torch.Tensor:
    """One direction of the contrastive loss: mean over the kept pairs of -log p_i[0], p_i = softmax of row i.

    COTS, instance level: L_I2T of the image-to-text logits, L_T2I of the text-to-image ones.

    Args:
        logits: (B, 1 + C), the pair itself in column 0.
        keep_mask: (B,) bool, pairs that the filter kept.
        num_kept: See the module.
    """
    losses = -F.log_softmax(logits.float(), dim=1)[:, 0]
    return _mean(losses, keep_mask, num_kept)


@torch.no_grad()
def chance_loss(logits: torch.Tensor) -> torch.Tensor:
    """What L_I2T + L_T2I would be if all distributions were uniform: 2 ln(1 + candidates that count), a mean ().

    Args:
        logits: (B, 1 + C) of either direction; the same candidates count in both.
    """
    num_classes = (logits > EXCLUDED_LOGIT / 2).sum(dim=1)
    return 2 * num_classes.clamp(min=1).float().log().mean()


def task_kl_loss(
    logits_i2t: torch.Tensor, logits_t2i: torch.Tensor, keep_mask: torch.Tensor, num_kept: torch.Tensor | float
) -> torch.Tensor:
    """Symmetric KL divergence of the two distributions of every kept pair, a scalar >= 0.

    COTS, task level: mean_i [KL(p_i^T2I || p_i^I2T) + KL(p_i^I2T || p_i^T2I)]. As the queues are paired, class j
    means the same pair in both. Gradients flow into both.

    Args:
        logits_i2t: (B, 1 + C), image queries.
        logits_t2i: (B, 1 + C), text queries.
        keep_mask: (B,) bool, pairs that the filter kept.
        num_kept: See the module.
    """
    log_i2t = F.log_softmax(logits_i2t.float(), dim=1)
    log_t2i = F.log_softmax(logits_t2i.float(), dim=1)
    # KL(p || q) + KL(q || p) = sum_j (p_j - q_j) (log p_j - log q_j)
    divergences = ((log_i2t.exp() - log_t2i.exp()) * (log_i2t - log_t2i)).sum(dim=1)
    return _mean(divergences, keep_mask, num_kept)


def masked_token_loss(
    logits: torch.Tensor, targets: torch.Tensor, keep_mask: torch.Tensor, num_tokens: torch.Tensor | float
) -> torch.Tensor:
    """Cross-entropy of the masked tokens of the kept pairs; images (CMVM) and texts (CMLM) share it.

    Args:
        logits: (M, V), one row for every masked token.
        targets: (M,) int64, its visual token or token.
        keep_mask: (M,) bool, tokens of pairs that the filter kept.
        num_tokens: See the module.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return _mean(losses, keep_mask, num_tokens)


def _mean(losses: torch.Tensor, keep_mask: torch.Tensor, count: torch.Tensor | float) -> torch.Tensor:
    # Nothing kept means 0 and not 0 / 0. The smallest count that is not 0 is one pair shared by all processes.
    total = torch.where(keep_mask, losses, 0.0).sum()
    count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    return total / torch.where(count > 0, count, 1.0)
