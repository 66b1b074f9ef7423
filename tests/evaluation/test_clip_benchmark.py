"""The loader for CLIP_benchmark: the embeddings are those of the model with its processor."""

import pickle

import pytest
import torch
from PIL import Image

from modeling_cots import COTSModel, load_clip_benchmark

TEXTS = ["a red circle", "the white dog runs on dark grass near a boat", ""]


@pytest.fixture
def folder(tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    return str(tmp_path)


@torch.no_grad()
def test_texts_have_the_embeddings_that_each_has_alone(folder, tiny_processor):
    model, _, tokenizer = load_clip_benchmark(folder)
    tokens = tokenizer(TEXTS)
    assert tokens.dtype == torch.int64 and tokens.shape[0] == 3 and (tokens == -1).any()
    reference = COTSModel.from_pretrained(folder).eval()
    for text, found in zip(TEXTS, model.encode_text(tokens), strict=True):
        (alone,) = reference.encode_text(**tiny_processor(text=[text], return_tensors="pt"))
        torch.testing.assert_close(found, alone)


def test_a_string_is_a_list_of_one_and_long_texts_are_cut(folder):
    _, _, tokenizer = load_clip_benchmark(folder)
    assert torch.equal(tokenizer("a red circle"), tokenizer(["a red circle"]))
    assert tokenizer(("a red circle " * 60,)).shape == (1, 40)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_images_of_any_mode_have_the_embeddings_of_the_processor(folder, tiny_processor, mode):
    model, transform, _ = load_clip_benchmark(folder)
    image = Image.new("RGB", (50, 20), (200, 100, 0)).convert(mode)
    pixels = transform(image)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    reference = COTSModel.from_pretrained(folder).eval()
    expected = reference.encode_image(**tiny_processor(images=[image], return_tensors="pt"))
    torch.testing.assert_close(model.encode_image(pixels[None]), expected)


def test_the_model_is_ready_and_its_transform_can_be_sent_to_workers(folder, image):
    model, transform, tokenizer = load_clip_benchmark(folder, device="cpu")
    assert not model.training and not any(module.training for module in model.modules())
    again, tokens = pickle.loads(pickle.dumps((transform, tokenizer)))
    assert torch.equal(again(image), transform(image)) and torch.equal(tokens(TEXTS), tokenizer(TEXTS))
