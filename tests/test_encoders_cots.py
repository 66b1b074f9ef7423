"""Which encoders fit COTS, and building a model from pre-trained ones."""

import pytest
import torch
from encoder_kinds import TEXT_CONFIGS, TEXT_SIZES, VISION_CONFIGS, VISION_SIZES, cots_config
from transformers import CONFIG_MAPPING, BertConfig, BertModel, ViTConfig, ViTModel

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel
from modeling_cots.encoders_cots import (
    accepts,
    build_text_encoder,
    build_vision_encoder,
    check_vocabulary,
    max_text_length,
    use_bfloat16_,
)


def encode_masked(config: COTSConfig, inputs: dict, **kwargs):
    """Embeddings and token logits, everything masked."""
    torch.manual_seed(0)
    model = COTSForPreTraining(config).eval()
    return model(
        **inputs,
        **kwargs,
        bool_masked_pos=torch.ones(4, 16, dtype=torch.bool),
        masked_input_ids=inputs["input_ids"],
        masked_token_pos=inputs["attention_mask"],
    )


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_text_encoders_that_fit(tiny_inputs, text):
    """Tokenizers hand over `token_type_ids` whether or not the encoder knows them."""
    token_type_ids = torch.zeros_like(tiny_inputs["input_ids"])
    output = encode_masked(cots_config(text=text), tiny_inputs, token_type_ids=token_type_ids)
    assert output.text_embeds.shape == (4, 16)
    assert output.text_token_logits.shape == (tiny_inputs["attention_mask"].sum(), 99)


@pytest.mark.parametrize(("text", "reaches"), [("bert", True), ("distilbert", False), ("modernbert", False)])
def test_encoders_get_only_what_they_name(tiny_inputs, text, reaches):
    model = COTSModel(cots_config(text=text))
    received = {}
    model.text_model.register_forward_pre_hook(lambda *args: received.update(args[2]), with_kwargs=True)
    model.encode_text(tiny_inputs["input_ids"], token_type_ids=torch.zeros_like(tiny_inputs["input_ids"]))
    assert ("token_type_ids" in received) is reaches


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_vision_encoders_that_fit(tiny_inputs, vision):
    output = encode_masked(cots_config(vision=vision), tiny_inputs)
    assert output.image_embeds.shape == (4, 16)
    assert output.image_token_logits.shape == (4 * 16, 50)


@pytest.mark.parametrize("text", ["t5", "vit", "clip_vision_model"])
def test_other_text_encoders_are_refused(text):
    small = {"d_model": 32, "num_layers": 1} if text == "t5" else VISION_SIZES
    with pytest.raises(ValueError, match=f"`{text}` cannot be the text encoder.*such as bert"):
        build_text_encoder(CONFIG_MAPPING[text](**small))


@pytest.mark.parametrize("vision", ["swin", "clip_vision_model", "siglip_vision_model"])
def test_other_vision_encoders_are_refused(vision):
    small = {"embed_dim": 8, "depths": [1], "num_heads": [1]} if vision == "swin" else VISION_SIZES
    with pytest.raises(ValueError, match=f"`{vision}` cannot be the vision encoder.*such as vit"):
        build_vision_encoder(CONFIG_MAPPING[vision](**small), use_mask_token=False)


def test_an_encoder_without_mask_token_cannot_be_pre_trained():
    config = cots_config(vision="beit")
    config.vision_config.use_mask_token = False
    assert COTSModel(config).vision_model.config.model_type == "beit"
    with pytest.raises(ValueError, match="`beit`.*use_mask_token=True"):
        COTSForPreTraining(config)


def test_encoders_hold_the_very_sub_configurations(tiny_config):
    model = COTSModel(tiny_config)
    assert model.text_model.config is model.config.text_config
    assert model.vision_model.config is model.config.vision_config


def test_encoders_have_no_pooler_and_only_pre_training_a_mask_token(tiny_config):
    model, pretraining = COTSModel(tiny_config), COTSForPreTraining(tiny_config)
    assert model.text_model.pooler is None and model.vision_model.pooler is None
    assert model.vision_model.embeddings.mask_token is None
    assert pretraining.cots.vision_model.embeddings.mask_token is not None


def test_accepts_looks_at_named_parameters():
    assert accepts(lambda a, b=1: None, "b") and not accepts(lambda a, **kwargs: None, "b")


@pytest.mark.parametrize(("text", "expected"), [("bert", 64), ("roberta", 64 - 1), ("mpnet", 64 - 2)])
def test_max_text_length_is_what_the_encoder_can_take(tiny_inputs, text, expected):
    """Their first positions, up to that of the padding id, RoBERTa (padding id 0 here) and MPNet (1) never use."""
    model = COTSModel(cots_config(text=text))
    assert max_text_length(model.text_model) == model.max_text_length == expected
    fits = torch.full((1, expected), 5)
    model.text_model(fits)
    with pytest.raises((IndexError, RuntimeError)):
        model.text_model(torch.cat([fits, fits[:, :1]], dim=1))
    model.encode_text(torch.cat([fits, fits], dim=1))


