"""Texts encoded beside others of their length against texts encoded one at a time."""

import pytest
import torch

from modeling_cots import COTSModel
from modeling_cots.evaluation import text_encoding
from modeling_cots.evaluation.text_encoding import batches_by_length, encode_texts


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


def random_texts(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 99, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def test_equals_one_text_at_a_time_in_the_order_given(model, monkeypatch):
    monkeypatch.setattr(text_encoding, "TOKENS_AT_A_TIME_ON_CPU", 20)
    texts = random_texts([3, 17, 4, 30, 3, 9, 8, 2, 17])
    shapes = []
    model.text_model.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    embeds = encode_texts(model, texts)
    assert [tuple(shape) for shape in shapes] == [(1, 30), (1, 17), (1, 17), (2, 9), (4, 4)]
    expected = torch.cat([model.encode_text(text.unsqueeze(0)) for text in texts])
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)


def test_no_text_gives_no_embedding(model):
    assert encode_texts(model, []).shape == (0, 16)


@pytest.mark.parametrize("limit", [1, 10, 64, 10_000])
def test_batches_hold_every_text_once_and_no_more_tokens_than_allowed(limit):
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(batches_by_length(lengths, limit))
    assert sorted(row for rows in batches for row in rows) == list(range(200))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= limit
    longest = [max(lengths[row] for row in rows) for rows in batches]
    assert longest == sorted(longest, reverse=True)


def test_little_is_padding():
    """Of captions as long as those of everyday photographs, at most a tenth; padded to the longest it is over half."""
    lengths = (2 + torch.randn(4096, generator=torch.Generator().manual_seed(0)).mul(4).add(12).clamp(3, 34)).int()
    lengths = lengths.tolist()
    padded = sum(
        len(rows) * max(lengths[row] for row in rows)
        for rows in batches_by_length(lengths, text_encoding.TOKENS_AT_A_TIME)
    )
    assert padded < 1.1 * sum(lengths)
    assert len(lengths) * max(lengths) > 1.9 * sum(lengths)
