"""Visual tokens by k-means over a vision encoder's patch features."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from modeling_cots.method.kmeans_tokenizer import KMeansImageTokenizer

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def make(model_type: str = "dinov2", vocab_size: int = 8) -> KMeansImageTokenizer:
    torch.manual_seed(0)
    config, model = {"dinov2": (Dinov2Config, Dinov2Model), "vit": (ViTConfig, ViTModel)}[model_type]
    encoder = model(config(**SIZES, image_size=28, patch_size=7))
    return KMeansImageTokenizer(encoder, [0.5] * 3, [0.5] * 3, torch.zeros(vocab_size, 16), MEAN, STD)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_nearest_centers_of_the_patches(pixels):
    tokenizer = make()
    tokenizer.centers.copy_(F.normalize(torch.randn(8, 16), dim=1))
    features = tokenizer.features(pixels, (8, 8))
    assert features.shape == (3, 16, 16)
    tokens = tokenizer(pixels, (8, 8))
    for image in range(3):
        for patch in range(16):
            distances = [(features[image, patch] - center).norm().item() for center in tokenizer.centers]
            assert tokens[image, patch] == distances.index(min(distances))


@pytest.mark.parametrize("model_type", ["dinov2", "vit"])
def test_features_are_those_of_the_encoder_at_its_own_normalization(pixels, model_type):
    """The image is resized so that the encoder has one patch where the model has one: 4 x 4 of 7 pixels."""
    tokenizer = make(model_type)
    resized = F.interpolate(pixels.float() / 255, size=(28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        hidden = tokenizer.encoder((resized - 0.5) / 0.5).last_hidden_state[:, 1:]
    torch.testing.assert_close(tokenizer.features(pixels, (8, 8)), F.normalize(hidden, dim=-1), rtol=0, atol=1e-5)


def test_raw_and_normalized_pixels_have_the_same_tokens(pixels):
    tokenizer = make()
    tokenizer.centers.copy_(F.normalize(torch.randn(8, 16), dim=1))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    normalized = (pixels.float() / 255 - mean) / std
    assert torch.equal(tokenizer(pixels, (8, 8)), tokenizer(normalized, (8, 8)))
    other_grid = tokenizer(pixels, (16, 16))  # position embeddings are interpolated
    assert other_grid.shape == (3, 4)


def test_saved_and_loaded_it_has_the_same_tokens_and_fingerprint(pixels, tmp_path):
    tokenizer = make()
    tokenizer.centers.copy_(torch.randn(8, 16))
    tokenizer.save_pretrained(str(tmp_path))
    loaded = KMeansImageTokenizer.from_pretrained(str(tmp_path), MEAN, STD)
    assert torch.equal(tokenizer(pixels, (8, 8)), loaded(pixels, (8, 8)))
    assert tokenizer.fingerprint((8, 8)) == loaded.fingerprint((8, 8))
    loaded.centers[0, 0] += 1
    assert tokenizer.fingerprint((8, 8)) != loaded.fingerprint((8, 8))
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "dinov2"


def test_nothing_of_it_trains():
    tokenizer = make().train()
    assert not tokenizer.encoder.training
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
