"""transformers' own pipelines on our checkpoints: the numbers of `encode_image` and `encode_text`, for every input."""

import numpy as np
import pytest
import torch
from hub_network import Answer, Network, Server
from image_files import as_bytes
from PIL import Image
from transformers import (
    FeatureExtractionPipeline,
    ImageFeatureExtractionPipeline,
    ViTImageProcessor,
    ZeroShotImageClassificationPipeline,
    pipeline,
)

from modeling_cots import COTSModel, modeling_cots

LABELS = ["a red circle", "two green triangles", "the dog runs"]
LONG = "the dog runs " * 60
TASKS = {
    "zero-shot-image-classification": ZeroShotImageClassificationPipeline,
    "feature-extraction": FeatureExtractionPipeline,
    "image-feature-extraction": ImageFeatureExtractionPipeline,
}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    ramp = Image.linear_gradient("L").resize((40, 30))
    return [ramp, ramp.rotate(90), Image.new("RGB", (20, 50), (200, 30, 0))]


@pytest.fixture
def model(saved_model) -> COTSModel:
    return COTSModel.from_pretrained(saved_model)


@pytest.fixture
def sources(images, tmp_path):
    """The first image as a path, a URL and a PIL image."""
    path = tmp_path / "image.png"
    images[0].save(path)
    server = Server(Network(), lambda request: Answer(content=as_bytes(images[0])))
    server.open()
    yield [str(path), f"{server.url}/image.png", images[0]]
    server.close()
    server.server_close()


@torch.no_grad()
def image_embeds(model, processor, images) -> torch.Tensor:
    images = [image.convert("RGB") for image in images]
    return model.encode_image(**processor(images=images, return_tensors="pt"))


@torch.no_grad()
def text_embeds(model, processor, texts) -> torch.Tensor:
    return model.encode_text(**processor(text=texts, padding=True, return_tensors="pt"))


@pytest.fixture
def load(saved_model):
    def load(task):
        loaded = pipeline(task, model=str(saved_model))
        assert isinstance(loaded, TASKS[task]) and type(loaded.model) is COTSModel
        return loaded

    return load


def test_a_model_of_another_kind_is_served_as_without_the_package(model):
    """Its images are read by transformers, which clips 16 bits a pixel."""
    vision, settings = model.vision_model, ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True)
    deep = Image.fromarray(np.full((40, 30), 40_000, dtype=np.uint16))
    options = {"model": vision, "image_processor": settings}
    found = pipeline("image-feature-extraction", **options)(deep)
    assert found == ImageFeatureExtractionPipeline(**options)(deep)
    assert found == pipeline("image-feature-extraction", **options)(Image.new("RGB", (30, 40), "white"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_classification(load, model, tiny_processor, images, batch_size):
    classify = load("zero-shot-image-classification")
    answers = classify(images, candidate_labels=LABELS, batch_size=batch_size)
    texts = [f"This is a photo of {label}." for label in LABELS]
    similarities = image_embeds(model, tiny_processor, images) @ text_embeds(model, tiny_processor, texts).T
    for answer, row in zip(answers, (similarities / model.config.temperature).softmax(dim=-1), strict=True):
        assert [found["label"] for found in answer] == [LABELS[i] for i in row.argsort(descending=True)]
        expected = dict(zip(LABELS, row.tolist(), strict=True))
        assert {found["label"]: found["score"] for found in answer} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_feature_extraction_gives_unit_length_text_embeddings(load, model, tiny_processor, batch_size):
    extract = load("feature-extraction")
    embeds = torch.tensor(extract(LABELS, batch_size=batch_size)).squeeze(1)
    torch.testing.assert_close(embeds, text_embeds(model, tiny_processor, LABELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(extract(LABELS[0], return_tensors=True)[0], embeds[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_image_feature_extraction_gives_unit_length_image_embeddings(load, model, tiny_processor, images, batch_size):
    embeds = torch.tensor(load("image-feature-extraction")(images, batch_size=batch_size)).squeeze(1)
    torch.testing.assert_close(embeds, image_embeds(model, tiny_processor, images), atol=1e-5, rtol=0)


def test_images_as_paths_urls_and_pil_images(load, sources):
    classify, extract = load("zero-shot-image-classification"), load("image-feature-extraction")
    answers = classify(sources, candidate_labels=LABELS)
    embeds = extract(sources)
    for source, answer, embed in zip(sources, answers, embeds, strict=True):
        assert answer == answers[0] == classify(source, candidate_labels=LABELS)
        assert embed == embeds[0] == extract(source)


def test_long_texts_are_cut_with_a_warning_and_not_a_crash(load, model, tiny_processor, images, caplog, monkeypatch):
    """These pipelines never truncate: the model does, at its 40 positions."""
    tokens = tiny_processor.tokenizer(LONG, return_tensors="pt", verbose=False)
    assert tokens["input_ids"].shape[1] > 40
    with torch.no_grad():
        expected = model.encode_text(tokens["input_ids"][:, :40])
    monkeypatch.setattr(modeling_cots.logger, "propagate", True)
    modeling_cots.logger.parent.propagate = True
    for task in ("feature-extraction", "zero-shot-image-classification"):
        caplog.clear()
        type(modeling_cots.logger).warning_once.cache_clear()
        run = load(task)
        if task == "feature-extraction":
            torch.testing.assert_close(torch.tensor(run(LONG)), expected, atol=1e-5, rtol=0)
            assert len(run([LONG, LABELS[0]], batch_size=2)) == 2
        else:
            answer = run(images[2], candidate_labels=[LONG, LABELS[0]], hypothesis_template="{}")
            texts = torch.cat([expected, text_embeds(model, tiny_processor, LABELS[:1])])
            logits = texts @ image_embeds(model, tiny_processor, images[2:])[0] / model.config.temperature
            scores = dict(zip([LONG, LABELS[0]], logits.softmax(dim=0).tolist(), strict=True))
            assert {found["label"]: found["score"] for found in answer} == pytest.approx(scores, abs=1e-5)
        assert any("are cut to the first 40" in record.message for record in caplog.records)
