"""COTSModel: what its numbers mean, each against a slow twin. What transformers asks of any model is tested in
`test_modeling_cots_common.py`."""

import copy

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad
from transformers import Trainer, TrainingArguments, pipeline

from modeling_cots import COTSConfig, COTSModel
from modeling_cots.modeling_cots import image_text_contrastive_loss


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / (a.norm() * b.norm()).item()


@torch.no_grad()
def test_logits_are_cosines_over_the_temperature(model, tiny_inputs):
    output = model(**tiny_inputs)
    image_features = model.get_image_features(tiny_inputs["pixel_values"]).pooler_output
    text_features = model.get_text_features(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]).pooler_output
    for i in range(4):
        for j in range(4):
            expected = cosine(image_features[i], text_features[j]) / 0.05
            assert output.logits_per_image[i, j].item() == pytest.approx(expected, abs=1e-4)
            assert output.logits_per_text[j, i] == output.logits_per_image[i, j]


@torch.no_grad()
def test_temperature_divides(tiny_config, tiny_inputs):
    logits = []
    for temperature in (0.05, 0.1):
        tiny_config.temperature = temperature
        torch.manual_seed(0)
        logits.append(COTSModel(tiny_config).eval()(**tiny_inputs).logits_per_image)
    torch.testing.assert_close(logits[0], 2 * logits[1])


@torch.no_grad()
def test_embeddings_have_unit_length(model, tiny_inputs):
    output = model(**tiny_inputs)
    for embeds in (output.image_embeds, output.text_embeds):
        assert embeds.shape == (4, 16) and embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(4))


@torch.no_grad()
def test_return_loss_is_the_loss_of_the_logits(model, tiny_inputs):
    output = model(**tiny_inputs, return_loss=True)
    torch.testing.assert_close(output.loss, image_text_contrastive_loss(output.logits_per_image))
    assert model(**tiny_inputs).loss is None


