"""Visual tokens: on the patch grid, from the raw image, by a codebook that stays frozen."""

import copy
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from modeling_cots.method.image_tokenizer import ImageTokenizer, digest_codebook, pool_by_area

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


@pytest.fixture(scope="module")
def tokenizer() -> ImageTokenizer:
    return ImageTokenizer.random(64, MEAN, STD)


def images(batch: int, height: int, width: int) -> torch.Tensor:
    """Smooth random images in [0, 1]."""
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(
    ("image_size", "patch_size"),
    [((64, 64), (16, 16)), ((48, 96), (16, 16)), ((32, 32), (8, 8)), ((64, 64), (32, 32)), ((28, 42), (14, 14))],
)
def test_token_grid_is_the_patch_grid(tokenizer, image_size, patch_size):
    ids = tokenizer(normalize(images(2, *image_size)), patch_size)
    assert ids.shape == (2, image_size[0] // patch_size[0] * (image_size[1] // patch_size[1]))
    assert ids.dtype == torch.int64


def test_a_patch_decides_about_the_token_at_its_place(tokenizer):
    """A change of one far corner of the image moves tokens near it only: rows and columns are not mixed up."""
    pixels = images(1, 256, 256)
    changed = pixels.clone()
    changed[:, :, :32, -32:] = 1 - changed[:, :, :32, -32:]
    moved = tokenizer(normalize(pixels), (32, 32)) != tokenizer(normalize(changed), (32, 32))
    moved = moved.view(8, 8)
    assert moved[0, 7]
    assert not moved[4:, :4].any()


def slow_tokens(tokenizer: ImageTokenizer, pooled: torch.Tensor) -> torch.Tensor:
    """The dVAE's mapping of [0, 1], then the best code at each place, one at a time, row by row."""
    scores = tokenizer.codebook.blocks(0.8 * pooled + 0.1)
    batch, _, height, width = scores.shape
    return torch.tensor(
        [[int(scores[b, :, y, x].argmax()) for y in range(height) for x in range(width)] for b in range(batch)]
    )


@pytest.mark.parametrize(("image_size", "patch_size"), [(32, 8), (64, 16), (96, 32)])
def test_equals_a_slow_twin(tokenizer, image_size, patch_size):
    """384 -> 192 for patches of 16: average pooling by patch size / 8."""
    pixels = images(2, image_size, image_size)
    expected = slow_tokens(tokenizer, F.avg_pool2d(pixels, patch_size // 8))
    assert torch.equal(tokenizer(normalize(pixels), (patch_size, patch_size)), expected)
    assert len(expected.unique()) > 3  # else any grid would do


def slow_area_means(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Each pooled pixel is the integral over its part of the image, divided by its area, in exact fractions."""
    pooled = torch.zeros(*pixels.shape[:2], height, width, dtype=torch.float64)
    for y, (rows, row_shares) in enumerate(overlaps(pixels.shape[2], height)):
        for x, (columns, column_shares) in enumerate(overlaps(pixels.shape[3], width)):
            shares = torch.tensor([[float(a * b) for b in column_shares] for a in row_shares], dtype=torch.float64)
            pooled[:, :, y, x] = (pixels[:, :, rows][..., columns].double() * shares).sum(dim=(2, 3))
    return pooled


def overlaps(length: int, parts: int) -> list[tuple[list[int], list[Fraction]]]:
    """For each of the equal parts of an interval, the whole numbers in it, and which share of the part each makes."""
    size, found = Fraction(length, parts), []
    for part in range(parts):
        start, end = part * size, (part + 1) * size
        inside = [k for k in range(length) if k < end and k + 1 > start]
        found.append((inside, [(min(end, k + 1) - max(start, k)) / size for k in inside]))
    return found


@pytest.mark.parametrize(
    ("image_size", "patch_size"),
    [((42, 56), (14, 14)), ((24, 36), (12, 12)), ((40, 30), (10, 10)), ((28, 32), (14, 16)), ((12, 12), (4, 6))],
)
def test_equals_a_slow_twin_where_8_does_not_divide_the_patch(tokenizer, image_size, patch_size):
    """For patches of 14 a pooled pixel is the mean of 1.75 x 1.75 pixels: no pixel counts more than another."""
    pixels = images(2, *image_size)
    grid = [8 * side // patch_side for side, patch_side in zip(image_size, patch_size, strict=True)]
    pooled = slow_area_means(pixels, *grid)
    torch.testing.assert_close(pool_by_area(pixels, *grid).double(), pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled.mean(dim=(2, 3)), pixels.double().mean(dim=(2, 3)), rtol=0, atol=1e-9)
    expected = slow_tokens(tokenizer, pooled.float())
    assert torch.equal(tokenizer(normalize(pixels), patch_size), expected)
    assert len(expected.unique()) > 3


def test_windows_that_overlap_would_give_other_tokens(tokenizer):
    pixels = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    of_windows = slow_tokens(tokenizer, F.adaptive_avg_pool2d(pixels, (64, 64)))
    assert (tokenizer(normalize(pixels), (14, 14)) != of_windows).float().mean() > 0.05


def test_only_tokens_that_changed_have_another_fingerprint(tokenizer):
    of_version_0_1 = digest_codebook(tokenizer.codebook, pixels_per_token=8, epsilon=0.1)
    assert tokenizer.fingerprint((16, 16)) == tokenizer.fingerprint((8, 32)) == of_version_0_1
    assert tokenizer.fingerprint((14, 14)) == tokenizer.fingerprint((16, 14)) != of_version_0_1


def test_the_codebook_sees_the_raw_image(tokenizer):
    """The processor's normalization is undone, and what it overshot [0, 1] by is cut off."""
    seen = []
    hook = tokenizer.codebook.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = images(1, 32, 32)
    overshot = pixels.clone()
    overshot[:, :, 0, 0], overshot[:, :, 0, 1] = -0.5, 1.5
    tokenizer(normalize(pixels), (8, 8))
    tokenizer(normalize(overshot), (8, 8))
    hook.remove()
    raw, cut = ((one - 0.1) / 0.8 for one in seen)
    torch.testing.assert_close(raw, pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(cut, overshot.clamp(0, 1), rtol=0, atol=1e-6)


def test_raw_pixels_give_the_tokens_of_the_normalized_ones(tokenizer):
    raw = (255 * images(4, 64, 64)).round().to(torch.uint8)
    ids = tokenizer(raw, (16, 16))
    assert torch.equal(ids, tokenizer(normalize(raw / 255), (16, 16)))
    assert len(ids.unique()) > 3


def test_the_memory_layout_changes_no_token(tokenizer):
    weight = tokenizer.codebook.blocks.group_1.group.block_1.res_path.path.conv_1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(tokenizer)
    plain.codebook.to(memory_format=torch.contiguous_format)
    pixels = normalize(images(8, 64, 64))
    assert torch.equal(tokenizer(pixels, (16, 16)), plain(pixels, (16, 16)))


def test_tokens_do_not_depend_on_autocast(tokenizer):
    pixels = normalize(images(8, 64, 64))
    expected = tokenizer(pixels, (16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer(pixels, (16, 16)), expected)


def test_random_codebook_is_deterministic_and_uses_its_vocabulary():
    tokenizer, again, other = (ImageTokenizer.random(512, MEAN, STD, seed=seed) for seed in (3, 3, 4))
    pixels = normalize(images(32, 96, 96))
    ids = tokenizer(pixels, (16, 16))
    assert torch.equal(ids, again(pixels, (16, 16)))
    assert not torch.equal(ids, other(pixels, (16, 16)))
    counts = torch.bincount(ids.flatten(), minlength=512)
    # The library's own initialization gives about 10 of 512 ids, one of them in more than half of all places.
    assert (counts > 0).sum() > 100
    assert counts.max() < 0.2 * counts.sum()


def test_random_codebook_leaves_the_ambient_random_numbers_alone(monkeypatch):
    """An accelerator's too: `torch.manual_seed` seeds it as well, which `fork_rng` without devices does not undo."""
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    state = torch.get_rng_state()
    ImageTokenizer.random(16, MEAN, STD)
    assert torch.equal(torch.get_rng_state(), state)
    assert seeds == []


def test_saved_codebook_loads_equal_and_frozen(tmp_path, tokenizer):
    tokenizer.codebook.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(str(tmp_path), MEAN, STD)
    pixels = normalize(images(2, 64, 64))
    assert torch.equal(loaded(pixels, (16, 16)), tokenizer(pixels, (16, 16)))
    assert loaded.vocab_size == 64
    loaded.train()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


def test_takes_the_architecture_of_the_dall_e_encoder():
    """The configuration of facebook/flava-image-codebook is the class's default: 8,192 codes, 256 wide."""
    with torch.device("meta"):
        codebook = FlavaImageCodebook(FlavaImageCodebookConfig())
    assert codebook.config.vocab_size == 8192
    assert codebook.blocks.input.weight.shape[0] == 256
