"""Projections: one layer as in the paper, or with a hidden layer, or of standardized features."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel
from modeling_cots.modeling_cots import Standardization

OPTIONS = [
    {"projection_hidden_size": 24},
    {"standardize_features": True},
    {"projection_hidden_size": 24, "standardize_features": True},
    {"image_pooling": "cls_mean"},
    {"projection_hidden_size": 24, "standardize_features": True, "image_pooling": "cls_mean"},
]


def with_options(config: COTSConfig, **options) -> COTSConfig:
    for name, value in options.items():
        setattr(config, name, value)
    return config


def fitted(model: COTSModel) -> COTSModel:
    generator = torch.Generator().manual_seed(0)
    for projection in (model.text_projection, model.vision_projection):
        if hasattr(projection, "standardization"):
            size = len(projection.standardization.mean)
            projection.standardization.fit_(3 + 2 * torch.randn(50, size, generator=generator))
    return model


def test_the_papers_projections_are_what_they_were(tiny_config, tmp_path):
    """One layer, the same names, and the same random numbers: a checkpoint of an earlier version loads whole."""
    model = COTSModel(tiny_config)
    assert type(model.text_projection) is type(model.vision_projection) is nn.Linear
    names = {name for name in model.state_dict() if "projection" in name and "_model." not in name}
    assert names == {f"{kind}_projection.{part}" for kind in ("text", "vision") for part in ("weight", "bias")}
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in (
        "projection_hidden_size",
        "standardize_features",
        "image_pooling",
    ):  # which an earlier version did not write
        config.pop(name, None)
    path.write_text(json.dumps(config))
    loaded = COTSModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_embeddings_are_those_of_the_formula(tiny_config, tiny_inputs, options):
    model = fitted(COTSModel(with_options(tiny_config, **options)).eval())
    with torch.no_grad():
        for features, embeds, projection in (
            (
                model.run_vision_model(tiny_inputs["pixel_values"]).pooler_output,
                model.encode_image(tiny_inputs["pixel_values"]),
                model.vision_projection,
            ),
            (
                model.run_text_model(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]).pooler_output,
                model.encode_text(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]),
                model.text_projection,
            ),
        ):
            if "standardize_features" in options:
                features = (features - projection.standardization.mean) / projection.standardization.std
            if "projection_hidden_size" in options:
                features = F.gelu(features @ projection.hidden.weight.T + projection.hidden.bias)
            output = getattr(projection, "output", projection)
            expected = features @ output.weight.T + output.bias
            torch.testing.assert_close(embeds, expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_class", [COTSModel, COTSForPreTraining])
def test_saved_and_loaded_with_what_was_fitted(tiny_config, tiny_inputs, tmp_path, options, model_class):
    model = model_class(with_options(tiny_config, **options)).eval()
    fitted(model.base_model)
    model.save_pretrained(tmp_path)
    loaded = COTSModel.from_pretrained(tmp_path).eval()
    assert {name: getattr(loaded.config, name) for name in options} == options
    with torch.no_grad():
        expected = model.base_model.encode_text(tiny_inputs["input_ids"])
        assert torch.equal(loaded.encode_text(tiny_inputs["input_ids"]), expected)


def test_a_new_standardization_changes_nothing_and_a_fitted_one_gives_mean_0_and_deviation_1():
    standardization = Standardization(4)
    features = torch.tensor([1.0, 10.0, 100.0, 5.0]) + torch.randn(1000, 4) * torch.tensor([1.0, 0.1, 20.0, 3.0])
    assert torch.equal(standardization(features), features) and not standardization.is_fitted
    standardization.fit_(features)
    std, mean = torch.std_mean(standardization(features), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(std[[0, 2, 3]], torch.ones(3), rtol=0, atol=1e-5)
    assert standardization.is_fitted


def test_dimensions_that_hardly_vary_stay_small():
    """As three of all-MiniLM-L6-v2, with deviations of 1e-9 and less."""
    features = torch.randn(200, 10)
    features[:, 0] = 0.3
    features[:, 1] = 0.3 + 1e-9 * torch.randn(200)
    standardization = Standardization(10)
    standardization.fit_(features)
    new = features.clone()
    new[:, :2] += 1e-6
    assert standardization(new)[:, :2].abs().max() < 1e-3
    assert torch.isfinite(standardization(new)).all()
    standardization.fit_(torch.full((5, 10), 0.3))  # nothing varies at all
    assert torch.isfinite(standardization(features)).all()


@pytest.mark.parametrize("size", [0, -1])
def test_a_hidden_layer_of_nothing_is_refused(size):
    with pytest.raises(ValueError, match=f"`projection_hidden_size` must be at least 1, got {size}"):
        COTSConfig(projection_hidden_size=size)


@pytest.mark.parametrize("model_type", ["vit", "deit", "dinov2", "dinov2_with_registers"])
def test_the_mean_of_the_patches_leaves_out_all_other_tokens(tiny_config, tiny_inputs, model_type):
    """Whatever an encoder puts before them: [CLS], a distillation token, registers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sides = {"image_size": tiny_config.image_size[0], "patch_size": tiny_config.patch_size[0]}
    vision = {"model_type": model_type, **sizes, **sides}
    config = COTSConfig(text_config=tiny_config.text_config, vision_config=vision, image_pooling="cls_mean")
    model, pixels = COTSModel(config).eval(), tiny_inputs["pixel_values"]
    with torch.no_grad():
        hidden, pooled = model.vision_model(pixels).last_hidden_state, model.run_vision_model(pixels).pooler_output
    num_before = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1 + 4}[model_type]
    assert hidden.shape[1] == num_before + (sides["image_size"] // sides["patch_size"]) ** 2
    expected = torch.cat([hidden[:, 0], hidden[:, num_before:].mean(dim=1)], dim=1)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)
    assert config.image_feature_size == pooled.shape[1] == 64


def test_masked_words_are_predicted_from_the_whole_image_feature(tiny_config, tiny_inputs):
    model = COTSForPreTraining(with_options(tiny_config, image_pooling="cls_mean"))
    assert model.image_to_text.in_features == 2 * tiny_config.vision_config.hidden_size
    ids = tiny_inputs["input_ids"]
    places = torch.zeros_like(ids, dtype=torch.bool)
    places[:, 1] = True
    output = model(**tiny_inputs, masked_input_ids=ids, masked_token_pos=places)
    assert len(output.text_token_logits) == len(ids)


def test_refuses_another_pooling():
    with pytest.raises(ValueError, match="`image_pooling` must be one of cls, cls_mean, got mean"):
        COTSConfig(image_pooling="mean")
