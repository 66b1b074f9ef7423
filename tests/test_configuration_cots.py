"""COTSConfig: the paper by default, partial dicts, exact saving, and a refusal of what cannot be built."""

import json

import pytest
from transformers import BertConfig, DeiTConfig, ViTConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_cots import COTSConfig


def test_default_is_the_model_of_the_paper():
    config = COTSConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.model_type, text.num_hidden_layers, text.hidden_size, text.vocab_size) == ("bert", 12, 768, 30522)
    assert (vision.model_type, vision.num_hidden_layers, vision.hidden_size) == ("vit", 12, 768)
    assert config.image_size == (384, 384) and config.patch_size == (16, 16)
    assert (config.projection_dim, config.temperature, config.image_vocab_size) == (256, 0.05, 8192)
    assert config.tie_word_embeddings is True


def test_construction_logs_nothing():
    with CaptureLogger(logging.get_logger("transformers")) as captured:
        COTSConfig()
        COTSConfig(text_config={"hidden_size": 32}, vision_config={"hidden_size": 32})
    assert captured.out == ""


def test_sub_configurations_as_dict_as_object_or_absent():
    text, vision = BertConfig(hidden_size=48), ViTConfig(hidden_size=60, image_size=384)
    from_objects = COTSConfig(text_config=text, vision_config=vision)
    assert from_objects.text_config is text and from_objects.vision_config is vision
    from_dicts = COTSConfig(text_config={"hidden_size": 48}, vision_config={"hidden_size": 60})
    assert from_dicts.to_dict() == from_objects.to_dict()
    assert from_dicts.get_text_config() is from_dicts.text_config
    assert COTSConfig(text_config={"hidden_size": 48}).vision_config.hidden_size == 768


def test_another_encoder_keeps_its_own_defaults():
    config = COTSConfig(text_config={"model_type": "roberta"}, vision_config={"model_type": "deit"})
    assert config.text_config.model_type == "roberta"
    assert isinstance(config.vision_config, DeiTConfig) and config.image_size == (224, 224)


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_saving_changes_nothing(tiny_config, tmp_path, subfolder):
    folder = tmp_path / subfolder if subfolder else tmp_path
    tiny_config.save_pretrained(folder)
    reloaded = COTSConfig.from_pretrained(tmp_path, subfolder=subfolder or "")
    assert reloaded.to_dict() == tiny_config.to_dict()
    assert COTSConfig.from_dict(json.loads(tiny_config.to_json_string())).to_dict() == tiny_config.to_dict()


def test_sub_configurations_load_from_the_composite_folder(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    assert BertConfig.from_pretrained(tmp_path).to_dict() == tiny_config.text_config.to_dict()
    assert ViTConfig.from_pretrained(tmp_path).to_dict() == tiny_config.vision_config.to_dict()


def test_loading_overrides_one_key_of_a_sub_configuration(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    overridden = COTSConfig.from_pretrained(tmp_path, text_config={"vocab_size": 20}, vision_config={"patch_size": 4})
    expected = tiny_config.to_dict()
    expected["text_config"]["vocab_size"] = 20
    expected["vision_config"]["patch_size"] = 4
    assert overridden.to_dict() == expected


def test_num_labels_as_in_the_base_class():
    config = COTSConfig(num_labels=5)
    assert len(config.id2label) == len(config.label2id) == 5
    config.num_labels = 3
    assert len(config.id2label) == 3
    assert COTSConfig(id2label={0: "a", 1: "b"}).num_labels == 2


def test_sizes_may_differ_between_height_and_width():
    config = COTSConfig(vision_config={"image_size": [64, 96], "patch_size": [16, 8]})
    assert config.image_size == (64, 96) and config.patch_size == (16, 8)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"temperature": -0.05}, "temperature.*-0.05"),
        ({"temperature": float("nan")}, "temperature.*nan"),
        ({"projection_dim": 0}, "projection_dim.*0"),
        ({"image_vocab_size": -1}, "image_vocab_size.*-1"),
        ({"vision_config": {"image_size": 100}}, r"image_size \(100\).*patch_size \(16\).* 96"),
        ({"vision_config": {"image_size": [64, 60], "patch_size": 8}}, r"image_size \(60\).*patch_size \(8\).* 64"),
        ({"vision_config": {"image_size": 8, "patch_size": 16}}, r"image_size \(8\).*patch_size \(16\).* 16"),
        ({"vision_config": {"image_size": 0}}, r"image_size \(0\)"),
        ({"vision_config": {"patch_size": 0}}, "patch_size must be at least 1, got 0"),
        ({"vision_config": {"model_type": "resnet"}}, "resnet.*image_size"),
    ],
)
def test_impossible_values_are_refused_with_both_numbers(arguments, named):
    with pytest.raises(ValueError, match=named):
        COTSConfig(**arguments)
