"""From hidden states to scores: the pure functions that `COTSModel` (CVPR 2022) puts between encoders and logits."""

import torch
from torch.nn import functional as F


def masked_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that `attention_mask` (B, L) keeps, of `hidden_states` (B, L, H): (B, H).

    The global text feature of COTS (supplement): all text tokens, padding excluded.
    """
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def frames_of(pixel_values_videos: torch.Tensor) -> torch.Tensor:
    """The frames of videos (B, T, 3, H, W), one after the other: (B * T, 3, H, W). Raises `ValueError` without any."""
    if pixel_values_videos.dim() != 5 or pixel_values_videos.shape[1] == 0:
        raise ValueError(
            "Videos must be (batch, frames, 3, height, width), with at least one frame; "
            f"got {tuple(pixel_values_videos.shape)}."
        )
    return pixel_values_videos.flatten(0, 1)


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """L2-normalise the rows of `features` (B, d) in float32, whatever precision the model runs in."""
    return F.normalize(features.float(), dim=-1)


def image_text_logits(image_embeds: torch.Tensor, text_embeds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Similarities (B, C) of unit-length embeddings (B, d) and (C, d) over the temperature, float32 under autocast."""
    with torch.autocast(image_embeds.device.type, enabled=False):
        return image_embeds @ text_embeds.t() / temperature


def image_text_contrastive_loss(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies of (B, B) logits, pairs on the diagonal."""
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_image.t(), targets)) / 2


__all__ = ["frames_of", "image_text_contrastive_loss", "image_text_logits", "masked_mean", "unit_length"]
