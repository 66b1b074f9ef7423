"""`encode_texts`: embedding many texts in batches of similar length.

Captions that are padded to the longest caption of a data set are mostly padding. Training does not use this: its
batches are drawn at random, and its text encoder takes a few percent of a step.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .retrieval_metrics import BAR_DELAY

# Tokens of a batch, padding included. A GPU needs many: 4,096 are about the patches of 7 images of 384 x 384. On a CPU
# the activations should stay in the cache, and a few texts need little padding (benchmarks/encode.py, row 2).
TOKENS_AT_A_TIME, TOKENS_AT_A_TIME_ON_CPU = 4096, 256


@torch.no_grad()
def encode_texts(
    model, texts: list[torch.Tensor], *, process_index: int = 0, num_processes: int = 1, progress: bool = False
) -> torch.Tensor:
    """
    Embed C texts with a [`COTSModel`], in batches of similar length.

    Args:
        model: The model, in evaluation mode.
        texts: (L,) int64 each, the token ids of a text without padding; special tokens included.
        process_index, num_processes: Of several processes with the same texts each embeds every `num_processes`-th
            batch; the embeddings of the other texts are 0, and the sum over the processes is what one process returns.
        progress: Whether to show a progress bar, if it takes more than a few seconds.

    Returns unit-length embeddings (C, d) float32 on the CPU, in the order of the texts.
    """
    embeds = torch.zeros(len(texts), model.config.projection_dim)
    pad_token_id = model.config.text_config.pad_token_id or 0
    tokens_at_a_time = TOKENS_AT_A_TIME_ON_CPU if model.device.type == "cpu" else TOKENS_AT_A_TIME
    batches = list(batches_by_length([len(text) for text in texts], tokens_at_a_time))[process_index::num_processes]
    for rows in tqdm(batches, desc="Embedding captions", disable=not progress, delay=BAR_DELAY):
        lengths = torch.tensor([len(texts[row]) for row in rows])
        input_ids = pad_sequence([texts[row] for row in rows], batch_first=True, padding_value=pad_token_id)
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)).long()
        found = model.encode_text(input_ids.to(model.device), attention_mask.to(model.device))
        embeds[rows] = found.cpu()
    return embeds


def batches_by_length(lengths: list[int], tokens_at_a_time: int) -> Iterator[list[int]]:
    """Positions in `lengths` by batch, longest text first; a batch has at most `tokens_at_a_time` padded tokens."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(rows):
        size = max(1, tokens_at_a_time // max(1, lengths[rows[start]]))
        yield rows[start : start + size]
        start += size
