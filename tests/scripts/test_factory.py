"""Model, tokenizers and processor made to agree, or refused with both numbers."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertModel, Dinov2Config, FlavaImageCodebook, FlavaImageCodebookConfig, ViTModel

from modeling_cots.scripts.factory import (
    build_config,
    build_image_tokenizer,
    build_model,
    build_processor,
    build_tokenizer,
    train_tokenizer,
)

CAPTIONS = ["a red circle left of a blue square", "a green circle above a red square", "two red circles"] * 3


@pytest.fixture
def tokenizer():
    return train_tokenizer(CAPTIONS, 80)


def build(config, tokenizer, *, model=None, text_model=None, vision_model=None, num_image_tokens=50, length=24):
    return build_model(
        model=model,
        text_model=text_model,
        vision_model=vision_model,
        config=config,
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        max_text_length=length,
    )


def test_a_trained_tokenizer_knows_its_captions_and_round_trips(tokenizer, tmp_path):
    assert len(tokenizer) <= 80
    assert tokenizer.unk_token_id not in tokenizer(CAPTIONS[0])["input_ids"]
    assert tokenizer.decode(tokenizer(CAPTIONS[0])["input_ids"], skip_special_tokens=True) == CAPTIONS[0]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(CAPTIONS)["input_ids"] == tokenizer(CAPTIONS)["input_ids"]


def test_training_a_tokenizer_is_deterministic():
    assert train_tokenizer(CAPTIONS, 60).get_vocab() == train_tokenizer(CAPTIONS, 60).get_vocab()


def test_the_tokenizer_is_the_given_one_or_the_text_models_or_trained(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "given")
    given = build_tokenizer(str(tmp_path / "given"), "ignored", CAPTIONS, 16, 80)
    of_the_text_model = build_tokenizer(None, str(tmp_path / "given"), CAPTIONS, 16, 80)
    trained = build_tokenizer(None, None, CAPTIONS, 16, 60)
    assert given.get_vocab() == of_the_text_model.get_vocab() == tokenizer.get_vocab()
    assert len(trained) <= 60
    assert len(trained("red " * 50, truncation=True)["input_ids"]) == 16


def test_fresh_vocabularies_follow_the_tokenizers(tiny_config, tokenizer):
    model = build(tiny_config, tokenizer, num_image_tokens=33)
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert model.cots.text_model.embeddings.word_embeddings.weight.shape[0] == len(tokenizer)
    assert model.cmvm_head.out_features == 33


def test_given_encoders_are_kept_and_the_other_stream_is_fresh(tiny_config, tokenizer, tmp_path):
    vision = ViTModel(tiny_config.vision_config, add_pooling_layer=False)
    vision.save_pretrained(tmp_path / "vit")
    model = build(tiny_config, tokenizer, vision_model=str(tmp_path / "vit"))
    assert torch.equal(model.cots.vision_model.embeddings.position_embeddings, vision.embeddings.position_embeddings)
    assert model.config.text_config.vocab_size == len(tokenizer)

    tiny_config.text_config.vocab_size = 120
    text = BertModel(tiny_config.text_config, add_pooling_layer=False)
    text.save_pretrained(tmp_path / "bert")
    model = build(tiny_config, tokenizer, text_model=str(tmp_path / "bert"))
    assert model.config.text_config.vocab_size == 120  # more embeddings than pieces is fine
    assert torch.equal(model.get_input_embeddings().weight, text.embeddings.word_embeddings.weight)


def test_goes_on_from_a_checkpoint(tiny_config, tokenizer, tmp_path):
    first = build(tiny_config, tokenizer)
    first.save_pretrained(tmp_path)
    again = build(tiny_config, tokenizer, model=str(tmp_path))
    assert torch.equal(first.cmvm_head.weight, again.cmvm_head.weight)
    with pytest.raises(ValueError, match="has 64 tokens and .* head 50"):
        build(tiny_config, tokenizer, model=str(tmp_path), num_image_tokens=64)


def test_refuses_a_tokenizer_with_more_pieces_than_the_encoder_has_embeddings(tiny_config, tokenizer, tmp_path):
    tiny_config.text_config.vocab_size = 20
    BertModel(tiny_config.text_config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens .* only 20"):
        build(tiny_config, tokenizer, text_model=str(tmp_path))


def test_refuses_captions_longer_than_the_positions(tiny_config, tokenizer):
    with pytest.raises(ValueError, match="max_text_length is 41 .* 40 positions"):
        build(tiny_config, tokenizer, length=41)


def test_refuses_a_tokenizer_that_cannot_mask(tokenizer, tmp_path):
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no mask_token"):
        build_tokenizer(str(tmp_path), None, CAPTIONS, 16, 80)


def test_the_processor_has_the_size_of_the_vision_encoder(tiny_config, tokenizer):
    processor = build_processor(tiny_config, tokenizer, None)
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert processor.image_processor.do_convert_rgb
    assert processor.video_processor.size["height"] == 32


def test_the_image_tokenizer_is_loaded_or_random_and_says_so(tiny_config, tokenizer, tmp_path, caplog):
    processor = build_processor(tiny_config, tokenizer, None)
    FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=20)).save_pretrained(tmp_path)
    loaded = build_image_tokenizer(str(tmp_path), processor, 50)
    assert loaded.vocab_size == 20
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(pixels, (8, 8)), build_image_tokenizer(str(tmp_path), None, 50)(pixels, (8, 8)))
    messages = []
    from modeling_cots.scripts import factory

    original, factory.logger.warning = factory.logger.warning, messages.append
    try:
        assert build_image_tokenizer("random", processor, 50).vocab_size == 50
    finally:
        factory.logger.warning = original
    assert "random codebook of 50 tokens" in messages[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 48}, "image_size=48 is that of the vision encoder: put it into vision_config."),
        ({"patch_size": 4}, "patch_size=4 is that of the vision encoder: put it into vision_config."),
        ({"projection_dims": 8}, "there is no projection_dims in a `cots` configuration."),
        ({"vision_config": {"hiden_size": 96}}, "there is no vision_config.hiden_size in a `vit` configuration."),
        ({"text_config": {"layers": 2}}, "there is no text_config.layers in a `bert` configuration."),
        ({"model_type": "bert"}, "its model_type is 'bert'."),
        ({"dtype": "float16"}, "dtype is float16, and weights are trained in float32: set bf16 or fp16."),
    ],
)
def test_fields_of_a_file_that_nothing_would_use_are_refused(tmp_path, fields, message):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError) as refused:
        build_config(None, str(path), None, None)
    assert str(refused.value).endswith(message) and str(refused.value).startswith(str(path))


def test_the_configuration_of_an_exported_model_is_a_file_of_fields(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "modeling_cots.COTSModel"}}))
    assert build_config(None, str(path), None, None).vision_config.hidden_size == tiny_config.vision_config.hidden_size


def test_a_folder_without_a_model_is_said_to_have_none(tmp_path):
    """As a run leaves it that ends before its first checkpoint."""
    (tmp_path / "training.lock").touch()
    with pytest.raises(ValueError, match=r"^There is no COTS model in .*: it has no config\.json\."):
        build_config(str(tmp_path), None, None, None)


def test_what_a_file_says_of_a_given_encoder_is_compared_with_it_alone(tmp_path):
    """Sides that the paper's patches of 16 do not divide are those of the encoder all the same."""
    path = tmp_path / "model.json"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    Dinov2Config(**sizes).save_pretrained(tmp_path / "vision")
    path.write_text('{"vision_config": {"image_size": 28}}')
    assert build_config(None, str(path), None, str(tmp_path / "vision")).image_size == (28, 28)
    path.write_text('{"vision_config": "dinov2"}')
    with pytest.raises(ValueError, match="has 'dinov2' beside vision_model .*: write fields in braces"):
        build_config(None, str(path), None, str(tmp_path / "vision"))


@pytest.mark.parametrize(
    "text",
    ["", '{"a": ', "[1]", "3", '{"vision_config": 3}', '{"vision_config": {"image_size": "x"}}', '{"temperature": 0}'],
)
def test_a_broken_configuration_is_refused_in_one_sentence_that_names_the_file(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        build_config(None, str(path), None, None)
    assert str(refused.value).startswith(f"{path} is no JSON file of COTSConfig fields: ")
    assert "\n" not in str(refused.value)
