"""`encode_texts`: many texts at once, each beside others of its length.

Padded to the longest of a data set, captions are mostly padding. Not for training, whose batches are drawn at random
and whose text stream is a few per cent of a step.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence

# Padding included. A GPU wants many: as many as 7 images of 384 x 384 have patches. On a CPU what passes between the
# layers should stay in its cache, and few texts differ little in length (benchmarks/encode.py, row 2).
TOKENS_AT_A_TIME, TOKENS_AT_A_TIME_ON_CPU = 4096, 256


@torch.no_grad()
def encode_texts(model, texts: list[torch.Tensor]) -> torch.Tensor:
    """
    Embed C texts with a [`COTSModel`], those of like length together.

    Args:
        model: The model, in evaluation mode.
        texts: (L,) int64 each, the token ids of a text without padding; special tokens included.

    Returns unit-length embeddings (C, d) float32 on the CPU, in the order of the texts.
    """
    embeds = torch.empty(len(texts), model.config.projection_dim)
    pad_token_id = model.config.text_config.pad_token_id or 0
    tokens_at_a_time = TOKENS_AT_A_TIME_ON_CPU if model.device.type == "cpu" else TOKENS_AT_A_TIME
    for rows in batches_by_length([len(text) for text in texts], tokens_at_a_time):
        lengths = torch.tensor([len(texts[row]) for row in rows])
        input_ids = pad_sequence([texts[row] for row in rows], batch_first=True, padding_value=pad_token_id)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
        found = model.encode_text(input_ids.to(model.device), attention_mask.to(model.device))
        embeds[rows] = found.cpu()
    return embeds


def batches_by_length(lengths: list[int], tokens_at_a_time: int) -> Iterator[list[int]]:
    """Numbers of texts of like length, longest first; a batch holds so many tokens, padding included, or one text."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(rows):
        size = max(1, tokens_at_a_time // max(1, lengths[rows[start]]))
        yield rows[start : start + size]
        start += size
