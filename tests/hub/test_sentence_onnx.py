"""
The text encoder's export run by sentence-transformers' ONNX backend, in the environment that the backend asks for.

optimum-onnx takes no transformers that this package runs on, so that it can never be in this one's environment:
`COTS_TEST_OPTIMUM` names the Python of another, into which `pip install "sentence-transformers[onnx]"` was run.
"""

import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch
from tiny import CAPTIONS

from modeling_cots import COTSModel, export_sentence_onnx, export_text_encoder

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
PYTHON = os.environ.get("COTS_TEST_OPTIMUM", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason='COTS_TEST_OPTIMUM names no Python with "sentence-transformers[onnx]"'
)
TEXTS = [*CAPTIONS, "a", "a red circle " * 40]
ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer

folder, texts = sys.argv[1], json.loads(sys.argv[2])
answer = {"torch": SentenceTransformer(folder, device="cpu").encode(texts).tolist()}
for name in ("model.onnx", "model_int8.onnx"):
    loaded = SentenceTransformer(folder, backend="onnx", device="cpu", model_kwargs={"file_name": name})
    answer[name] = loaded.encode(texts).tolist()
plain = SentenceTransformer(folder, backend="onnx", device="cpu")
answer["plain"] = plain.encode(texts, batch_size=2, normalize_embeddings=True).tolist()
answer["truncated"] = plain.encode(texts[0], truncate_dim=8).tolist()
answer["backend"] = [plain.backend, type(plain[0].auto_model).__name__]
answer["packages"] = [name for name in sys.modules if name.split(".")[0] == "modeling_cots"]
print(json.dumps(answer))
"""


def run_there(code: str, *arguments: str, cwd) -> str:
    """What a Python program prints in the other environment, offline and without this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [PYTHON, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@torch.no_grad()
def test_it_embeds_as_the_model_and_the_cards_example_runs(tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(0)
    model, folder = COTSModel(tiny_config).eval(), tmp_path / "text"
    export_text_encoder(model, tiny_processor, folder, model_id="text")
    export_sentence_onnx(model, folder, model_id="text")
    inputs = tiny_processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = model.encode_text(**inputs).numpy()

    answer = json.loads(run_there(ENCODE, str(folder), json.dumps(TEXTS), cwd=tmp_path).splitlines()[-1])
    assert answer["backend"] == ["onnx", "ORTModelForFeatureExtraction"] and answer["packages"] == []
    for name in ("torch", "model.onnx", "plain"):
        np.testing.assert_allclose(answer[name], expected, atol=1e-5, rtol=0, err_msg=name)
    int8 = np.array(answer["model_int8.onnx"])
    assert 0 < np.abs(int8 - expected).max() and (int8 * expected).sum(-1).min() > 0.99
    np.testing.assert_allclose(answer["truncated"], expected[0, :8], atol=1e-5, rtol=0)

    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [block for block in blocks if 'backend="onnx"' in block]
    assert run_there(example, cwd=tmp_path).strip().endswith(f"(1, {tiny_config.projection_dim})")
