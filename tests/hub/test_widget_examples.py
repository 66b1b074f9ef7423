"""Widget examples: the images are there, and what is recorded is what the pipeline says of them."""

import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.hub.widget_examples import SIDE, publishable_images, record_widget_examples


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config)


def test_outputs_are_those_of_the_pipeline_on_the_saved_images(model, tiny_processor, tmp_path):
    model.train()
    examples = record_widget_examples(model, tiny_processor, ScenesDataset("validation", 9, 300), tmp_path)
    assert model.training and len(examples) == 3
    parts = {"tokenizer": tiny_processor.tokenizer, "image_processor": tiny_processor.image_processor}
    classify = pipeline("zero-shot-image-classification", model=model.eval(), **parts)
    for example in examples:
        path = tmp_path / example["src"]
        assert path.stat().st_size < 50_000 and max(Image.open(path).size) <= SIDE
        labels = example["candidate_labels"].split(", ")  # as the widget takes it apart
        assert len(labels) == 3
        expected = classify(str(path), candidate_labels=labels)
        assert [found["label"] for found in example["output"]] == [found["label"] for found in expected]
        assert [found["score"] for found in example["output"]] == [round(found["score"], 4) for found in expected]


def test_images_are_chosen_by_number(model, tiny_processor, tmp_path):
    chosen = []

    class Images(list):
        def __getitem__(self, row):
            chosen.append(row)
            return super().__getitem__(row)

    items = Images({"image": Image.new("L", (40, 20), row), "captions": [f"a, {row}", f"b {row}"]} for row in range(9))
    examples = record_widget_examples(model, tiny_processor, items, tmp_path, num_examples=4)
    assert chosen == [0, 3, 5, 8] and examples[0]["candidate_labels"] == "b 0, b 3, b 5, b 8"
    assert len(record_widget_examples(model, tiny_processor, items[:1], tmp_path)) == 1


def test_only_drawn_images_are_published_unasked():
    scenes = ScenesDataset("validation", 5, 48, seed=3)
    large = publishable_images(scenes)
    assert len(large) == 5 and large.image_size == SIDE and large[4]["captions"] == scenes[4]["captions"]
    assert publishable_images([{"image": None}]) is None and publishable_images(None) is None
