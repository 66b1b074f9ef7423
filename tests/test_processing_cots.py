"""COTSProcessor: any image, text and video to the inputs of COTSModel, saved and loaded as one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from modeling_cots import COTSModel, COTSProcessor

TEXTS = ["a red circle", "two green triangles beside one large yellow star"]


@pytest.fixture
def image() -> Image.Image:
    return Image.radial_gradient("L").convert("RGB").resize((50, 30))


@pytest.fixture
def video() -> np.ndarray:
    """Seven frames (height 30, width 50), each of one grey, lighter and lighter."""
    return np.full((7, 30, 50, 3), 1, np.uint8) * (30 * np.arange(7, dtype=np.uint8))[:, None, None, None]


def test_images_and_texts_become_the_inputs_of_the_model(tiny_processor, tiny_config, image):
    inputs = tiny_processor(images=[image, image], text=TEXTS, padding=True, return_tensors="pt")
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["attention_mask"].sum(1).tolist() == [len(ids) for ids in tiny_processor(text=TEXTS)["input_ids"]]
    with torch.no_grad():
        assert COTSModel(tiny_config).eval()(**inputs).logits_per_image.shape == (2, 2)


def test_parts_do_what_they_do_alone(tiny_processor, image):
    together = tiny_processor(images=image, text=TEXTS, padding=True, return_tensors="pt")
    pixels = tiny_processor.image_processor(image, return_tensors="pt")
    text = tiny_processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(together["pixel_values"], pixels["pixel_values"])
    assert torch.equal(together["input_ids"], text["input_ids"])
    assert set(tiny_processor(text=TEXTS)) == {"input_ids", "attention_mask"}
    assert set(tiny_processor(images=image)) == {"pixel_values"}


def test_returned_keys_are_model_input_names(tiny_processor, image, video):
    inputs = tiny_processor(images=image, text="a dog", videos=video, return_tensors="pt")
    assert set(inputs) == set(tiny_processor.model_input_names)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode(tiny_processor, image, mode):
    source = image.convert("L") if mode == "I;16" else image
    pixels = tiny_processor(images=[source.convert(mode), image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32) and pixels.isfinite().all()


def test_video_frames_are_prepared_as_images(tiny_processor, video):
    """Four of seven frames, from the middle of equal segments; an image of the same gray gives the same pixels."""
    frames = tiny_processor(videos=video, return_tensors="pt")["pixel_values_videos"]
    assert frames.shape == (1, 4, 3, 32, 32)
    for frame, position in zip(frames[0], (0, 2, 4, 6), strict=True):
        as_image = tiny_processor(images=Image.fromarray(video[position]), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(frame, as_image, atol=1e-2, rtol=0)


def test_videos_and_texts_of_different_lengths(tiny_processor, video):
    inputs = tiny_processor(videos=[video, video[:2]], text=TEXTS, padding=True, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, 32, 32)


def test_number_of_frames_may_change_at_the_call(tiny_processor, video):
    assert tiny_processor(videos=video, num_frames=3, return_tensors="pt")["pixel_values_videos"].shape[1] == 3
    flat = tiny_processor(text=TEXTS, max_length=4, truncation=True, videos_kwargs={"num_frames": 2}, videos=video)
    assert [len(ids) for ids in flat["input_ids"]] == [4, 4] and len(flat["pixel_values_videos"][0]) == 2


def test_keyword_arguments_flat_and_nested(tiny_processor, image):
    flat = tiny_processor(images=image, text=TEXTS, do_normalize=False, padding="max_length", max_length=9)
    nested = tiny_processor(
        images=image,
        text=TEXTS,
        images_kwargs={"do_normalize": False},
        text_kwargs={"padding": "max_length", "max_length": 9},
    )
    assert len(flat["input_ids"][0]) == 9 and flat["input_ids"] == nested["input_ids"]
    pixels = flat["pixel_values"][0]
    assert torch.equal(pixels, nested["pixel_values"][0]) and 0 <= pixels.min() < 0.5 < pixels.max() <= 1


def test_no_input_and_doubly_given_arguments_are_refused(tiny_processor, image):
    with pytest.raises(ValueError):
        tiny_processor()
    with pytest.raises(ValueError):
        tiny_processor(images=image, images_kwargs={"do_resize": False}, do_resize=True)
    parts = tiny_processor.image_processor, tiny_processor.tokenizer, tiny_processor.video_processor
    with pytest.raises(TypeError, match="feature_extractor"):
        COTSProcessor(*parts, feature_extractor=tiny_processor.image_processor)
    with pytest.raises(TypeError, match="video_processor"):
        COTSProcessor(*parts[:2])


def test_saving_keeps_every_part(tiny_processor, tmp_path, image, video):
    tiny_processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "COTSProcessor" and saved["image_processor"]["do_convert_rgb"] is True
    for processor_class in (COTSProcessor, AutoProcessor):
        reloaded = processor_class.from_pretrained(tmp_path)
        assert isinstance(reloaded, COTSProcessor)
        assert reloaded.to_dict() == tiny_processor.to_dict()
        call = {"images": image, "text": "a red circle", "videos": video, "return_tensors": "pt"}
        expected, found = tiny_processor(**call), reloaded(**call)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_unknown_words_and_empty_texts(tiny_processor):
    inputs = tiny_processor(text=["", "Ω"], padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[2, 3, 0], [2, 1, 3]]
    assert tiny_processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["", ""]


def test_no_call_leaves_its_length_in_what_is_saved_and_loaded(tiny_processor, tmp_path):
    """Also not a call before an earlier version of the processor was saved, or of the tokenizer by itself."""
    tokenizer, text = tiny_processor.tokenizer, "a red circle " * 40
    for save in (tiny_processor.save_pretrained, tokenizer.save_pretrained):
        tokenizer([text], truncation=True, max_length=7, padding="max_length")
        save(tmp_path)
        loaded = COTSProcessor.from_pretrained(tmp_path)
        for processor in (tiny_processor, loaded):
            encoded = processor(text=[text, "a"], truncation=True, padding=True)
            assert [len(ids) for ids in encoded["input_ids"]] == [40, 40]  # model_max_length
        if save == tiny_processor.save_pretrained:
            saved = json.loads((tmp_path / "tokenizer.json").read_text())
            assert saved["truncation"] is None and saved["padding"] is None


@pytest.mark.parametrize("loaded_after", ["nothing", "a call"])
def test_what_a_tokenizer_was_made_with_is_kept(tiny_processor, tmp_path, image, video, loaded_after):
    """As transformers' own processors do: beside images and beside videos, and again where both are saved."""
    if loaded_after == "a call":
        tiny_processor.tokenizer(["a red circle"], truncation=True, max_length=7)
    tiny_processor.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, max_length=17, padding="max_length")
    parts = tiny_processor.image_processor, tokenizer, tiny_processor.video_processor
    COTSProcessor(*parts).save_pretrained(tmp_path / "saved")
    for processor in (COTSProcessor(*parts), COTSProcessor.from_pretrained(tmp_path / "saved")):
        for visual in ({"images": image}, {"videos": video}):
            assert processor(text=TEXTS[:1], return_tensors="pt", **visual)["input_ids"].shape == (1, 17)
            changed = processor(text=TEXTS[:1], max_length=12, return_tensors="pt", **visual)
            assert changed["input_ids"].shape == (1, 12)


def test_what_the_image_and_video_processors_were_made_with_is_kept(tiny_processor, image, video):
    """A call scales pixels by -1 if they were made for that, with arguments of the text beside them."""
    settings = {"do_rescale": True, "rescale_factor": -1.0, "size": {"height": 4, "width": 4}}
    parts = [
        type(part)(**{**part.to_dict(), **settings})
        for part in (tiny_processor.image_processor, tiny_processor.video_processor)
    ]
    processor = COTSProcessor(parts[0], tiny_processor.tokenizer, parts[1])
    inputs = processor(text=TEXTS, images=image, videos=video, padding=True, max_length=117, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 4, 4) and inputs["pixel_values_videos"].shape[-2:] == (4, 4)
    assert inputs["pixel_values"].mean() < -1 and inputs["pixel_values_videos"].mean() < -1
    plain = processor(text=TEXTS, images=image, rescale_factor=1.0, padding=True, return_tensors="pt")
    assert plain["pixel_values"].mean() > 1


@pytest.mark.parametrize("name", ["text", "images", "videos"])
def test_an_empty_list_is_refused(tiny_processor, name):
    with pytest.raises(ValueError, match=f"`{name}` is empty: give at least one, or leave it out"):
        tiny_processor(**{name: []})
