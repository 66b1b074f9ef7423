"""COTSForPreTraining: the masked passes against a slow twin, the heads, and its checkpoints beside COTSModel's."""

import pytest
import torch
from torch import nn
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_cots import COTSForPreTraining, COTSModel, modeling_cots_pretraining

VISION_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
HEADS = {"text_to_image", "image_to_text", "cmvm_head", "cmlm_head"}


@pytest.fixture
def model(tiny_config) -> COTSForPreTraining:
    torch.manual_seed(0)
    model = COTSForPreTraining(tiny_config).eval()
    nn.init.normal_(model.cots.vision_model.embeddings.mask_token)  # zero at the start, and so invisible
    return model


@torch.no_grad()
def twin_image_token_logits(model, inputs) -> torch.Tensor:
    """CMVM by hand, a pair and a patch at a time: hide patches, run the ViT, add the text's feature, classify."""
    cots, vit, rows = model.cots, model.cots.vision_model, []
    for i in range(len(inputs["pixel_values"])):
        length = int(inputs["attention_mask"][i].sum())
        text_feature = cots.text_model(inputs["input_ids"][i : i + 1, :length]).last_hidden_state[0].mean(dim=0)
        patches = vit.embeddings.patch_embeddings(inputs["pixel_values"][i : i + 1])[0]
        masked = inputs["bool_masked_pos"][i].tolist()
        visible = [
            vit.embeddings.mask_token[0, 0] if hide else patch for patch, hide in zip(patches, masked, strict=True)
        ]
        hidden_states = (
            torch.stack([vit.embeddings.cls_token[0, 0], *visible])[None] + vit.embeddings.position_embeddings
        )
        for layer in vit.layers:
            hidden_states = layer(hidden_states)
        hidden_states = vit.layernorm(hidden_states)[0]
        for j, hide in enumerate(masked):
            if hide:
                rows.append(model.cmvm_head(hidden_states[1 + j] + model.text_to_image(text_feature)))
    return torch.stack(rows)


@torch.no_grad()
def twin_text_token_logits(model, inputs) -> torch.Tensor:
    """CMLM by hand, a pair and a word at a time: run BERT on the changed words, add the image's feature, classify."""
    cots, rows = model.cots, []
    for i in range(len(inputs["input_ids"])):
        image_feature = cots.vision_model(inputs["pixel_values"][i : i + 1]).last_hidden_state[0, 0]
        length = int(inputs["attention_mask"][i].sum())
        hidden_states = cots.text_model(inputs["masked_input_ids"][i : i + 1, :length]).last_hidden_state[0]
        for j in range(length):
            if inputs["masked_token_pos"][i, j]:
                vector = model.cmlm_head[0](hidden_states[j] + model.image_to_text(image_feature))
                rows.append(cots.get_input_embeddings().weight @ vector + model.cmlm_head[1].bias)
    return torch.stack(rows)


@torch.no_grad()
def test_token_logits_equal_the_twin(model, tiny_masked_inputs):
    output = model(**tiny_masked_inputs)
    for logits, twin in (
        (output.image_token_logits, twin_image_token_logits(model, tiny_masked_inputs)),
        (output.text_token_logits, twin_text_token_logits(model, tiny_masked_inputs)),
    ):
        torch.testing.assert_close(logits, twin, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_embeddings_are_those_of_the_unmasked_pairs(model, tiny_inputs, tiny_masked_inputs):
    output, expected = model(**tiny_masked_inputs), model.cots(**tiny_inputs)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=0)
    for name in ("text_model_output", "vision_model_output"):
        torch.testing.assert_close(output[name].last_hidden_state, expected[name].last_hidden_state)


