"""`--image_size` and `--temperature`: equal to what the encoder itself does, and no two sources that differ."""

import json
import sys

import pytest
import torch
from transformers import BertModel, ViTImageProcessor
from transformers.models.auto.modeling_auto import AutoModel

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel, COTSProcessor, COTSTrainingArguments
from modeling_cots.scripts.factory import build_config, build_model, build_processor, train_tokenizer
from modeling_cots.scripts.image_size import resize_model, resize_vision_encoder_
from modeling_cots.scripts.steps import DataArguments, ModelArguments, build_parts, open_split, read_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION_CONFIGS = {
    "vit": {},
    "deit": {},
    "beit": {"use_mask_token": True, "use_relative_position_bias": True},
    "beit-shared": {"use_mask_token": True, "use_shared_relative_position_bias": True},
    "beit-absolute": {"use_mask_token": True, "use_absolute_position_embeddings": True},
    "data2vec-vision": {"use_mask_token": True, "use_relative_position_bias": True},
    "dinov2": {},
    "dinov2_with_registers": {},
    "vit_msn": {},
    "dinov3_vit": {},
}
CAPTIONS = ["a red circle left of a blue square", "two green triangles above a star"] * 3


def vision_config(name: str, **others) -> dict:
    model_type = name.partition("-")[0] if name.startswith("beit") else name
    return {"model_type": model_type, **SIZES, "image_size": 32, "patch_size": 8, **VISION_CONFIGS[name], **others}


def perturbed(encoder):
    """Some weights begin at zero, where no interpolation would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return encoder.eval()


@pytest.mark.parametrize("size", [24, 32, 48])
@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_a_resized_encoder_gives_what_the_encoder_itself_gives_at_that_size(name, size):
    config = COTSConfig(vision_config=vision_config(name), text_config={**SIZES, "vocab_size": 99})
    model = COTSModel(config).eval()
    perturbed(model.vision_model)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.run_vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        resize_vision_encoder_(model.vision_model, size)
        resized = COTSModel(model.config).eval()
        resized.load_state_dict(model.state_dict())
        got = resized.run_vision_model(pixels).last_hidden_state
    assert resized.config.image_size == (size, size)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_images_that_are_not_square_are_refused():
    config = COTSConfig(vision_config=vision_config("vit", image_size=[32, 48]))
    with pytest.raises(ValueError, match="images of 32 x 48: leave image_size out"):
        resize_vision_encoder_(COTSModel(config).vision_model, 32)


@pytest.fixture
def folders(tmp_path):
    """A text and a vision encoder with their processors, and a COTS checkpoint, as folders."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 80)
    config = COTSConfig(
        vision_config=vision_config("dinov2"), text_config={**SIZES, "vocab_size": 99}, projection_dim=16
    )
    BertModel(config.text_config).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    perturbed(AutoModel.from_config(config.vision_config)).save_pretrained(tmp_path / "vision")
    ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "vision")
    COTSForPreTraining(config).save_pretrained(tmp_path / "cots")
    build_processor(config, tokenizer, None).save_pretrained(tmp_path / "cots")
    return {name: str(tmp_path / name) for name in ("text", "vision", "cots")}


def parts_of(tmp_path, **options):
    options = ModelArguments(image_tokenizer="random", max_text_length=24, **options)
    data = open_split(DataArguments("scenes"), "validation", image_size=32, seed=0)
    config = read_config(options)
    return build_parts(options, config, COTSTrainingArguments(str(tmp_path / "run"), use_cpu=True), data)


def test_processor_token_grid_and_saved_model_follow(folders, tmp_path):
    given = AutoModel.from_pretrained(folders["vision"]).eval()
    pixels = torch.randn(1, 3, 48, 48)
    for options in (
        {"text_model": folders["text"], "vision_model": folders["vision"], "image_size": 48},
        {"model": folders["cots"], "image_size": 48},
    ):
        parts = parts_of(tmp_path, **options)
        assert parts.model.config.image_size == (48, 48)
        assert parts.processor.image_processor.size == {"height": 48, "width": 48}
        assert parts.processor.video_processor.size["height"] == 48
        assert parts.image_tokenizer(pixels, parts.model.config.patch_size).shape == (1, 36)
        parts.model.save_pretrained(tmp_path / "saved")
        saved = COTSModel.from_pretrained(tmp_path / "saved").eval()
        with torch.no_grad():
            got = saved.run_vision_model(pixels).last_hidden_state
            assert torch.equal(got, parts.model.eval().cots.run_vision_model(pixels).last_hidden_state)
            if "model" not in options:
                torch.testing.assert_close(got, given(pixels).last_hidden_state, rtol=0, atol=1e-6)


def test_fresh_encoders_take_the_size_too():
    assert read_config(ModelArguments(image_size=64)).image_size == (64, 64)
    assert read_config(ModelArguments(vision_model="timm/vit_tiny_patch16_224", image_size=64)).image_size == (64, 64)


def test_heads_and_all_else_of_a_checkpoint_stay(tiny_config):
    model = COTSForPreTraining(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resized = resize_model(model, 48).state_dict()
    assert resized.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], resized[name])}
    assert changed == {"cots.vision_model.embeddings.position_embeddings"}


