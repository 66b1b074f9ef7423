"""COTS in CLIP_benchmark, which measures whatever model, transform and tokenizer its loaders return.

docs/benchmarks.md has the commands, and says how its recall differs from ours. The package is not needed here.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

from ..modeling_cots import COTSModel
from ..processing_cots import COTSProcessor

PADDING = -1  # no token has it, so that one tensor says which tokens count


class CLIPBenchmarkModel(nn.Module):
    """A [`COTSModel`] by the two calls that CLIP_benchmark makes."""

    def __init__(self, model: COTSModel):
        super().__init__()
        self.model = model

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit-length embeddings (B, d) of what the transform returned, stacked (B, 3, H, W)."""
        return self.model.encode_image(images)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unit-length embeddings (B, d) of what the tokenizer returned (B, L)."""
        return self.model.encode_text(tokens.clamp(min=0), (tokens != PADDING).long())


def load_clip_benchmark(
    path: str, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[CLIPBenchmarkModel, Callable, Callable]:
    """
    Load a COTS checkpoint as the loaders of CLIP_benchmark do.

    Args:
        path: A folder or a Hub id.
        device: Where the model goes.
        revision: Branch, tag or commit of a Hub id.

    Returns the model in evaluation mode, with `encode_image` and `encode_text`; the transform from a PIL image to
    pixels (3, H, W) float32; and the tokenizer from a string or a list of B strings to token ids (B, L) int64, which
    are padded by -1 and cut to the length that the model was trained with.
    """
    version = {"revision": revision or "main"}
    model = COTSModel.from_pretrained(path, **version)
    processor = COTSProcessor.from_pretrained(path, **version)
    # `partial`, not `lambda`: workers of a data loader that are spawned get the transform by pickling.
    return (
        CLIPBenchmarkModel(model).eval().to(device),
        functools.partial(_transform, processor),
        functools.partial(_tokenize, processor),
    )


def _transform(processor: COTSProcessor, image) -> torch.Tensor:
    return processor(images=[image], return_tensors="pt")["pixel_values"][0]


def _tokenize(processor: COTSProcessor, texts: str | list[str]) -> torch.Tensor:
    texts = [texts] if isinstance(texts, str) else list(texts)
    inputs = processor(text=texts, truncation=True, padding=True, return_tensors="pt")
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, PADDING)