@pytest.mark.parametrize("vision", [{"model_type": "vit"}, {"model_type": "beit"}, {"model_type": "dinov2"}])
def test_joined_passes_equal_passes_one_after_the_other(tiny_config, tiny_masked_inputs, monkeypatch, vision):
    """Outputs and gradients, whichever way the encoder hides patches; both ways really taken."""
    if vision["model_type"] != "vit":
        sizes = {name: getattr(tiny_config.vision_config, name) for name in VISION_SIZES}
        tiny_config = type(tiny_config)(
            text_config=tiny_config.text_config,
            vision_config={**vision, **sizes, "use_mask_token": True},
            projection_dim=16,
            image_vocab_size=50,
        )
    torch.manual_seed(0)
    model = COTSForPreTraining(tiny_config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mask_token"):
            nn.init.normal_(parameter)
    passes, results = [], []
    for encoder in (model.cots.vision_model, model.cots.text_model):
        encoder.register_forward_hook(lambda module, args, output: passes.append(len(output.last_hidden_state)))
    for limit in (0, 2**20):
        monkeypatch.setattr(modeling_cots_pretraining, "MAX_JOINED_POSITIONS", limit)
        model.zero_grad()
        output = model(**tiny_masked_inputs)
        outputs = [output[name] for name in ("image_embeds", "text_embeds", "image_token_logits", "text_token_logits")]
        sum((value * torch.linspace(-1, 1, value.shape[1])).square().mean() for value in outputs).backward()
        encoded = [output.vision_model_output.last_hidden_state, output.text_model_output.last_hidden_state]
        gradients = [parameter.grad for parameter in model.parameters()]
        results.append([*outputs, *encoded, *gradients])
    assert passes == [4, 4, 4, 4, 8, 8]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_small_batches_are_joined_and_large_ones_are_not(model, tiny_masked_inputs, monkeypatch):
    passes = []
    model.cots.vision_model.register_forward_hook(lambda *args: passes.append("image"))
    model.cots.text_model.register_forward_hook(lambda *args: passes.append("text"))
    for limit, expected in (
        (2 * 4 * 16, ["image", "text"]),
        (2 * 4 * 16 - 1, ["image", "image", "text"]),
        (2 * 4 * 7 - 1, ["image", "image", "text", "text"]),
    ):
        monkeypatch.setattr(modeling_cots_pretraining, "MAX_JOINED_POSITIONS", limit)
        passes.clear()
        model(**tiny_masked_inputs)
        assert passes == expected
    monkeypatch.setattr(modeling_cots_pretraining, "MAX_JOINED_POSITIONS", 2 * 4 * 16)
    passes.clear()
    model(**tiny_masked_inputs, output_hidden_states=True)
    assert passes == ["image", "image", "text", "text"], "layers that are shown are not joined"


@torch.no_grad()
def test_without_masks_there_is_no_masked_pass(model, tiny_inputs):
    passes = []
    model.cots.text_model.register_forward_hook(lambda *args: passes.append("text"))
    model.cots.vision_model.register_forward_hook(lambda *args: passes.append("image"))
    output = model(**tiny_inputs)
    assert passes == ["image", "text"]
    assert output.image_token_logits is None and output.text_token_logits is None


@torch.no_grad()
def test_one_masked_pass_alone(model, tiny_inputs, tiny_masked_inputs):
    both = model(**tiny_masked_inputs)
    images = model(**tiny_inputs, bool_masked_pos=tiny_masked_inputs["bool_masked_pos"])
    texts = model(
        **tiny_inputs, **{name: tiny_masked_inputs[name] for name in ("masked_input_ids", "masked_token_pos")}
    )
    assert torch.equal(images.image_token_logits, both.image_token_logits) and images.text_token_logits is None
    assert torch.equal(texts.text_token_logits, both.text_token_logits) and texts.image_token_logits is None


@torch.no_grad()
def test_heads_see_masked_positions_only(model, tiny_masked_inputs):
    rows = {}
    for name in ("cmvm_head", "cmlm_head"):
        head = getattr(model, name)
        head.register_forward_hook(lambda module, args, output, name=name: rows.update({name: args[0].shape}))
    output = model(**tiny_masked_inputs)
    num_patches, num_words = (tiny_masked_inputs[name].sum() for name in ("bool_masked_pos", "masked_token_pos"))
    assert rows == {"cmvm_head": (num_patches, 32), "cmlm_head": (num_words, 32)}
    assert output.image_token_logits.shape == (num_patches, 50) and output.text_token_logits.shape == (num_words, 99)


@torch.no_grad()
def test_masks_of_integers_select_as_masks_of_bools(model, tiny_masked_inputs):
    expected = model(**tiny_masked_inputs)
    for name in ("bool_masked_pos", "masked_token_pos"):
        tiny_masked_inputs[name] = tiny_masked_inputs[name].long()
    output = model(**tiny_masked_inputs)
    assert torch.equal(output.image_token_logits, expected.image_token_logits)
    assert torch.equal(output.text_token_logits, expected.text_token_logits)


@pytest.mark.parametrize("missing", ["masked_input_ids", "masked_token_pos"])
def test_half_of_the_text_masks_is_refused(model, tiny_masked_inputs, missing):
    del tiny_masked_inputs[missing]
    with pytest.raises(ValueError, match="masked_input_ids.*masked_token_pos"):
        model(**tiny_masked_inputs)


@torch.no_grad()
def test_masked_pixels_stay_hidden(model, tiny_masked_inputs):
    """Only the embedding, not the prediction, may know what a masked patch shows."""
    mask = tiny_masked_inputs["bool_masked_pos"].view(4, 1, 4, 4)
    pixels = mask.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed = {**tiny_masked_inputs, "pixel_values": tiny_masked_inputs["pixel_values"].masked_fill(pixels, 3.0)}
    expected, output = model(**tiny_masked_inputs), model(**changed)
    torch.testing.assert_close(output.image_token_logits, expected.image_token_logits)
    assert not torch.allclose(output.image_embeds, expected.image_embeds, atol=1e-2)


@pytest.mark.parametrize(
    ("logits", "other_encoder", "bridge"),
    [("image_token_logits", "text_model", "text_to_image"), ("text_token_logits", "vision_model", "image_to_text")],
)
def test_gradient_reaches_the_other_encoder_through_its_global_feature(
    model, tiny_masked_inputs, logits, other_encoder, bridge
):
    """And through nothing else: without the bridge there is none."""
    parameters = list(getattr(model.cots, other_encoder).parameters())

    def gradient_norm() -> float:
        loss = model(**tiny_masked_inputs)[logits].square().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return sum(gradient.norm().item() for gradient in gradients if gradient is not None)

    assert gradient_norm() > 1e-2
    nn.init.zeros_(getattr(model, bridge).weight)
    assert gradient_norm() == 0


@torch.no_grad()
def test_interpolate_pos_encoding_takes_other_sizes(model, tiny_masked_inputs):
    tiny_masked_inputs["pixel_values"] = nn.functional.interpolate(tiny_masked_inputs["pixel_values"], 48)
    tiny_masked_inputs["bool_masked_pos"] = torch.rand(4, 36) < 0.4
    output = model(**tiny_masked_inputs, interpolate_pos_encoding=True)
    assert output.image_token_logits.shape == (tiny_masked_inputs["bool_masked_pos"].sum(), 50)
    assert output.vision_model_output.last_hidden_state.shape == (4, 1 + 36, 32)


# Checkpoints


def test_pre_training_checkpoint_becomes_a_cots_model(model, tiny_inputs, tmp_path):
    model.save_pretrained(tmp_path)
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as captured:
        exported, info = COTSModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert "UNEXPECTED" not in captured.out and "MISSING" not in captured.out
    expected = dict(model.cots.state_dict())
    del expected["vision_model.embeddings.mask_token"]
    assert exported.state_dict().keys() == expected.keys()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    exported(**tiny_inputs)


def test_cots_model_goes_on_to_pre_training(tiny_config, tmp_path):
    base = COTSModel(tiny_config)
    base.save_pretrained(tmp_path)
    model, info = COTSForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = {name for name in model.state_dict() if name.split(".")[0] in HEADS}
    expected.remove("cmlm_head.1.weight")  # tied to the word embeddings, which are there
    expected.add("cots.vision_model.embeddings.mask_token")
    assert info["missing_keys"] == expected
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.cots.state_dict()[name], tensor), name


