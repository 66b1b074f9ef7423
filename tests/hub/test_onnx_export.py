"""The ONNX files of every encoder type, run by onnxruntime and held against the model that they were made of."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, IMAGE_SIZE, PATCH_SIZE, TINY_ENCODER, VOCAB_SIZE

from modeling_cots import (
    COTSConfig,
    COTSModel,
    export_onnx,
    export_repository,
    export_sentence_onnx,
    export_text_encoder,
)
from modeling_cots.hub import onnx_export
from modeling_cots.hub.identity import model_identity
from modeling_cots.hub.onnx_export import KEPT, kept_first
from modeling_cots.hub_export import is_untouched
from modeling_cots.onnx_cots import DTYPES

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

MAX_POSITIONS = 40
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
TEXT_CONFIGS = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4, **SPECIAL_IDS},
    "mpnet": {"pad_token_id": 1},
}
VISION_CONFIGS = {
    "vit": {},
    "deit": {},
    "dinov2": {},
    "dinov3_vit": {},
    "beit": {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
}
SHAPES = [(2, IMAGE_SIZE, IMAGE_SIZE), (1, IMAGE_SIZE, IMAGE_SIZE), (3, 48, 48), (2, 64, 40), (1, 16, 24)]


def build_model(text: str = "bert", vision: str = "vit") -> COTSModel:
    torch.manual_seed(0)
    text_sizes = {**TINY_ENCODER, "vocab_size": VOCAB_SIZE, "max_position_embeddings": MAX_POSITIONS}
    vision_sizes = {**TINY_ENCODER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    config = COTSConfig(
        text_config={"model_type": text, **text_sizes, **TEXT_CONFIGS[text]},
        vision_config={"model_type": vision, **vision_sizes, **VISION_CONFIGS[vision]},
        projection_dim=16,
    )
    model = COTSModel(config).eval()
    with torch.no_grad():  # what a fresh model has at zero
        for name, parameter in model.named_parameters():
            if "relative_position" in name or "projection.bias" in name:
                parameter.normal_()
    return model


def run(path, **inputs: torch.Tensor) -> np.ndarray:
    """The one output of a file, on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]