def write(tmp_path, content: dict) -> str:
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def test_what_the_file_says_beside_an_encoder_must_be_true(folders, tmp_path):
    options = {"text_model": folders["text"], "vision_model": folders["vision"]}

    def read(content: dict, **others):
        return read_config(ModelArguments(**options, model_config=write(tmp_path, content), **others))

    with pytest.raises(
        ValueError, match="image_size is 48 in the model_config and 32 in vision_model .* --image_size"
    ):
        read({"vision_config": {"image_size": 48}})
    with pytest.raises(ValueError, match="image_size is 64 and 48 in the model_config: leave one"):
        read({"vision_config": {"image_size": 48}}, image_size=64)
    with pytest.raises(ValueError, match="hidden_size is 16 in the model_config and 32 in text_model"):
        read({"text_config": {"hidden_size": 16}})
    with pytest.raises(ValueError, match="model_type is vit in the model_config and dinov2 in vision_model"):
        read({"vision_config": {"model_type": "vit"}})
    with pytest.raises(ValueError, match="temperature is 0.2 and 0.1 in the model_config"):
        read({"temperature": 0.1}, temperature=0.2)
    same = {"text_config": {"hidden_size": 32}, "vision_config": {"image_size": 48, "hidden_size": 32}}
    assert read({**same, "temperature": 0.1}, image_size=48, temperature=0.1).temperature == 0.1
    assert read({"vision_config": {"image_size": [32, 32]}}).image_size == (32, 32)


@pytest.mark.parametrize("size", [0, -8, 20])
def test_a_size_that_the_patches_do_not_divide_is_refused(folders, size):
    with pytest.raises(ValueError, match=rf"image_size \({size}\) must be a multiple"):
        read_config(ModelArguments(vision_model=folders["vision"], image_size=size))


def test_the_temperature_reaches_the_model_whatever_it_starts_from(folders, tmp_path):
    for options in (
        {},
        {"model": folders["cots"]},
        {"text_model": folders["text"], "vision_model": folders["vision"]},
    ):
        if not options:
            sizes = {"vision_config": vision_config("vit"), "text_config": {**SIZES, "vocab_size": 99}}
            options = {"model_config": write(tmp_path, sizes)}
        model = parts_of(tmp_path, **options, temperature=0.1).model
        assert model.config.temperature == model.cots.config.temperature == 0.1
    with pytest.raises(ValueError, match="temperature.*must be positive, got 0"):
        read_config(ModelArguments(temperature=0.0))


def test_projections_of_the_options_and_of_no_other_source(folders, tmp_path):
    encoders = {"text_model": folders["text"], "vision_model": folders["vision"]}
    for options in ({}, encoders):
        options = options or {"model_config": write(tmp_path, {"vision_config": vision_config("vit")})}
        config = read_config(ModelArguments(**options, projection_hidden_size=24, standardize_features=True))
        assert (config.projection_hidden_size, config.standardize_features) == (24, True)
    model = parts_of(tmp_path, **encoders, projection_hidden_size=24, standardize_features=True).model.cots
    assert [name for name, _ in model.text_projection.named_children()] == [
        "standardization",
        "hidden",
        "activation",
        "output",
    ]
    with pytest.raises(ValueError, match="projection_hidden_size is 24 and None in .*cots: leave it out"):
        read_config(ModelArguments(model=folders["cots"], projection_hidden_size=24))
    with pytest.raises(ValueError, match="standardize_features is True and False in .*cots: leave it out"):
        read_config(ModelArguments(model=folders["cots"], standardize_features=True))
    with pytest.raises(ValueError, match="image_pooling is cls_mean and cls in .*cots: leave it out"):
        read_config(ModelArguments(model=folders["cots"], image_pooling="cls_mean"))
    assert read_config(ModelArguments(model=folders["cots"], standardize_features=False)).image_size == (32, 32)
    path = write(tmp_path, {"projection_hidden_size": 12})
    with pytest.raises(ValueError, match="projection_hidden_size is 24 and 12 in the model_config"):
        read_config(ModelArguments(model_config=path, projection_hidden_size=24))
    assert read_config(ModelArguments(model_config=path)).projection_hidden_size == 12


@pytest.mark.parametrize("script", ["run_pretraining", "run_retrieval", "run_video_retrieval", "estimate"])
def test_every_script_takes_both(script, tmp_path, monkeypatch, capsys):
    module = __import__(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    printed = capsys.readouterr().out
    assert "--temperature" in printed and "--image_size" in printed


def test_a_processor_of_the_checkpoint_keeps_its_normalization(folders, tmp_path):
    processor = COTSProcessor.from_pretrained(folders["cots"])
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(folders["cots"])
    parts = parts_of(tmp_path, model=folders["cots"], image_size=24)
    assert list(parts.processor.image_processor.image_mean) == [0.1, 0.2, 0.3]


def test_models_are_built_from_a_configuration_alone_as_before(folders):
    config = build_config(None, None, folders["text"], folders["vision"])
    tokenizer = train_tokenizer(CAPTIONS, 80)
    model = build_model(
        model=None,
        text_model=folders["text"],
        vision_model=folders["vision"],
        config=config,
        tokenizer=tokenizer,
        num_image_tokens=30,
        max_text_length=24,
    )
    given = AutoModel.from_pretrained(folders["vision"]).state_dict()
    for name, tensor in given.items():
        assert torch.equal(model.cots.vision_model.state_dict()[name], tensor), name
