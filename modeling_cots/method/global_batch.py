"""`GlobalBatch`: momentum embeddings of the pairs of all processes, to contrast against, to filter and to queue."""

from dataclasses import dataclass

import torch


@dataclass
class GlobalBatch:
    """
    G pairs, B of which are this process's own; equal on every process but for `local`.

    Args:
        image_embeds: (G, d) momentum embeddings of the images (or videos), unit length.
        text_embeds: (G, d) momentum embeddings of the captions, unit length.
        pair_ids: (G,) int64, equal for pairs that share an image; -1 for a row that only fills up a batch.
        valid: (G,) bool, False where the image could not be read.
        local: The B rows of this process.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    pair_ids: torch.Tensor
    valid: torch.Tensor
    local: slice

    @property
    def scores(self) -> torch.Tensor:
        """(G,) momentum similarity score of every pair: s_i = g_i^v . g_i^l."""
        return (self.image_embeds * self.text_embeds).sum(dim=-1)
