"""Masked patches and words: their share, their shape, and what they never touch."""

import pytest
import torch
from collator_items import TEXT, draw_image, grid_collator, item
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

# Masks


def largest_blocks(masks: torch.Tensor) -> torch.Tensor:
    """(N,) area of the largest all-masked rectangle of each of the masks (N, rows, columns), by trying every size."""
    largest = torch.zeros(len(masks))
    for height in range(1, masks.shape[1] + 1):
        for width in range(1, masks.shape[2] + 1):
            share = F.avg_pool2d(masks.float()[:, None], (height, width), stride=1)
            is_there = (share == 1).flatten(1).any(dim=1)
            largest = torch.where(is_there, largest.clamp_min(height * width), largest)
    return largest


def image_masks(tokenizer, grid: tuple[int, int], num_masks: int, ratio: float = 0.4) -> torch.Tensor:
    collate = grid_collator(tokenizer, grid, image_mask_ratio=ratio, mask_texts=False)
    return collate([item(i, image=draw_image(0, 2, 2), seed=i) for i in range(num_masks)])["bool_masked_pos"]


@given(
    grid=st.tuples(st.integers(2, 16), st.integers(2, 16)),
    ratio=st.floats(0, 0.9),
    first_seed=st.integers(0, 2**63 - 4),
)
@settings(max_examples=40, deadline=None)
def test_no_mask_covers_more_than_its_ratio(tiny_tokenizer, grid, ratio, first_seed):
    collate = grid_collator(tiny_tokenizer, grid, image_mask_ratio=ratio, mask_texts=False)
    items = [item(i, image=draw_image(0, 2, 2), seed=first_seed + i) for i in range(4)]
    masks = collate(items)["bool_masked_pos"]
    assert masks.shape == (4, grid[0] * grid[1])
    assert masks.sum(dim=1).max() <= round(ratio * grid[0] * grid[1])


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (14, 14), (12, 7)])
@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.6])
def test_masks_cover_their_ratio_but_for_a_few_patches(tiny_tokenizer, grid, ratio):
    target = round(ratio * grid[0] * grid[1])
    covered = image_masks(tiny_tokenizer, grid, 50, ratio).sum(dim=1)
    assert covered.float().mean() >= 0.97 * target
    assert covered.min() >= 0.8 * target


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (12, 7), (7, 12)])
def test_masks_are_blocks(tiny_tokenizer, grid):
    """And not as many patches at random; a tall grid tells rows from columns."""
    masks = image_masks(tiny_tokenizer, grid, 50)
    generator = torch.Generator().manual_seed(0)
    scattered = torch.stack([mask[torch.randperm(len(mask), generator=generator)] for mask in masks])
    blocks, rest = (largest_blocks(each.unflatten(1, grid)).mean() for each in (masks, scattered))
    assert blocks > 2 * rest


def test_blocks_have_the_least_size_of_beit(tiny_tokenizer):
    """16 patches on its grid of 14 x 14, but for the rounding of both sides (14 at worst, as 2 x 7)."""
    masks = image_masks(tiny_tokenizer, (14, 14), 200, ratio=20 / 196)
    assert largest_blocks(masks.unflatten(1, (14, 14))).min() >= 14


def test_every_patch_can_be_masked_and_flipped_grids_equally_often(tiny_tokenizer):
    often = image_masks(tiny_tokenizer, (6, 6), 500).float().mean(dim=0).view(6, 6)
    assert often.min() > 0.05
    for flipped in (often.flip(0), often.flip(1)):
        assert (often - flipped).abs().max() < 5 * (2 * 0.25 / 500) ** 0.5  # five standard deviations at most


@given(captions=st.lists(TEXT, min_size=1, max_size=4), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 2**63 - 10))
@settings(max_examples=60, deadline=None)
def test_word_masks_spare_special_tokens_and_tell_the_truth(tiny_tokenizer, captions, ratio, seed):
    collate = grid_collator(tiny_tokenizer, (2, 2), text_mask_ratio=ratio, mask_images=False)
    items = [item(i, [caption], draw_image(0, 2, 2), seed=seed + i) for i, caption in enumerate(captions)]
    batch = collate(items)
    input_ids, targets, masked = batch["input_ids"], batch["text_targets"], batch["masked_input_ids"]
    predicted = targets != -100
    special = [tiny_tokenizer.cls_token_id, tiny_tokenizer.sep_token_id, tiny_tokenizer.pad_token_id]
    assert not (predicted & torch.isin(input_ids, torch.tensor(special))).any()
    assert torch.equal(targets[predicted], input_ids[predicted])
    assert torch.equal(masked[~predicted], input_ids[~predicted])


def test_words_are_corrupted_as_in_bert(tiny_tokenizer):
    """15 % of the tokens; of these 80 % become [MASK], 10 % any token and 10 % stay."""
    num_draws, num_pieces = 1500, 20
    items = [item(i, ["a e o s t " * 4], draw_image(0, 2, 2), seed=i) for i in range(num_draws)]
    batch = grid_collator(tiny_tokenizer, (2, 2), mask_images=False)(items)
    assert batch["input_ids"].shape == (num_draws, num_pieces + 2)
    predicted = batch["text_targets"] != -100
    now, before = batch["masked_input_ids"][predicted], batch["input_ids"][predicted]
    by_chance = 0.1 / len(tiny_tokenizer)  # a random piece may be [MASK], or the old one
    is_mask, is_same = now == tiny_tokenizer.mask_token_id, now == before
    for count, total, share in [
        (len(now), num_draws * num_pieces, 0.15),
        (is_mask.sum(), len(now), 0.8 + by_chance),
        (is_same.sum(), len(now), 0.1 + by_chance),
        ((~is_mask & ~is_same).sum(), len(now), 0.1 - 2 * by_chance),
    ]:
        assert abs(count - share * total) < 4 * (total * share * (1 - share)) ** 0.5
    often = predicted[:, 1 : 1 + num_pieces].float().mean(dim=0)
    assert (often - 0.15).abs().max() < 5 * (0.15 * 0.85 / num_draws) ** 0.5  # at every place alike