@pytest.fixture
def encoders() -> tuple[BertModel, ViTModel]:
    """With poolers, as they stand on the Hub."""
    torch.manual_seed(1)
    return BertModel(BertConfig(**TEXT_SIZES)).eval(), ViTModel(ViTConfig(**VISION_SIZES)).eval()


@pytest.mark.parametrize("model_class", [COTSModel, COTSForPreTraining])
@pytest.mark.parametrize("from_folder", [False, True])
@torch.no_grad()
def test_from_encoders_takes_over_both_encoders(encoders, tiny_inputs, tmp_path, model_class, from_folder):
    text_model, vision_model = encoders
    sources = encoders
    if from_folder:
        text_model.save_pretrained(tmp_path / "text")
        vision_model.save_pretrained(tmp_path / "vision")
        sources = tmp_path / "text", str(tmp_path / "vision")
    model = model_class.from_encoders(*sources, projection_dim=16, temperature=0.1, image_vocab_size=50).eval()
    cots = model.base_model
    assert (model.config.projection_dim, model.config.temperature) == (16, 0.1)
    assert cots.text_projection.weight.shape == (16, 32)
    text = cots.get_text_features(tiny_inputs["input_ids"], tiny_inputs["attention_mask"])
    image = cots.get_image_features(tiny_inputs["pixel_values"])
    expected_text = text_model(tiny_inputs["input_ids"], tiny_inputs["attention_mask"])
    expected_image = vision_model(tiny_inputs["pixel_values"])
    torch.testing.assert_close(text.last_hidden_state, expected_text.last_hidden_state)
    torch.testing.assert_close(image.last_hidden_state, expected_image.last_hidden_state)


def test_from_encoders_leaves_its_sources_alone(encoders):
    text_model, vision_model = encoders
    before = text_model.config.to_dict(), vision_model.config.to_dict()
    model = COTSModel.from_encoders(*encoders)
    assert (text_model.config.to_dict(), vision_model.config.to_dict()) == before
    assert model.text_model is not text_model and model.config.text_config is not text_model.config
    with torch.no_grad():
        model.text_model.embeddings.word_embeddings.weight.zero_()
    assert text_model.embeddings.word_embeddings.weight.any()


def test_from_encoders_trains_in_float32(encoders, tmp_path):
    text_model, vision_model = encoders
    text_model.to(torch.bfloat16).save_pretrained(tmp_path)
    model = COTSModel.from_encoders(str(tmp_path), vision_model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "cots")
    assert COTSModel.from_pretrained(tmp_path / "cots").dtype == torch.float32


def test_from_encoders_keeps_the_masked_text_head_tied(encoders):
    model = COTSForPreTraining.from_encoders(*encoders)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model.get_output_embeddings().weight, encoders[0].embeddings.word_embeddings.weight)


def test_from_encoders_refuses_a_model_that_is_no_encoder(encoders):
    with pytest.raises(ValueError, match="vit.*cannot be the text encoder"):
        COTSModel.from_encoders(encoders[1], encoders[1])
    with pytest.raises(ValueError, match="bert.*image_size"):
        COTSModel.from_encoders(encoders[0], encoders[0])


def test_from_encoders_refuses_weights_that_do_not_cover_the_encoder(encoders):
    text_model, vision_model = encoders
    del text_model.encoder.layer[1]
    with pytest.raises(ValueError, match="BertModel lacks 16 weights.*layer.1"):
        COTSModel.from_encoders(text_model, vision_model)


def test_a_tokenizer_may_have_as_many_tokens_as_there_are_embeddings_and_no_more():
    config = cots_config()
    check_vocabulary(range(99), config)
    check_vocabulary(range(20), config)
    with pytest.raises(ValueError, match="has 100 tokens and the text encoder only 99 embeddings"):
        check_vocabulary(range(100), config)


@pytest.mark.parametrize(("text", "vision"), [("bert", "vit"), ("distilbert", "beit"), ("modernbert", "dinov2")])
def test_linear_layers_in_bfloat16_stay_near_float32(tiny_inputs, text, vision, tmp_path):
    torch.manual_seed(0)
    model = COTSModel(cots_config(text=text, vision=vision)).eval()
    texts = {name: tiny_inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model.encode_text(**texts), model.encode_image(tiny_inputs["pixel_values"])
        use_bfloat16_(model)
        found = model.encode_text(**texts), model.encode_image(tiny_inputs["pixel_values"])
    for before, after in zip(expected, found, strict=True):
        assert after.dtype == torch.float32
        assert 0 < (before - after).abs().max() < 0.02
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match='load it with dtype="float32"'):
        model.save_pretrained(tmp_path)
