"""`PairQueue`: the two paired queues of COTS (CVPR 2022, instance level), with the scores of the filter.

Entry j of every buffer comes from the same pair. One counter keeps them aligned, and modulo arithmetic lets batches
of any size wrap around queues of any size (the paper's fine-tuning: 48 into 1,444). How many of its keys are fresh
enough to be candidates: `fresh_keys.py`.
"""

import torch
from torch import nn

from .fresh_keys import FreshKeys
from .global_batch import GlobalBatch


class PairQueue(nn.Module):
    """
    The last `size` momentum embeddings of images and texts, their similarity scores, pair ids and caption ids.

    Args:
        size (`int`): N_Q, the number of pairs.
        embed_dim (`int`): d, the length of an embedding.

    Raises `ValueError` for a size below 1.
    """

    def __init__(self, size: int, embed_dim: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"A queue needs room for at least 1 pair, got a size of {size}.")
        self.size = size
        self.num_pushed = 0
        self.register_buffer("image_embeds", torch.zeros(size, embed_dim))
        self.register_buffer("text_embeds", torch.zeros(size, embed_dim))
        self.register_buffer("scores", torch.zeros(size))
        self.register_buffer("pair_ids", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("caption_ids", torch.full((size,), -1, dtype=torch.int64))
        self.fresh_keys = FreshKeys()

    @property
    def is_full(self) -> bool:
        """Whether every entry has been written."""
        return self.num_pushed >= self.size

    @property
    def fill(self) -> float:
        """Share of the entries that have been written, 0 to 1."""
        return min(1.0, self.num_pushed / self.size)

    @property
    def filled(self) -> torch.Tensor:
        """(size,) bool: the entries that have been written."""
        return torch.arange(self.size, device=self.scores.device) < self.num_pushed

    @property
    def age(self) -> torch.Tensor:
        """(size,) int64: how many pairs have been pushed after each entry; of one not written, no meaning."""
        return (self.num_pushed - 1 - torch.arange(self.size, device=self.scores.device)) % self.size

    @property
    def unpaired_scores(self) -> torch.Tensor:
        """(size,) similarities of each image with the caption of the next entry: what unrelated pairs score."""
        return (self.image_embeds * self.text_embeds.roll(1, dims=0)).sum(dim=-1)

    @torch.no_grad()
    def push(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        scores: torch.Tensor,
        pair_ids: torch.Tensor,
        caption_ids: torch.Tensor | None = None,
    ) -> None:
        """Write B pairs over the oldest entries: embeddings (B, d), scores (B,), pair ids (B,), caption ids (B,).

        Of a batch larger than the queue the last `size` pairs stay, as if pushed one by one.
        """
        num_pairs = len(pair_ids)
        first = max(0, num_pairs - self.size)
        position = torch.arange(self.num_pushed + first, self.num_pushed + num_pairs, device=self.scores.device)
        position = position % self.size
        self.image_embeds[position] = image_embeds[first:].to(self.image_embeds.dtype)
        self.text_embeds[position] = text_embeds[first:].to(self.text_embeds.dtype)
        self.scores[position] = scores[first:].to(self.scores.dtype)
        self.pair_ids[position] = pair_ids[first:]
        self.caption_ids[position] = -1 if caption_ids is None else caption_ids[first:]
        self.num_pushed += num_pairs

    def candidates(self) -> GlobalBatch:
        """Copies of the queue's entries: it is written in place before a backward pass reads them."""
        return GlobalBatch(
            image_embeds=self.image_embeds.clone(),
            text_embeds=self.text_embeds.clone(),
            pair_ids=self.pair_ids.clone(),
            caption_ids=self.caption_ids.clone(),
            valid=self.filled,
        )

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.num_pushed)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.num_pushed = int(state)
