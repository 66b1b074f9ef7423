"""GAE relevance maps against the rule written out in float64, and what they must and must not depend on."""

import copy

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from modeling_cots import COTSConfig, COTSModel
from modeling_cots.visualization.relevance import (
    explain_pair,
    find_words,
    image_relevance,
    text_relevance,
    word_targets,
)

CAPTION = "a red circle above a small blue square"


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    tiny_config.temperature = 0.5
    return build(tiny_config)


def build(config: COTSConfig) -> COTSModel:
    model = COTSModel(config)
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.fixture
def targets(model) -> torch.Tensor:
    """Three unit-length embeddings for each of the four rows of `tiny_inputs`."""
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(4, 3, model.config.projection_dim, generator=generator), dim=-1)


def slow_twin(encoder, features_of, projection, inputs: dict, target: torch.Tensor, temperature: float):
    """R of one sample, (N, N): the rule of the paper, token by token and head by head, in float64."""
    outputs = encoder(**inputs, output_attentions=True)
    embedding = projection(features_of(outputs.last_hidden_state))[0]
    score = sum(a * b for a, b in zip(embedding, target, strict=True)) / (embedding.pow(2).sum().sqrt() * temperature)
    relevance = torch.eye(outputs.attentions[0].shape[-1], dtype=torch.float64)
    for attention in outputs.attentions:
        (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
        size, num_heads = len(relevance), attention.shape[1]
        passed_on = torch.zeros(size, size, dtype=torch.float64)
        for row in range(size):
            for column in range(size):
                products = [gradient[0, h, row, column] * attention[0, h, row, column] for h in range(num_heads)]
                passed_on[row, column] = sum(max(0.0, product.item()) for product in products) / num_heads
        relevance = relevance + passed_on @ relevance
    return relevance


def test_image_maps_equal_a_slow_twin_in_float64(model, tiny_inputs, targets):
    fast = image_relevance(model, tiny_inputs["pixel_values"], targets)
    assert fast.shape == (4, 3, 4, 4)
    exact = copy.deepcopy(model).double()
    for row, column in ((0, 0), (3, 2)):
        inputs = {"pixel_values": tiny_inputs["pixel_values"][row : row + 1].double()}
        target = targets[row, column].double()
        twin = slow_twin(
            exact.vision_model, lambda states: states[:, 0], exact.vision_projection, inputs, target, temperature=0.5
        )
        assert twin[0, 1:].max() > 1e-3
        torch.testing.assert_close(fast[row, column].flatten().double(), twin[0, 1:], rtol=1e-4, atol=1e-7)


def test_image_maps_of_the_mean_of_patches_equal_a_slow_twin_in_float64(tiny_config, tiny_inputs, targets):
    """Half of the global image feature is [CLS], and half the mean of the patches, whose rows of R count alike."""
    tiny_config.image_pooling = "cls_mean"
    torch.manual_seed(0)
    tiny_config.temperature = 0.5
    model = build(tiny_config)
    fast = image_relevance(model, tiny_inputs["pixel_values"], targets)
    exact = copy.deepcopy(model).double()
    inputs, target = {"pixel_values": tiny_inputs["pixel_values"][:1].double()}, targets[0, 1].double()

    def pool(states):
        return torch.cat([states[:, 0], states[:, 1:].mean(dim=1)], dim=1)

    twin = slow_twin(exact.vision_model, pool, exact.vision_projection, inputs, target, temperature=0.5)
    size = len(twin)
    expected = 0.5 * twin[0] + 0.5 * (twin - torch.eye(size, dtype=torch.float64))[1:].mean(dim=0)
    assert expected[1:].max() > 1e-4
    torch.testing.assert_close(fast[0, 1].flatten().double(), expected[1:], rtol=1e-4, atol=1e-7)


def test_text_maps_equal_a_slow_twin_in_float64(model, tiny_inputs, targets):
    fast = text_relevance(model, tiny_inputs["input_ids"], tiny_inputs["attention_mask"], targets)
    assert fast.shape == (4, 3, 7)
    exact = copy.deepcopy(model).double()
    for row, length in ((0, 7), (1, 5)):
        inputs = {"input_ids": tiny_inputs["input_ids"][row : row + 1, :length]}
        target = targets[row, 1].double()
        twin = slow_twin(
            exact.text_model, lambda states: states.mean(dim=1), exact.text_projection, inputs, target, temperature=0.5
        )
        expected = (twin - torch.eye(length, dtype=torch.float64)).mean(dim=0)
        assert expected.max() > 1e-4
        torch.testing.assert_close(fast[row, 1, :length].double(), expected, rtol=1e-4, atol=1e-7)
        assert (fast[row, 1, length:] == 0).all()


def test_a_batch_gives_what_its_rows_give_alone(model, tiny_inputs, targets):
    images = image_relevance(model, tiny_inputs["pixel_values"], targets)
    texts = text_relevance(model, tiny_inputs["input_ids"], tiny_inputs["attention_mask"], targets)
    for row in range(4):
        one = slice(row, row + 1)
        length = int(tiny_inputs["attention_mask"][row].sum())
        ids, mask = tiny_inputs["input_ids"][one, :length], tiny_inputs["attention_mask"][one, :length]
        for place in range(3):
            only = targets[one, place : place + 1]
            alone = image_relevance(model, tiny_inputs["pixel_values"][one], only)[0, 0]
            torch.testing.assert_close(alone, images[row, place], rtol=1e-4, atol=1e-7)
            alone = text_relevance(model, ids, mask, only)[0, 0]
            torch.testing.assert_close(alone, texts[row, place, :length], rtol=1e-4, atol=1e-7)


def test_word_targets_are_the_caption_less_the_caption_without_the_word(model, tiny_processor):
    tokenizer = tiny_processor.tokenizer
    captions = [CAPTION, "the white dog runs"]
    words = [["red", "small blue"], ["white", "runs"]]
    without = [
        ["a circle above a small blue square", "a red circle above a square"],
        ["the dog runs", "the white dog"],
    ]
    tokens = tokenizer(captions, padding=True, return_offsets_mapping=True, return_tensors="pt")
    masks = torch.zeros(2, 2, tokens["input_ids"].shape[1], dtype=torch.bool)
    for row, caption in enumerate(captions):
        for place, word in enumerate(find_words(caption, tokens["offset_mapping"][row].tolist(), words[row])):
            masks[row, place, list(word.positions)] = True
    found = word_targets(model, tokens["input_ids"], tokens["attention_mask"], masks)
    with torch.no_grad():
        for row, caption in enumerate(captions):
            whole = model.encode_text(**encode(tokenizer, caption))[0]
            for place, rest in enumerate(without[row]):
                torch.testing.assert_close(found[row, place], whole - model.encode_text(**encode(tokenizer, rest))[0])
    assert found.abs().max() > 0.01


def encode(tokenizer, caption: str) -> dict:
    tokens = tokenizer(caption, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def test_relevance_is_drawn_to_the_patch_that_decides(tiny_config):
    """One layer that attends evenly and passes on one channel: what lights up this channel is the map's maximum."""
    tiny_config.vision_config.num_hidden_layers = 1
    tiny_config.vision_config.num_attention_heads = 1
    model = build(tiny_config)
    layer = model.vision_model.layers[0]
    with torch.no_grad():
        for name, parameter in model.vision_model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        patches = next(m for m in model.vision_model.modules() if isinstance(m, torch.nn.Conv2d))
        patches.weight[0] = 0.05  # channel 0 of a patch: how bright it is
        model.vision_model.embeddings.cls_token[..., 1] = 1.0  # its own direction, which brightness turns
        linear = [m for m in layer.modules() if isinstance(m, torch.nn.Linear) and m.weight.shape == (32, 32)]
        for value_or_output in linear[2:]:
            value_or_output.weight.copy_(torch.eye(32))
        model.vision_projection.weight.zero_()
        model.vision_projection.weight[0, 0] = 1.0
        model.vision_projection.bias.fill_(0.1)
    pixel_values = torch.zeros(1, 3, 32, 32)
    pixel_values[..., 8:16, 16:24] = 1.0  # row 1, column 2
    target = F.one_hot(torch.tensor([[0]]), model.config.projection_dim).float()
    relevance = image_relevance(model, pixel_values, target)[0, 0]
    assert relevance.argmax() == 1 * 4 + 2
    assert relevance[1, 2] > 2 * relevance.flatten().sort().values[-2]


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_images_of_another_size_have_maps_of_another_shape(model, size):
    targets = torch.ones(1, 1, model.config.projection_dim)
    relevance = image_relevance(model, torch.randn(1, 3, *size), targets, interpolate_pos_encoding=True)
    assert relevance.shape == (1, 1, size[0] // 8, size[1] // 8)


def test_the_callers_gradient_mode_and_a_frozen_model_do_not_matter(model, tiny_inputs, targets):
    expected = image_relevance(model, tiny_inputs["pixel_values"], targets)
    with torch.no_grad():
        assert torch.equal(image_relevance(model, tiny_inputs["pixel_values"], targets), expected)
    with torch.inference_mode():
        inputs = {name: tensor + 0 for name, tensor in tiny_inputs.items()}
        assert torch.equal(image_relevance(model, inputs["pixel_values"], targets + 0), expected)
        text_relevance(model, inputs["input_ids"], inputs["attention_mask"], targets + 0)
    model.requires_grad_(False)
    assert torch.equal(image_relevance(model, tiny_inputs["pixel_values"], targets), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refuses_what_has_no_maps(model, tiny_inputs, targets):
    ids, mask, pixel_values = (tiny_inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    model.set_attn_implementation("sdpa")
    for call in (
        lambda: image_relevance(model, pixel_values, targets),
        lambda: text_relevance(model, ids, mask, targets),
    ):
        with pytest.raises(ValueError, match="attn_implementation='eager'"):
            call()
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        text_relevance(model, ids, mask, targets)
    model.train()
    for call in (
        lambda: image_relevance(model, pixel_values, targets),
        lambda: text_relevance(model, ids, mask, targets),
        lambda: word_targets(model, ids, mask, mask.bool().unsqueeze(1)),
    ):
        with pytest.raises(ValueError, match="model.eval()"):
            call()


def test_words_join_their_pieces(tiny_tokenizer):
    caption = "The beachwalk, a dog-walk; a dog."
    tokens = tiny_tokenizer(caption, return_offsets_mapping=True)
    words = {word.text: word for word in find_words(caption, tokens["offset_mapping"])}
    assert list(words) == ["The", "beachwalk", "a", "dog-walk", "dog"]
    assert len(words["beachwalk"].positions) > 1
    pieces = [tiny_tokenizer.convert_ids_to_tokens(tokens["input_ids"][p]) for p in words["beachwalk"].positions]
    assert "".join(piece.removeprefix("##") for piece in pieces) == "beachwalk"
    positions = [position for word in find_words(caption, tokens["offset_mapping"]) for position in word.positions]
    assert positions == sorted(set(positions))  # no piece twice, and none of [CLS], [SEP] and the full stop
    assert 0 not in positions and len(tokens["input_ids"]) - 1 not in positions


def test_words_asked_for_may_be_phrases_and_occur_twice(tiny_tokenizer):
    offsets = tiny_tokenizer(CAPTION, return_offsets_mapping=True)["offset_mapping"]
    everything = {word.text: word.positions for word in find_words(CAPTION, offsets)}
    phrase, twice = find_words(CAPTION, offsets, ["Small BLUE", "a"])
    assert phrase.text == "small blue"
    assert phrase.positions == everything["small"] + everything["blue"]
    assert len(twice.positions) == 2


@pytest.mark.parametrize("word", ["dog", "squ", "", " "])
def test_refuses_a_word_that_is_not_there(tiny_tokenizer, word):
    offsets = tiny_tokenizer(CAPTION, return_offsets_mapping=True)["offset_mapping"]
    with pytest.raises(ValueError, match="There is no"):
        find_words(CAPTION, offsets, [word])


def test_refuses_a_word_that_was_cut_off(tiny_tokenizer):
    offsets = tiny_tokenizer(CAPTION, truncation=True, max_length=5, return_offsets_mapping=True)["offset_mapping"]
    with pytest.raises(ValueError, match="'square' is cut off: the model reads 5 tokens"):
        find_words(CAPTION, offsets, ["square"])
    kept = [word.text for word in find_words(CAPTION, offsets)]
    assert 1 < len(kept) < 4 and kept == CAPTION.split()[: len(kept)]


def test_a_pair_explained(model, tiny_processor):
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    result = explain_pair(model, tiny_processor, image, CAPTION, ["blue square", "red"])
    assert [word.text for word in result.words] == ["blue square", "red"]
    assert result.caption_map.shape == (4, 4) and result.word_maps.shape == (2, 4, 4)
    assert [word.text for word in result.caption_words] == CAPTION.split()
    assert result.caption_relevance.shape == (8,) and result.caption_relevance.max() > 0
    inputs = tiny_processor(
        images=image, text=[CAPTION, "a circle above a small blue square"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**inputs)
    whole, without_red = (outputs.logits_per_image[0] * model.config.temperature).tolist()
    assert result.score == pytest.approx(whole, abs=1e-5)
    assert result.word_scores[1].item() == pytest.approx(whole - without_red, abs=1e-5)
    whole_map = image_relevance(model, inputs["pixel_values"], outputs.text_embeds[:1].unsqueeze(1))[0, 0]
    torch.testing.assert_close(result.caption_map, whole_map)


def test_by_default_the_words_that_matter_most_are_explained(model, tiny_processor):
    image = Image.effect_noise((32, 32), 80)
    result = explain_pair(model, tiny_processor, image, CAPTION)
    assert len(result.words) == len(result.word_maps) == 6
    least_of_them = min(result.caption_relevance[result.caption_words.index(word)] for word in result.words)
    assert (result.caption_relevance > least_of_them).sum() == 5
    assert [result.caption_words.index(word) for word in result.words] == sorted(
        result.caption_words.index(word) for word in result.words
    )
    assert len(explain_pair(model, tiny_processor, image, "a dog").words) == 2
    assert explain_pair(model, tiny_processor, image, CAPTION, []).word_maps.shape == (0, 4, 4)
    assert explain_pair(model, tiny_processor, image, "").words == []
