"""Raw pixels and the processor's own: the same numbers, a quarter of the bytes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from modeling_cots import COTSVideoProcessor
from modeling_cots.data.image_collators import RAW_PIXELS
from modeling_cots.data.pixel_normalization import PixelNormalizer

SIZE = {"height": 16, "width": 16}
SETTINGS = {
    "usual": {},
    "other channels": {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28]},
    "not rescaled": {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
    "not normalized": {"do_normalize": False},
}


def processor(**settings) -> SimpleNamespace:
    return SimpleNamespace(
        image_processor=ViTImageProcessor(size=SIZE, do_convert_rgb=True, **settings),
        video_processor=COTSVideoProcessor(size=SIZE, num_frames=3, **settings),
    )


@pytest.fixture
def images() -> list[Image.Image]:
    """Noise of two shapes, every level among it."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in ((40, 24), (16, 16))]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_images_equal_those_of_the_processor(settings, images):
    part = processor(**settings).image_processor
    raw = part(images, **RAW_PIXELS)["pixel_values"]
    assert raw.dtype == torch.uint8
    normalized = PixelNormalizer(processor(**settings))({"pixel_values": raw})
    expected = part(images, return_tensors="pt")["pixel_values"]
    assert raw.nbytes * 4 == normalized["pixel_values"].nbytes
    torch.testing.assert_close(normalized["pixel_values"], expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(normalized["raw_pixels"], raw)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_videos_equal_those_of_the_processor(settings):
    video = np.random.default_rng(1).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    part = processor(**settings).video_processor
    raw = part(video, **RAW_PIXELS)["pixel_values_videos"]
    assert raw.dtype == torch.uint8
    normalized = PixelNormalizer(processor(**settings))({"pixel_values_videos": raw})
    expected = part(video, return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(normalized["pixel_values_videos"], expected.float(), rtol=1e-6, atol=1e-6)
    assert normalized.keys() == {"pixel_values_videos"}


def test_floats_count_as_normalized_and_nothing_else_is_touched():
    batch = {"pixel_values": torch.rand(2, 3, 4, 4), "input_ids": torch.ones(2, 3, dtype=torch.uint8)}
    normalized = PixelNormalizer(processor())(batch)
    assert normalized.keys() == batch.keys()
    assert all(normalized[name] is batch[name] for name in batch)


def test_the_given_batch_keeps_its_bytes():
    raw = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    batch = {"pixel_values": raw}
    first, second = PixelNormalizer(processor())(batch), PixelNormalizer(processor())(batch)
    assert batch["pixel_values"] is raw and (raw == 255).all()
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_a_processor_without_videos_will_do():
    images_only = SimpleNamespace(image_processor=ViTImageProcessor(size=SIZE))
    batch = {"pixel_values": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}
    assert PixelNormalizer(images_only)(batch)["pixel_values"].dtype == torch.float32
