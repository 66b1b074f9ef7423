"""`GlobalBatch`: momentum embeddings of pairs, to contrast against, to filter and to queue."""

from dataclasses import dataclass

import torch


@dataclass
class GlobalBatch:
    """
    G pairs: those that all processes have in their batches, or the entries of the queue.

    Args:
        image_embeds: (G, d) momentum embeddings of the images (or videos), unit length.
        text_embeds: (G, d) momentum embeddings of the captions, unit length.
        pair_ids: (G,) int64, equal for pairs that share an image; -1 for a row that only fills up a batch.
        caption_ids: (G,) int64, equal for pairs of equal captions; -1 where that is not known.
        valid: (G,) bool, False where the image could not be read, or the entry is not written.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    pair_ids: torch.Tensor
    caption_ids: torch.Tensor
    valid: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """(G,) momentum similarity score of every pair: s_i = g_i^v . g_i^l."""
        return (self.image_embeds * self.text_embeds).sum(dim=-1)

    def __getitem__(self, rows) -> "GlobalBatch":
        """Some of the pairs, by a slice, a mask or their numbers."""
        return GlobalBatch(**{name: value[rows] for name, value in vars(self).items()})

    def joined_with(self, other: "GlobalBatch") -> "GlobalBatch":
        """These pairs and then the other's."""
        return GlobalBatch(**{name: torch.cat([value, getattr(other, name)]) for name, value in vars(self).items()})
