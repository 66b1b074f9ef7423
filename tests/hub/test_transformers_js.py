"""transformers.js, in node, on what the ONNX export writes: its pipeline, its Auto classes, and what they need."""

import base64
import json
import subprocess
from pathlib import Path

import pytest
import torch
from browser import open_browser, skip_without_browser
from npm_packages import NODE, node_modules, skip_without_node
from PIL import Image
from static_server import serve_static
from tiny import CAPTIONS, IMAGE_SIZE

from modeling_cots import COTSModel, export_onnx, export_repository

pytest.importorskip("onnx", reason='onnx is missing: pip install -e ".[onnx]"')
pytest.importorskip("onnxruntime", reason='onnxruntime is missing: pip install -e ".[onnx]"')
LABELS = CAPTIONS


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


@pytest.fixture
def image(tmp_path) -> str:
    """A file of the size that the model takes, so that nobody has to resize it."""
    torch.manual_seed(0)
    pixels = (torch.rand(IMAGE_SIZE, IMAGE_SIZE, 3) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def run(folder: Path, dtype: str, image: str, labels: list[str] = LABELS) -> dict:
    """What tests/node/transformers_js.mjs answers."""
    skip_without_node()
    node_modules()
    command = ["node", NODE / "transformers_js.mjs", folder, dtype, image, *labels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout)


def expected(model, processor, image: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        inputs = processor(text=LABELS, images=Image.open(image), padding=True, truncation=True, return_tensors="pt")
        texts = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        images = model.encode_image(inputs["pixel_values"])
    logits = images @ texts.T / model.config.temperature
    return {**inputs, "text_embeds": texts, "image_embeds": images, "shares": logits.softmax(-1)[0]}


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("fp16", 5e-3), ("q8", 0.1), ("int8", 0.1)])
def test_an_export_of_its_own_is_a_pipeline_and_equal_to_python(
    model, tiny_processor, image, tmp_path, dtype, tolerance
):
    export_onnx(model, tiny_processor, tmp_path / "export")
    answer, wanted = run(tmp_path / "export", dtype, image), expected(model, tiny_processor, image)
    assert answer["said"] == []
    assert answer["input_ids"] == wanted["input_ids"].tolist()
    torch.testing.assert_close(torch.tensor(answer["pixel_values"]), wanted["pixel_values"], rtol=0, atol=1e-5)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(torch.tensor(answer[name]), wanted[name], rtol=0, atol=tolerance)
    assert answer["auto_text_embeds"] == answer["text_embeds"]
    shares = dict(zip(LABELS, wanted["shares"].tolist(), strict=True))
    assert {found["label"] for found in answer["classified"]} == set(LABELS)
    for found in answer["classified"]:
        assert found["score"] == pytest.approx(shares[found["label"]], abs=20 * tolerance)


def test_a_second_export_into_the_same_folder_keeps_the_graph_of_both(model, tiny_processor, tmp_path):
    for _ in range(2):
        export_onnx(model, tiny_processor, tmp_path / "export")
    names = {path.name for path in (tmp_path / "export" / "onnx").iterdir()}
    assert {f"model{suffix}.onnx" for suffix in ("", "_fp16", "_int8", "_quantized")} <= names
    assert json.loads((tmp_path / "export" / "config.json").read_text())["model_type"] == "clip"


def test_in_a_whole_repository_the_encoders_are_loaded_and_the_pipeline_is_not(model, tiny_processor, image, tmp_path):
    """The type `cots` is taken for an encoder in one file, `onnx/model.onnx`, which the repository lacks."""
    export_repository(model, tiny_processor, tmp_path / "model")
    export_onnx(model, tiny_processor, tmp_path / "model")
    answer, wanted = run(tmp_path / "model", "fp32", image), expected(model, tiny_processor, image)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(torch.tensor(answer[name]), wanted[name], rtol=0, atol=1e-4)
    assert "onnx/model.onnx" in answer["refused"]
    assert not (tmp_path / "model" / "onnx" / "model.onnx").exists()


def test_long_texts_are_cut_without_their_last_token(model, tiny_processor, image, tmp_path):
    """A limit of transformers.js 4.3, and the reason why the browser demo cuts texts itself; docs/onnx.md says so."""
    export_onnx(model, tiny_processor, tmp_path / "export")
    text = "a red circle " * 30
    (cut,) = run(tmp_path / "export", "fp32", image, [text])["input_ids"]
    wanted = tiny_processor(text=text, truncation=True)["input_ids"]
    assert cut[:-1] == wanted[:-1] and cut[-1] != wanted[-1] == tiny_processor.tokenizer.sep_token_id


IN_A_BROWSER = """
    const [image, labels, done] = arguments;
    (async () => {
      const { env, pipeline } = await import("/npm/@huggingface/transformers/dist/transformers.min.js");
      env.allowRemoteModels = false;
      env.allowLocalModels = true;
      env.localModelPath = "/";
      const folder = "/npm/@huggingface/transformers/node_modules/onnxruntime-web/dist";
      const runtime = `${folder}/ort-wasm-simd-threaded.asyncify`;
      env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
      const options = { dtype: "fp32", device: "wasm" };
      const classify = await pipeline("zero-shot-image-classification", "export", options);
      return classify(image, labels, { hypothesis_template: "{}" });
    })().then(done, (error) => done(String(error)));
"""


def test_a_browser_runs_the_pipeline(model, tiny_processor, image, tmp_path):
    skip_without_browser()
    export_onnx(model, tiny_processor, tmp_path / "site" / "export")
    (tmp_path / "site" / "npm").symlink_to(node_modules())
    data = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    with serve_static(tmp_path / "site") as site, open_browser(800) as browser:
        browser.set_script_timeout(120)
        browser.get(f"{site.url}/export/config.json")
        found = browser.execute_async_script(IN_A_BROWSER, data, LABELS)
    shares = dict(zip(LABELS, expected(model, tiny_processor, image)["shares"].tolist(), strict=True))
    assert {each["label"]: each["score"] for each in found} == pytest.approx(shares, abs=1e-3)
