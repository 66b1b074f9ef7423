"""The functions between hidden states and scores, each against a slow twin."""

import math

import pytest
import torch

from modeling_cots.modeling_cots import (
    frames_of,
    image_text_contrastive_loss,
    image_text_logits,
    masked_mean,
    unit_length,
)


def test_loss_equals_its_definition():
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.3], [1.5, -0.2, 0.7]])
    expected = 0.0
    for i in range(3):
        row, column = logits[i].tolist(), logits[:, i].tolist()
        for scores in (row, column):
            expected -= math.log(math.exp(scores[i]) / sum(math.exp(score) for score in scores)) / 6
    assert image_text_contrastive_loss(logits).item() == pytest.approx(expected, abs=1e-6)
    assert image_text_contrastive_loss(logits.t()).item() == pytest.approx(expected, abs=1e-6)


def test_loss_is_at_chance_on_equal_logits_and_zero_on_perfect_ones():
    assert image_text_contrastive_loss(torch.full((8, 8), 3.0)).item() == pytest.approx(math.log(8))
    assert image_text_contrastive_loss(100 * torch.eye(8)).item() == pytest.approx(0.0, abs=1e-6)


def test_masked_mean_equals_a_loop():
    hidden_states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]])
    result = masked_mean(hidden_states, attention_mask)
    for i in range(3):
        kept = [hidden_states[i, j] for j in range(5) if attention_mask[i, j]]
        torch.testing.assert_close(result[i], sum(kept) / len(kept))
    torch.testing.assert_close(masked_mean(hidden_states, None), masked_mean(hidden_states, torch.ones(3, 5)))
    torch.testing.assert_close(masked_mean(hidden_states, attention_mask.bool()), result)


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(1, 2, 4), torch.zeros(1, 2)).tolist() == [[0.0] * 4]


def test_frames_of_videos_come_one_after_the_other():
    videos = torch.arange(2 * 3 * 3 * 4 * 5).view(2, 3, 3, 4, 5)
    frames = frames_of(videos)
    assert frames.shape == (6, 3, 4, 5)
    assert all(torch.equal(frames[3 * b + t], videos[b, t]) for b in range(2) for t in range(3))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 0, 3, 8, 8), (1, 2, 2, 3, 8, 8)])
def test_what_is_no_batch_of_videos_is_refused(shape):
    with pytest.raises(ValueError, match=rf"batch, frames, 3, height, width.*got \({shape[0]}, "):
        frames_of(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unit_length_is_float32_and_points_the_same_way(dtype):
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    units = unit_length(features)
    assert units.dtype == torch.float32
    for unit, feature in zip(units.tolist(), features.float().tolist(), strict=True):
        norm = math.sqrt(sum(x * x for x in feature))
        assert unit == pytest.approx([x / norm for x in feature], abs=1e-6)


def test_logits_keep_their_digits_under_autocast():
    generator = torch.Generator().manual_seed(0)
    images, texts = (unit_length(torch.randn(3, 6, generator=generator)) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = image_text_logits(images, texts, 0.05)
    for i in range(3):
        for j in range(3):
            expected = sum(x * y for x, y in zip(images[i].tolist(), texts[j].tolist(), strict=True)) / 0.05
            assert logits[i, j].item() == pytest.approx(expected, abs=1e-4)
