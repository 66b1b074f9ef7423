"""Searches by ONNX files and in bfloat16, as `cots-search` runs them."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_cots import COTSModel, SearchIndex, encoders_cots, export_onnx, export_repository
from modeling_cots.search import cli
from modeling_cots.search.backends import load_encoders

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


@pytest.fixture
def repository(model, tiny_processor, tmp_path):
    export_repository(model, tiny_processor, tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def search(capsys, *arguments) -> list[str]:
    """The lines that the command prints."""
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_indexes_and_queries_run_by_onnx_files_of_either_kind_of_repository(
    repository, model, tiny_processor, photographs, tmp_path, capsys
):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    export_onnx(model, tiny_processor, repository)
    export_onnx(model, tiny_processor, tmp_path / "alone")
    by_torch, by_onnx = tmp_path / "by_torch", tmp_path / "by_onnx"
    search(capsys, "index", photographs, "--model", repository, "--index", by_torch)
    search(capsys, "index", photographs, "--model", tmp_path / "alone", "--index", by_onnx, "--backend", "onnx")
    query = ("query", by_torch, "a red circle")
    expected = search(capsys, *query)
    assert len(expected) == 6
    # One identity: what one of the two has embedded the other one searches.
    assert search(capsys, *query, "--backend", "onnx") == expected
    assert search(capsys, *query, "--backend", "onnx", "--model", tmp_path / "alone") == expected
    assert search(capsys, "query", by_onnx, "a red circle", "--model", repository) == expected
    assert len(search(capsys, *query, "--backend", "onnx", "--dtype", "int8")) == 6


def test_openvino_searches_an_index(repository, model, tiny_processor, tiny_inputs, photographs, tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    export_onnx(model, tiny_processor, repository)
    search(capsys, "index", photographs, "--model", repository, "--index", tmp_path / "i", "--dtype", "float32")
    query = ("query", tmp_path / "i", "a red circle")
    expected = search(capsys, *query, "--dtype", "float32")
    assert search(capsys, *query, "--backend", "openvino", "--dtype", "float32") == expected
    assert len(search(capsys, *query, "--backend", "openvino")) == 6
    found, _ = load_encoders(str(repository), None, CPU, "openvino", None)
    with torch.no_grad():
        expected = model.encode_image(tiny_inputs["pixel_values"])
    torch.testing.assert_close(found.encode_image(tiny_inputs["pixel_values"]), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dtype", "int8"], "--backend torch has --dtype float32 or bfloat16, got 'int8'. --backend onnx has int8."),
        (["--backend", "onnx", "--dtype", "bfloat16"], "--backend onnx has --dtype float32 or float16 or int8"),
        (["--backend", "onnx"], "no ONNX export of float32"),
        (["--backend", "openvino", "--dtype", "int8"], "--backend openvino has --dtype float32, got 'int8'"),
        (["--backend", "openvino"], "no ONNX export of float32"),
    ],
)
def test_what_a_backend_does_not_have_is_refused(repository, photographs, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        cli.main(["index", str(photographs), "--model", str(repository), "--index", str(tmp_path / "i"), *options])


def test_a_cpu_that_computes_bfloat16_is_used_and_said_to_be(repository, tiny_inputs, monkeypatch, caplog):
    plain, _ = load_encoders(str(repository), None, CPU, "torch", None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr("modeling_cots.search.backends.logger.warning_once", lambda note: said.append(note))
    said: list[str] = []
    chosen, _ = load_encoders(str(repository), None, CPU, "torch", None)
    told, _ = load_encoders(str(repository), None, CPU, "torch", "float32")
    assert said == [encoders_cots.BFLOAT16_NOTE.format("--dtype float32")]
    with torch.no_grad():
        expected, found, same = (m.encode_image(tiny_inputs["pixel_values"]) for m in (plain, chosen, told))
    assert torch.equal(expected, same)
    assert 0 < (expected - found).abs().max() < 0.02 and found.dtype == torch.float32


def test_an_index_made_in_float32_is_searched_in_bfloat16(repository, photographs, tmp_path, capsys):
    search(capsys, "index", photographs, "--model", repository, "--index", tmp_path / "i", "--dtype", "float32")
    assert len(search(capsys, "query", tmp_path / "i", "a red circle", "--dtype", "bfloat16")) == 6
    with SearchIndex(tmp_path / "i", *load_encoders(str(repository), None, CPU, "torch", "bfloat16")) as index:
        assert len(index) == 6