def random_text(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and a mask that ends earlier in the last row."""
    input_ids = torch.randint(5, VOCAB_SIZE, (batch, length))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, max(1, length // 2) :] = 0
    return input_ids, attention_mask


@pytest.mark.parametrize(("text", "vision"), list(zip(TEXT_CONFIGS, VISION_CONFIGS, strict=True)))
def test_float32_files_equal_the_model_at_any_batch_length_and_image_size(text, vision, tiny_processor, tmp_path):
    model = build_model(text, vision)
    export_onnx(model, tiny_processor, tmp_path)
    with torch.no_grad():
        for batch, length in [(2, 8), (1, 1), (3, 23), (5, model.max_text_length), (1, MAX_POSITIONS + 20)]:
            input_ids, attention_mask = random_text(batch, length)
            found = run(tmp_path / "onnx/text_model.onnx", input_ids=input_ids, attention_mask=attention_mask)
            np.testing.assert_allclose(found, model.encode_text(input_ids, attention_mask).numpy(), atol=1e-4, rtol=0)
        for batch, height, width in SHAPES:
            pixels = torch.randn(batch, 3, height, width)
            found = run(tmp_path / "onnx/vision_model.onnx", pixel_values=pixels)
            is_native = height == width == IMAGE_SIZE
            expected = model.encode_image(pixels, interpolate_pos_encoding=not is_native)
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)
            np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)


def test_every_variant_stands_beside_and_has_unit_length(tiny_processor, tmp_path):
    model = build_model()
    export_onnx(model, tiny_processor, tmp_path)
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert files == {f"{name}model{suffix}.onnx" for name in ("text_", "vision_", "") for suffix in DTYPES.values()}
    input_ids, attention_mask = random_text(3, 9)
    with torch.no_grad():
        expected = model.encode_text(input_ids, attention_mask).numpy()
    for suffix, tolerance in (("_fp16", 0.01), ("_int8", 0.1), ("_quantized", 0.1)):
        path = tmp_path / f"onnx/text_model{suffix}.onnx"
        found = run(path, input_ids=input_ids, attention_mask=attention_mask)
        assert found.dtype == np.float32
        assert 0 < np.abs(found - expected).max() < tolerance
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=2e-3)
        assert path.stat().st_size < (tmp_path / "onnx/text_model.onnx").stat().st_size


def test_queries_choose_what_is_quantized_and_the_card_says_what_they_measured(tiny_processor, tmp_path):
    """Images and texts that are far apart keep their first results whatever is quantized; near ones do not."""
    model = build_model()
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue", "white")]
    variants = export_onnx(model, tiny_processor, tmp_path, images=images, texts=CAPTIONS[:2])
    kept = {variant.dtype: variant.kept for variant in variants}
    assert list(kept) == list(DTYPES) and kept["float32"] == (100, 100)
    assert min(kept["int8"]) >= KEPT
    card = (tmp_path / "README.md").read_text()
    assert "on 4 images and 2 texts" in card and is_untouched(card)
    for variant in variants:
        size = (tmp_path / f"onnx/text_model{DTYPES[variant.dtype]}.onnx").stat().st_size
        assert size == variant.text_bytes
        assert f"{DTYPES[variant.dtype]}.onnx` | {size / 1e6:.1f} MB" in card


def test_without_queries_the_attention_stays_in_float32_and_the_card_claims_nothing(tiny_processor, tmp_path):
    export_onnx(build_model(), tiny_processor, tmp_path)
    graph = onnx.load(tmp_path / "onnx/vision_model_int8.onnx").graph
    weights = {tensor.name for tensor in graph.initializer if tensor.name.endswith("_quantized")}
    names = [node.name for node in graph.node if weights & set(node.input)]
    assert len(names) == 2 * 2 + 1 and not any("attention" in name for name in names)  # two layers, the projection
    assert "was not measured" in (tmp_path / "README.md").read_text()


def test_files_that_lose_too_much_are_quantized_less_with_a_warning(tiny_processor, tmp_path, caplog, monkeypatch):
    model = build_model()
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "green")]
    shares = iter([(100.0, 100.0), (100.0, 100.0), *[(97.0, 99.0)] * 4, (97.0, 99.0)])
    monkeypatch.setattr(onnx_export, "kept_first", lambda found, expected: next(shares))
    logging.getLogger("transformers").propagate = True
    variants = export_onnx(model, tiny_processor, tmp_path, images=images, texts=CAPTIONS)
    assert "97.0 % of the validation queries, less than 98 %" in caplog.text
    assert variants[2].kept_by_texts == 97.0
    graph = onnx.load(tmp_path / "onnx/text_model_int8.onnx").graph
    shapes = [tuple(tensor.dims) for tensor in graph.initializer if tensor.name.endswith("_quantized")]
    assert shapes and all(rows >= columns for rows, columns in shapes)  # the narrowing layers still are


def test_first_results_are_compared_by_result_and_not_by_number():
    images, texts = np.eye(3), np.eye(3)[[0, 1, 1]]
    assert kept_first((images, texts), (images, texts)) == (100, 100)
    assert kept_first((images, texts), (images[[1, 0, 2]], texts)) == (0.0, pytest.approx(100 / 3))
    moved = np.eye(3)[[0, 1, 0]]
    assert kept_first((images, moved), (images, texts))[0] == pytest.approx(200 / 3)


def test_files_say_what_model_they_are_of(tiny_processor, tmp_path):
    model = build_model()
    export_onnx(model, tiny_processor, tmp_path)
    for path in (tmp_path / "onnx").iterdir():
        said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert json.loads(said["cots"])["model_identity"] == model_identity(model, tiny_processor)


def test_the_table_of_a_card_is_replaced_by_that_of_the_next_export(tiny_processor, tmp_path):
    model = build_model()
    card = "---\nlicense: mit\n---\n# Mine\n\n## ONNX files\n\nold table\n\n## Limits\n\nknown\n"
    export_repository(model, tiny_processor, tmp_path, card=card)
    export_onnx(model, tiny_processor, tmp_path, model_id="you/mine")
    text = (tmp_path / "README.md").read_text()
    assert "old table" not in text and 'COTSOnnxModel("you/mine"' in text
    assert text.count("## ONNX files") == 1 and text.index("# Mine") < text.index("## ONNX") < text.index("## Limits")


def test_queries_of_one_kind_alone_are_refused(tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="give validation images and texts"):
        export_onnx(build_model(), tiny_processor, tmp_path, texts=["a dog"])


def test_a_folder_of_its_own_says_what_other_runtimes_read(tiny_processor, tmp_path):
    export_onnx(build_model(), tiny_processor, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "clip" and config["projection_dim"] == 16
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["size"] == {"height": IMAGE_SIZE, "width": IMAGE_SIZE} and settings["image_mean"] == [0.5] * 3
    assert (tmp_path / "tokenizer.json").exists()


def test_a_repository_keeps_its_configuration_and_loses_the_files_of_other_weights(tiny_processor, tmp_path):
    model = build_model()
    export_repository(model, tiny_processor, tmp_path)
    names = ("config.json", "tokenizer_config.json", "processor_config.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/vision_model_old.onnx").write_bytes(b"of an earlier export")
    export_onnx(model, tiny_processor, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert not (tmp_path / "onnx/vision_model_old.onnx").exists()
    assert not list(tmp_path.glob(".onnx-*"))
    export_repository(model, tiny_processor, tmp_path)  # of weights that may have changed since
    assert not (tmp_path / "onnx").exists()


def test_an_encoder_that_cannot_be_exported_is_refused_with_its_reason(tiny_processor, tmp_path):
    model = build_model()
    model.text_model.forward = lambda *args, **kwargs: torch.linalg.eig(torch.ones(2, 2))
    with pytest.raises(ValueError, match="`bert` encoder cannot be exported to ONNX: .+"):
        export_onnx(model, tiny_processor, tmp_path)
    assert not (tmp_path / "onnx").exists()


def test_the_text_encoder_of_sentence_transformers_gets_its_transformer_as_onnx(tiny_processor, tmp_path):
    """sentence-transformers loads `onnx/model.onnx` by optimum, which needs another transformers than this package."""
    model = build_model()
    export_text_encoder(model, tiny_processor, tmp_path, model_id="you/text")
    export_sentence_onnx(model, tmp_path, model_id="you/text")
    input_ids, attention_mask = random_text(3, 9)
    with torch.no_grad():
        expected = model.text_model(input_ids, attention_mask=attention_mask).last_hidden_state.numpy()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    np.testing.assert_allclose(run(tmp_path / "onnx/model.onnx", **inputs), expected, atol=1e-4, rtol=0)
    assert 0 < np.abs(run(tmp_path / "onnx/model_int8.onnx", **inputs) - expected).max() < 0.2
    card = (tmp_path / "README.md").read_text()
    assert 'SentenceTransformer("you/text", backend="onnx"' in card and is_untouched(card)
    with pytest.raises(ValueError, match="not what `export_text_encoder` writes"):
        export_sentence_onnx(model, tmp_path / "elsewhere")