@torch.no_grad()
def test_global_features_are_the_text_mean_and_the_image_cls(model, tiny_inputs):
    text = model.run_text_model(tiny_inputs["input_ids"], tiny_inputs["attention_mask"])
    for i, length in enumerate(tiny_inputs["attention_mask"].sum(1).tolist()):
        torch.testing.assert_close(text.pooler_output[i], text.last_hidden_state[i, :length].mean(0))
    image = model.run_vision_model(tiny_inputs["pixel_values"])
    assert image.last_hidden_state.shape == (4, 1 + 16, 32)
    torch.testing.assert_close(image.pooler_output, image.last_hidden_state[:, 0])
    projected = model.get_image_features(tiny_inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(projected, model.vision_projection(image.pooler_output))
    projected = model.get_text_features(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(projected, model.text_projection(text.pooler_output))


@torch.no_grad()
def test_padding_changes_nothing_and_the_mask_is_why(model, tiny_inputs):
    input_ids, attention_mask = tiny_inputs["input_ids"], tiny_inputs["attention_mask"]
    expected = model.encode_text(input_ids, attention_mask)
    other_padding = input_ids.masked_fill(attention_mask == 0, 42)
    torch.testing.assert_close(model.encode_text(other_padding, attention_mask), expected)
    longer = [pad(tensor, (0, 3)) for tensor in (input_ids, attention_mask)]
    torch.testing.assert_close(model.encode_text(*longer), expected, atol=1e-5, rtol=1e-5)
    unmasked = model.encode_text(input_ids)
    assert (unmasked[3] - expected[3]).abs().max() > 1e-2
    torch.testing.assert_close(unmasked[0], expected[0])


@torch.no_grad()
def test_left_padding_with_its_positions_equals_no_padding(model, tiny_inputs):
    ids = tiny_inputs["input_ids"][:1]
    padded = pad(ids, (2, 0))
    attention_mask = (torch.arange(9) >= 2).long()[None]
    position_ids = (torch.arange(9) - 2).clamp(min=0)[None]
    left = model.encode_text(padded, attention_mask, position_ids=position_ids)
    torch.testing.assert_close(left, model.encode_text(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_encoders_never_see_each_other(model, tiny_inputs):
    output = model(**tiny_inputs)
    other_images = model(**{**tiny_inputs, "pixel_values": tiny_inputs["pixel_values"].flip(0) + 1})
    assert torch.equal(other_images.text_embeds, output.text_embeds)
    assert not torch.allclose(other_images.image_embeds, output.image_embeds, atol=1e-2)
    other_texts = model(**{**tiny_inputs, "input_ids": tiny_inputs["input_ids"].flip(1)})
    assert torch.equal(other_texts.image_embeds, output.image_embeds)
    assert not torch.allclose(other_texts.text_embeds, output.text_embeds, atol=1e-2)


@torch.no_grad()
def test_one_encoder_at_a_time(model, tiny_inputs):
    both = model(**tiny_inputs)
    text = model(input_ids=tiny_inputs["input_ids"], attention_mask=tiny_inputs["attention_mask"])
    image = model(pixel_values=tiny_inputs["pixel_values"])
    assert list(text.keys()) == ["text_embeds", "text_model_output"]
    assert list(image.keys()) == ["image_embeds", "vision_model_output"]
    # Pipelines take `model(...)[0]` for the features.
    torch.testing.assert_close(text[0], both.text_embeds)
    torch.testing.assert_close(image[0], both.image_embeds)
    torch.testing.assert_close(
        model.encode_text(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]), both.text_embeds
    )
    torch.testing.assert_close(model.encode_image(tiny_inputs["pixel_values"]), both.image_embeds)


@torch.no_grad()
def test_more_texts_than_images(model, tiny_inputs):
    output = model(**{**tiny_inputs, "pixel_values": tiny_inputs["pixel_values"][:2]})
    assert output.logits_per_image.shape == (2, 4) and output.logits_per_text.shape == (4, 2)


@pytest.mark.parametrize(
    ("names", "return_loss", "named"),
    [((), False, "input_ids"), (("input_ids",), True, "return_loss"), (("pixel_values",), True, "return_loss")],
)
def test_missing_inputs_are_refused(model, tiny_inputs, names, return_loss, named):
    with pytest.raises(ValueError, match=named):
        model(**{name: tiny_inputs[name] for name in names}, return_loss=return_loss)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(model, tiny_inputs):
    batch = model(**tiny_inputs)
    for i in range(4):
        row = model(**{name: tensor[i : i + 1] for name, tensor in tiny_inputs.items()})
        torch.testing.assert_close(row.image_embeds[0], batch.image_embeds[i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(row.text_embeds[0], batch.text_embeds[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(model(**tiny_inputs).logits_per_image, batch.logits_per_image)


@torch.no_grad()
def test_interpolate_pos_encoding_takes_other_sizes(model, tiny_inputs):
    larger = interpolate(tiny_inputs["pixel_values"], 48)
    with pytest.raises(ValueError, match="48"):
        model(pixel_values=larger)
    output = model(pixel_values=larger, interpolate_pos_encoding=True)
    assert output.vision_model_output.last_hidden_state.shape == (4, 1 + 36, 32)
    torch.testing.assert_close(model.encode_image(larger, interpolate_pos_encoding=True), output.image_embeds)
    native = model.encode_image(tiny_inputs["pixel_values"], interpolate_pos_encoding=True)
    torch.testing.assert_close(native, model.encode_image(tiny_inputs["pixel_values"]))


@torch.no_grad()
def test_token_type_ids_reach_an_encoder_that_knows_them(model, tiny_inputs):
    output = model(**tiny_inputs, token_type_ids=torch.zeros_like(tiny_inputs["input_ids"]))
    torch.testing.assert_close(output.text_embeds, model(**tiny_inputs).text_embeds)
    output = model(**tiny_inputs, token_type_ids=torch.ones_like(tiny_inputs["input_ids"]))
    assert not torch.allclose(output.text_embeds, model(**tiny_inputs).text_embeds, atol=1e-3)


@torch.no_grad()
def test_texts_longer_than_the_positions_are_cut(model, tiny_inputs):
    """Pipelines never truncate: a label of 500 words must not fail."""
    long_ids = tiny_inputs["input_ids"][:1].repeat(1, 70)
    ones = torch.ones_like(long_ids)
    cut = model.encode_text(long_ids, ones, token_type_ids=ones, position_ids=None)
    torch.testing.assert_close(cut, model.encode_text(long_ids[:, :40], token_type_ids=ones[:, :40]))
    assert not torch.allclose(cut, model.encode_text(long_ids[:, :39], token_type_ids=ones[:, :39]), atol=1e-4)


@pytest.mark.parametrize("text_type", ["bert", "distilbert"])
@torch.no_grad()
def test_zero_shot_pipeline(tiny_config, tiny_processor, text_type):
    """It brings `token_type_ids` along, which DistilBERT does not take; its scores are the softmax of our logits."""
    if text_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "initializer_range": 0.1}
        text_config = {"model_type": "distilbert", **sizes}
        tiny_config = COTSConfig(text_config=text_config, vision_config=tiny_config.vision_config)
    model = COTSModel(tiny_config).eval()
    tokenizer, image_processor = copy.deepcopy(tiny_processor.tokenizer), tiny_processor.image_processor
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    image, labels = Image.linear_gradient("L"), ["a red circle", "a dog on the beach", "large yellow star"]
    classify = pipeline(
        "zero-shot-image-classification", model, tokenizer=tokenizer, image_processor=image_processor, device="cpu"
    )
    scores = {answer["label"]: answer["score"] for answer in classify(image, labels, hypothesis_template="{}")}
    inputs = {**tokenizer(labels, padding=True, return_tensors="pt"), **image_processor(image, return_tensors="pt")}
    assert "token_type_ids" in inputs
    expected = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


@torch.no_grad()
def test_feature_pipelines_return_embeddings(model, tiny_processor):
    tokenizer, image_processor = tiny_processor.tokenizer, tiny_processor.image_processor
    text = pipeline("feature-extraction", model, tokenizer=tokenizer, device="cpu")("a red circle")
    expected = model.encode_text(**tokenizer("a red circle", return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(text), expected)
    pil_image = Image.radial_gradient("L")
    image = pipeline("image-feature-extraction", model, image_processor=image_processor, device="cpu")(pil_image)
    expected = model.encode_image(**image_processor(pil_image, return_tensors="pt"))
    torch.testing.assert_close(torch.tensor(image), expected)


def test_stock_trainer_fine_tunes_it(model, tiny_inputs, tmp_path):
    model.config.temperature = 0.5
    pairs = [{name: tensor[i] for name, tensor in tiny_inputs.items()} for i in range(4)]

    def collate(examples):
        return {name: torch.stack([example[name] for example in examples]) for name in pairs[0]} | {
            "return_loss": True
        }

    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=pairs, eval_dataset=pairs)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before / 2


@pytest.mark.parametrize("entry", ["encode_image", "get_image_features"])
def test_raw_pixels_are_refused(model, tiny_inputs, entry):
    """transformers' encoders would cast them silently."""
    with pytest.raises(ValueError, match="normalized floats"):
        getattr(model, entry)(tiny_inputs["pixel_values"].to(torch.uint8))