def test_masked_text_head_is_tied(tiny_config, tmp_path):
    model = COTSForPreTraining(tiny_config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    reloaded = COTSForPreTraining.from_pretrained(tmp_path)
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight


def test_masked_text_head_untied(tiny_config, tmp_path):
    tiny_config.tie_word_embeddings = False
    model = COTSForPreTraining(tiny_config)
    model.save_pretrained(tmp_path)
    reloaded = COTSForPreTraining.from_pretrained(tmp_path)
    head, words = reloaded.get_output_embeddings().weight, reloaded.get_input_embeddings().weight
    assert head is not words and not torch.equal(head, words)
    assert torch.equal(head, model.get_output_embeddings().weight)
    reloaded.resize_token_embeddings(120)
    resized = reloaded.get_output_embeddings()
    assert resized is reloaded.cmlm_head[1] and resized.weight.shape == (120, 32) and resized.bias.shape == (120,)
    assert torch.equal(resized.weight[:99], head)


def test_embeddings_narrower_than_the_model_cannot_be_tied(tiny_config):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    albert = {"model_type": "albert", "embedding_size": 16, "vocab_size": 99, **sizes}
    config = type(tiny_config)(text_config=albert, vision_config=tiny_config.vision_config)
    with pytest.raises(ValueError, match=r"\(99, 16\).*\(99, 32\).*tie_word_embeddings=False"):
        COTSForPreTraining(config)
    config.tie_word_embeddings = False
    assert COTSForPreTraining(config).get_output_embeddings().weight.shape == (99, 32)
