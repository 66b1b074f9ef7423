"""The ways to encode on a CPU give embeddings that agree, before anybody compares their speeds."""

import encode_cpu
import numpy as np
import pytest
import torch

from modeling_cots import COTSModel

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_all_arms_encode_alike(tiny_config, tiny_inputs, tmp_path):
    torch.manual_seed(0)
    model = COTSModel(tiny_config).eval()
    inputs = {name: tensor.numpy() for name, tensor in tiny_inputs.items()}
    with torch.no_grad():
        arms = encode_cpu.build_arms(model, tmp_path)
        images = {name: encode(inputs["pixel_values"]) for name, (encode, _) in arms.items()}
        texts = {name: encode(inputs["input_ids"], inputs["attention_mask"]) for name, (_, encode) in arms.items()}
    assert len(arms) >= 6
    for embeds in (images, texts):
        for name, found in embeds.items():
            is_exact = name.endswith("float32") and "int8" not in name
            np.testing.assert_allclose(found, embeds["eager float32"], atol=1e-5 if is_exact else 0.05, err_msg=name)


def test_the_fastest_round_counts_and_the_first_does_not(monkeypatch):
    clock = iter([0, 9, 9, 10, 10, 13, 13, 15, 15, 17, 17, 21])
    monkeypatch.setattr(encode_cpu.time, "process_time", lambda: next(clock))
    assert encode_cpu.fastest({"a": lambda: None, "b": lambda: None}, rounds=2) == {"a": 2, "b": 2}
