"""The runtime of ONNX exports: beside the model that they were made of, without torch, and behind the other doors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS
from transformers import pipeline

from modeling_cots import COTSModel, COTSOnnxModel, export_onnx, export_repository
from modeling_cots.onnx_cots import DTYPES

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

TEXTS = [*CAPTIONS, "a", "a red circle " * 40]


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Where the first test of this file exports; an export takes seconds."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture
def folder(model, tiny_processor, exported, tmp_path):
    """A repository with ONNX files, of equal weights in every test."""
    if not (exported / "onnx").exists():
        export_repository(model, tiny_processor, exported)
        export_onnx(model, tiny_processor, exported)
    return shutil.copytree(exported, tmp_path / "repository")


@pytest.fixture
def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(3)]
    return [Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC) for pixels in small]


def test_it_encodes_what_the_model_encodes(folder, model, tiny_processor, photographs):
    export = COTSOnnxModel(folder)
    inputs = tiny_processor(text=TEXTS, images=photographs, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
        video_embeds = model.encode_video(inputs["pixel_values"][None])
    found = export(**inputs)
    for name in ("text_embeds", "image_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-3, rtol=0)
    torch.testing.assert_close(export.encode_video(inputs["pixel_values"][None]), video_embeds, atol=1e-4, rtol=0)
    arrays = export.tokenize(TEXTS)
    assert isinstance(export.encode_text(**arrays), np.ndarray)
    np.testing.assert_array_equal(arrays["input_ids"], inputs["input_ids"])
    np.testing.assert_array_equal(arrays["attention_mask"], inputs["attention_mask"])
    assert export.config.projection_dim == 16 and export.max_text_length == 40
    # Pillow resizes in another precision than torchvision: a pixel may differ by one of 255 steps.
    np.testing.assert_allclose(export.prepare_images(photographs), inputs["pixel_values"], atol=2.1 / 255, rtol=0)


def test_openvino_encodes_what_the_model_encodes(folder, model, tiny_processor, photographs):
    pytest.importorskip("openvino")
    inputs = tiny_processor(text=TEXTS, images=photographs, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    for dtype, tolerance in (("float32", 1e-4), (None, 0.05)):  # by itself in bfloat16 where the CPU computes that
        found = COTSOnnxModel(folder, dtype=dtype, runtime="openvino")
        for name in ("text_embeds", "image_embeds"):
            torch.testing.assert_close(getattr(found(**inputs), name), getattr(expected, name), atol=tolerance, rtol=0)
        assert found.config == COTSOnnxModel(folder).config
    with pytest.raises(ValueError, match="OpenVINO runs the float32 files"):
        COTSOnnxModel(folder, dtype="int8", runtime="openvino")
    with pytest.raises(ValueError, match="must be one of onnxruntime, openvino"):
        COTSOnnxModel(folder, runtime="tensorrt")


def test_without_openvino_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match="pip install openvino"):
        COTSOnnxModel(folder, runtime="openvino").encode_text([[1, 2]])


def test_it_needs_no_torch_and_no_package(folder, photographs, model, tiny_processor):
    """As somebody has it who downloads the repository and installs `onnxruntime`."""
    for number, image in enumerate(photographs):
        image.save(folder / f"{number}.png")
    code = f"""
import sys
for name in ("torch", "transformers", "modeling_cots"):
    sys.modules[name] = None
import json
from PIL import Image
from handler import EndpointHandler
from onnx_cots import COTSOnnxModel
model = COTSOnnxModel(".")
images = [Image.open(f"{{number}}.png") for number in range(3)]
handler = EndpointHandler(".")
labels = {{"candidate_labels": {CAPTIONS[:2]!r}, "hypothesis_template": "{{}}"}}
answer = handler({{"inputs": images[0], "parameters": labels}})
print(json.dumps([model.encode_text(**model.tokenize({TEXTS!r})).tolist(),
                  model.encode_image(model.prepare_images(images)).tolist(), answer, handler({{"inputs": "a dog"}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    text_embeds, image_embeds, answer, text_embed = json.loads(done.stdout)
    inputs = tiny_processor(text=TEXTS, images=photographs, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    np.testing.assert_allclose(text_embeds, expected.text_embeds, atol=1e-4, rtol=0)
    np.testing.assert_allclose(image_embeds, expected.image_embeds, atol=2e-2, rtol=0)
    scores = expected.logits_per_image[0, :2].softmax(0).tolist()
    assert {pair["label"]: pair["score"] for pair in answer} == pytest.approx(
        dict(zip(CAPTIONS[:2], scores, strict=True)), abs=0.05
    )
    assert len(text_embed) == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_runs(folder, dtype):
    export = COTSOnnxModel(folder, dtype=dtype)
    assert export.encode_text(**export.tokenize(["a red circle"])).shape == (1, 16)
    assert export.encode_image(np.zeros((2, 3, 32, 32), dtype=np.float32)).shape == (2, 16)


def test_pipelines_take_it(folder, model, tiny_processor, photographs, caplog):
    export = COTSOnnxModel(folder)
    parts = {"tokenizer": tiny_processor.tokenizer, "image_processor": tiny_processor.image_processor}
    answers = {}
    for name, each in (("model", model), ("export", export)):
        finder = pipeline("image-text-retrieval", model=each, processor=tiny_processor)
        classifier = pipeline("zero-shot-image-classification", model=each, **parts)
        features = pipeline("image-feature-extraction", model=each, image_processor=tiny_processor.image_processor)
        answers[name] = [
            [hit["index"] for hit in finder(photographs[0], CAPTIONS)],
            [hit["label"] for hit in classifier(photographs[1], candidate_labels=CAPTIONS)],
            np.round(features(photographs[2])[0], 3).tolist(),
        ]
    assert answers["model"][:2] == answers["export"][:2]
    np.testing.assert_allclose(answers["model"][2], answers["export"][2], atol=2e-3)
    assert "not supported" not in caplog.text


def test_what_is_no_export_is_refused(folder, model, tiny_processor, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(ValueError, match="no ONNX export of float32"):
        COTSOnnxModel(other)
    with pytest.raises(ValueError, match="has the dtypes float32, float16, int8, quantized; got 'int4'"):
        COTSOnnxModel(folder, dtype="int4")
    with torch.no_grad():
        model.text_projection.weight.neg_()
    export_onnx(model, tiny_processor, other)
    shutil.copy(other / "onnx/vision_model.onnx", folder / "onnx/vision_model.onnx")
    mixed = COTSOnnxModel(folder)
    mixed.encode_text(**mixed.tokenize(["a"]))
    with pytest.raises(ValueError, match="are of two exports"):
        mixed.encode_image(np.zeros((1, 3, 32, 32), dtype=np.float32))
