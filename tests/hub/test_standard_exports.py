"""What standard classes can express of COTS, loaded where this package cannot be imported and held against it."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny import CAPTIONS, IMAGE_SIZE, PATCH_SIZE, TINY_ENCODER
from transformers import RobertaConfig, pipeline
from without_package import run_without_package

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel, export_text_encoder, export_zero_shot_classifier
from modeling_cots.hub.standard_exports import build_classifier, mean_embedding_length
from modeling_cots.hub_export import is_untouched

LABELS = ["a red circle", "a dog", "people", "a boat near the beach", "two stars"]
TEXTS = [*CAPTIONS, *LABELS, "a", "a red circle " * 40]


@pytest.fixture
def model(tiny_config) -> COTSForPreTraining:
    torch.manual_seed(0)
    model = COTSForPreTraining(tiny_config).eval()
    with torch.no_grad():  # what a fresh model has at zero
        for projection in (model.cots.text_projection, model.cots.vision_projection):
            projection.bias.normal_()
    return model


@pytest.fixture
def images(tmp_path) -> list[Image.Image]:
    """Images of several modes and sizes, also as files `0.png`, ..."""
    base = Image.radial_gradient("L").resize((60, 40))
    images = [base, base.rotate(90), Image.new("RGB", (20, 50), "red"), base.convert("RGBA"), Image.new("L", (9, 9))]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    return images


def encode_text(model, processor, texts) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_text(**processor(text=texts, padding=True, truncation=True, return_tensors="pt"))


def encode_image(model, processor, images) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_image(**processor(images=images, return_tensors="pt"))


def has_code(folder: Path) -> bool:
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.json")]
    return bool(list(folder.rglob("*.py"))) or any("auto_map" in text or "COTS" in text for text in texts)


# --- the text encoder


def load_and_encode(folder: Path, home: Path) -> tuple[torch.Tensor, dict]:
    """With sentence-transformers, without this package and without trust in code."""
    code = f"""
    import io, logging
    log = io.StringIO()
    for name in ("sentence_transformers", "transformers"):
        logging.getLogger(name).addHandler(logging.StreamHandler(log))
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer({str(folder)!r}, device="cpu")
    answer["texts"] = model.encode({TEXTS!r}).tolist()
    answer["modules"] = [type(module).__name__ for module in model]
    answer["max_seq_length"] = model.max_seq_length
    answer["log"] = log.getvalue()
    """
    answer = run_without_package(code, home)
    return torch.tensor(answer.pop("texts")), answer


@pytest.mark.parametrize("hidden_size", [None, 24])
def test_projections_of_other_kinds_are_dense_layers_too(tiny_config, tiny_processor, tmp_path, hidden_size):
    """Standardization is part of the first one; a hidden layer is a dense layer of its own."""
    torch.manual_seed(0)
    tiny_config.standardize_features, tiny_config.projection_hidden_size = True, hidden_size
    model = COTSModel(tiny_config).eval()
    model.text_projection.standardization.fit_(0.5 + 2 * torch.randn(50, 32))
    export_text_encoder(model, tiny_processor, tmp_path / "text")
    found, answer = load_and_encode(tmp_path / "text", tmp_path)
    torch.testing.assert_close(found, encode_text(model, tiny_processor, TEXTS), atol=1e-5, rtol=0)
    dense = ["Dense"] * (1 if hidden_size is None else 2)
    assert answer["modules"] == ["Transformer", "Pooling", *dense, "Normalize"]


def test_a_classifier_has_standardization_in_its_head_and_no_hidden_layer(tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(0)
    tiny_config.standardize_features = True
    model = COTSModel(tiny_config).eval()
    model.vision_projection.standardization.fit_(0.5 + 2 * torch.randn(50, 32))
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE)
    weights = torch.randn(len(LABELS), 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output.double() @ weights.T
        found = build_classifier(model, LABELS, weights).eval()(pixels).logits
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    tiny_config.projection_hidden_size = 24
    with pytest.raises(ValueError, match="have a hidden layer .projection_hidden_size=24"):
        export_zero_shot_classifier(COTSModel(tiny_config).eval(), tiny_processor, LABELS, tmp_path / "labels")


def test_the_text_encoder_is_a_standard_sentence_transformer(model, tiny_processor, tmp_path):
    export_text_encoder(model, tiny_processor, tmp_path / "text-v1.0")
    found, answer = load_and_encode(tmp_path / "text-v1.0", tmp_path)
    expected = encode_text(model.cots, tiny_processor, TEXTS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(TEXTS)))
    assert torch.equal((found @ found.T).argsort(), (expected @ expected.T).argsort())
    assert answer["modules"] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert answer["max_seq_length"] == 40
    assert "MISSING" not in answer["log"] and "UNEXPECTED" not in answer["log"], answer["log"]
    assert not has_code(tmp_path / "text-v1.0")
    card = ModelCard.load(tmp_path / "text-v1.0" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert 'SentenceTransformer("text-v1.0")' in card.text and is_untouched(card.content)


def test_a_roberta_in_half_precision_whose_tokenizer_sets_no_limit(tiny_processor, tmp_path):
    """RoBERTa counts positions from 2: of 32 it can use 30. A limit at 32 would end in an index error."""
    torch.manual_seed(0)
    text = {**TINY_ENCODER, "vocab_size": 99, "max_position_embeddings": 32, "pad_token_id": 1}
    vision = {**TINY_ENCODER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    config = COTSConfig(text_config=RobertaConfig(**text), vision_config=vision, projection_dim=16)
    model = COTSModel(config).eval()
    tiny_processor.tokenizer.model_max_length = 30
    expected = encode_text(model, tiny_processor, TEXTS)
    tiny_processor.tokenizer.model_max_length = 10**9
    try:
        export_text_encoder(model.to(torch.bfloat16), tiny_processor, tmp_path / "text")
    finally:
        tiny_processor.tokenizer.model_max_length = 40
    loaded = SentenceTransformer(str(tmp_path / "text"), device="cpu")
    found = torch.tensor(loaded.encode(TEXTS))
    assert loaded.max_seq_length == 30
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)  # the weights were rounded once
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(TEXTS)))


def test_refuses_a_text_encoder_that_nobody_could_load(tiny_config, tiny_processor, tmp_path):
    model = COTSModel(tiny_config)

    class OurEncoder(type(model.text_model)):
        pass

    model.text_model.__class__ = OurEncoder
    with pytest.raises(ValueError, match="text encoder, OurEncoder, is no class of transformers"):
        export_text_encoder(model, tiny_processor, tmp_path / "text")
    assert not (tmp_path / "text").exists()


# --- the classifier


def classify(folder: Path, home: Path, num_images: int) -> dict:
    """Logits of the labels by the standard pipeline, in the order of `LABELS`, without this package."""
    code = f"""
    from transformers import pipeline
    classifier = pipeline("image-classification", model={str(folder)!r})
    answer["class"] = type(classifier.model).__name__
    names = [{str(home)!r} + f"/{{index}}.png" for index in range({num_images})]
    results = classifier(names, top_k={len(LABELS)}, function_to_apply="none")
    tables = [{{row["label"]: row["score"] for row in result}} for result in results]
    answer["logits"] = [[table[label] for label in {LABELS!r}] for table in tables]
    """
    return run_without_package(code, home)


@pytest.fixture
def similarities(model, tiny_processor, images) -> torch.Tensor:
    """What COTS says: cosines of the images and the labels in their sentences."""
    texts = [f"This is a photo of {label}." for label in LABELS]
    encoded = encode_image(model.cots, tiny_processor, [image.convert("RGB") for image in images])
    return encoded @ encode_text(model.cots, tiny_processor, texts).T


def test_the_classifier_is_standard_and_ranks_as_cots(model, tiny_processor, images, similarities, tmp_path):
    export_zero_shot_classifier(model, tiny_processor, LABELS, tmp_path / "classes-v1.0")
    answer = classify(tmp_path / "classes-v1.0", tmp_path, len(images))
    assert answer["class"] == "ViTForImageClassification"
    logits = torch.tensor(answer["logits"])
    assert torch.equal(logits.argsort(), similarities.argsort())
    with torch.no_grad():
        pixels = tiny_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        lengths = model.cots.get_image_features(**pixels).pooler_output.norm(dim=-1, keepdim=True)
    # Where scores differ: by the length of the image embedding, and by nothing else.
    expected = similarities / model.config.temperature * lengths
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    assert not has_code(tmp_path / "classes-v1.0")
    card = ModelCard.load(tmp_path / "classes-v1.0" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    assert all(label in card.text for label in LABELS) and "sharper" in card.text


def test_typical_images_bring_the_scores_near_those_of_cots(model, tiny_processor, images, similarities, tmp_path):
    export_zero_shot_classifier(model, tiny_processor, LABELS, tmp_path / "classes", images=images)
    classifier = pipeline("image-classification", model=str(tmp_path / "classes"))
    results = classifier(images, top_k=len(LABELS))
    scores = torch.tensor(
        [[{row["label"]: row["score"] for row in result}[name] for name in LABELS] for result in results]
    )
    assert torch.equal(scores.argsort(), similarities.argsort())
    expected = (similarities / model.config.temperature).softmax(dim=-1)
    torch.testing.assert_close(scores, expected, atol=0.05, rtol=0)


def test_the_mean_length_is_that_of_every_image_whatever_the_batches(model, tiny_processor, images, monkeypatch):
    lengths = []
    for image in images:
        pixels = tiny_processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            lengths.append(model.cots.get_image_features(**pixels).pooler_output.norm().item())
    monkeypatch.setattr("modeling_cots.hub.standard_exports.IMAGE_BATCH", 2)
    assert mean_embedding_length(model.cots, tiny_processor, images) == pytest.approx(sum(lengths) / len(lengths))
    with pytest.raises(ValueError, match="`images` is empty"):
        mean_embedding_length(model.cots, tiny_processor, [])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("a dog", "list of texts"),
        (["a dog", " "], "not empty"),
        (["a dog"], "at least two"),
        (["a dog", "a dog "], "all different"),
        ([], "at least two"),
    ],
)
def test_refuses_labels_that_cannot_be_used(model, tiny_processor, tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        export_zero_shot_classifier(model, tiny_processor, labels, tmp_path / "classes")
    assert not (tmp_path / "classes").exists()


def test_dropout_of_a_model_in_training_blurs_nothing_and_stays(tiny_config, tiny_processor, images, tmp_path):
    tiny_config.text_config.hidden_dropout_prob = tiny_config.vision_config.hidden_dropout_prob = 0.5
    model = COTSModel(tiny_config)
    for mode in (True, False):
        export_zero_shot_classifier(model.train(mode), tiny_processor, LABELS, tmp_path / str(mode), images=images)
        assert model.training == mode
    heads = [load_file(tmp_path / str(mode) / "model.safetensors")["classifier.weight"] for mode in (True, False)]
    torch.testing.assert_close(*heads)


def test_refuses_another_encoder_and_a_template_without_a_place(tiny_config, model, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="the place of the label"):
        export_zero_shot_classifier(model, tiny_processor, LABELS, tmp_path / "c", hypothesis_template="a photo")
    vision = {"model_type": "dinov2", **TINY_ENCODER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    config = COTSConfig(text_config=tiny_config.text_config, vision_config=vision, projection_dim=16)
    with pytest.raises(ValueError, match="cannot be made of a `dinov2` encoder"):
        export_zero_shot_classifier(COTSModel(config), tiny_processor, LABELS, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_order_of_the_labels_is_that_of_the_configuration(model, tiny_processor, tmp_path):
    export_zero_shot_classifier(model, tiny_processor, LABELS, tmp_path / "classes")
    config = json.loads((tmp_path / "classes" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(len(LABELS))] == LABELS
    assert config["label2id"] == {label: index for index, label in enumerate(LABELS)}
