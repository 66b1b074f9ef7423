"""`run_by_length`: text encoders run the captions of a batch in groups of similar length, with less padding.

A batch of training is padded to its longest caption. On a CPU, with a text encoder as large as that of images, padding
is an eighth of a step. The result is the same but for rounding, and for what dropout draws; the order of the data does
not change. A GPU would lose by more and smaller calls what it gains.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from .frozen_layers import replaced

NUM_GROUPS = 4
MIN_SAVED = 256  # tokens; below, further calls cost more than they save


@contextmanager
def run_by_length(encoders: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, text encoders run captions by length; elsewhere, as in an export, they are what they were."""
    with ExitStack() as stack:
        for encoder in encoders:
            stack.enter_context(replaced(encoder, ByLength(encoder)))
        yield


class ByLength:
    """
    The `forward` of a text encoder, for as many captions as it is called with.

    Args:
        encoder: Whose `forward` runs, as it is now.
    """

    def __init__(self, encoder: nn.Module):
        self.run = self.__wrapped__ = encoder.forward  # wrapped for those who ask for its arguments

    def __call__(self, input_ids=None, attention_mask=None, **kwargs):
        """What the encoder gives; of groups `last_hidden_state` alone, 0 where a caption has no tokens."""
        groups = group_by_length(input_ids, attention_mask, kwargs)
        if groups is None:
            return self.run(input_ids, attention_mask=attention_mask, **kwargs)
        given = {"attention_mask": attention_mask, **kwargs}
        outputs = []
        for rows, length in groups:
            part = {name: each[rows, :length] if _is_tensor(each) else each for name, each in given.items()}
            states = self.run(input_ids[rows, :length], **part).last_hidden_state
            outputs.append(F.pad(states, (0, 0, 0, input_ids.shape[1] - length)))
        order = torch.cat([rows for rows, _ in groups])
        return BaseModelOutput(last_hidden_state=torch.cat(outputs)[order.argsort()])


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def group_by_length(input_ids, attention_mask, others: dict) -> list[tuple[torch.Tensor, int]] | None:
    """
    The rows of each group and the length of its longest caption; `None` where a batch has to run whole,
    as when captions are padded on the left.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): Of a tokenizer.
        others (`dict`): Further arguments of the encoder, with tensors of this shape alone.
    """
    if input_ids is None or attention_mask is None:
        return None
    tensors = [attention_mask, *filter(_is_tensor, others.values())]
    is_padded_left = bool((attention_mask[..., :-1] < attention_mask[..., 1:]).any())
    wants_layers = others.get("output_hidden_states") or others.get("output_attentions")
    if is_padded_left or wants_layers or any(each.shape != input_ids.shape for each in tensors):
        return None
    lengths, order = attention_mask.sum(1).sort(stable=True)
    chunks = zip(order.chunk(NUM_GROUPS), lengths.chunk(NUM_GROUPS), strict=True)
    groups = [(rows, max(1, int(ascending[-1]))) for rows, ascending in chunks]
    saved = input_ids.numel() - sum(len(rows) * length for rows, length in groups)
    return groups if saved >= MIN_SAVED else None
