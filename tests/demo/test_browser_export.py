"""The script that writes the page without a server, and its push as a static Space through the real client."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from forks import ClientError
from huggingface_hub import HfApi, hf_hub_download
from image_files import as_bytes

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.hub_push import push_folder
from modeling_cots.search.browser_demo import push_browser_demo

pytest_plugins = ["hub_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SCRIPT = Path(__file__).parents[2] / "demo" / "browser" / "export.py"


@pytest.fixture
def model(tiny_config, tiny_processor, tmp_path) -> str:
    """A folder with a tiny model."""
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f'{package} is missing: pip install -e ".[onnx]"')
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def photos(tmp_path) -> str:
    """A folder with three images, a broken one and a note."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number in range(3):
        (folder / "trip" / f"{number}.jpg").write_bytes(as_bytes(ScenesDataset("train")[number]["image"], "JPEG"))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "note.txt").write_text("mine")
    return str(folder)


def run(monkeypatch, *options: str) -> None:
    """Run the script with these options."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


# --- what clients do


def export_and_push(script: str, repo_id: str, options: list[str]) -> None:
    sys.argv = [script, "--repo_id", repo_id, *options]
    runpy.run_path(script, run_name="__main__")


def push(folder: str, repo_id: str) -> str:
    return push_browser_demo(folder, repo_id).oid


def push_as_model(folder: str, repo_id: str) -> str:
    return push_folder(folder, repo_id).oid


def create_gradio_space(repo_id: str) -> None:
    HfApi().create_repo(repo_id, repo_type="space", space_sdk="gradio")


def look_up(repo_id: str) -> dict:
    info = HfApi().space_info(repo_id)
    demo = hf_hub_download(repo_id, "demo.json", repo_type="space")
    return {"sdk": info.sdk, "files": [file.rfilename for file in info.siblings], "demo": Path(demo).read_text()}


# --- tests


def test_writes_the_page_of_a_folder_of_photographs(model, photos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "page"
    run(
        monkeypatch,
        "--model",
        model,
        "--images",
        photos,
        "--output_dir",
        str(folder),
        "--dtype",
        "int8",
        "--title",
        "Trip",
    )
    demo = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert demo["title"] == "Trip" and demo["dtype"] == "int8" and demo["examples"] == [] and demo["labels"]
    entries = json.loads((folder / "collection/entries.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in entries] == ["0.jpg", "1.jpg", "2.jpg"]
    assert (folder / "collection/embeddings.bin").stat().st_size == 3 * (4 + 2 * demo["collection"]["dim"])
    said = capsys.readouterr().out
    assert "A first visit downloads" in said and f"python -m http.server --directory {folder}" in said
    with pytest.raises(SystemExit, match="is not empty"):
        run(monkeypatch, "--model", model, "--images", photos, "--output_dir", str(folder))


def test_pushes_a_static_space_and_replaces_an_earlier_page(model, photos, own_hub, tmp_path):
    repo_id = own_hub.new_repo_id()
    own_hub.run(export_and_push, str(SCRIPT), repo_id, ["--model", model, "--images", photos, "--dtype", "int8"])
    space = own_hub.run(look_up, repo_id)
    assert space["sdk"] == "static" and json.loads(space["demo"])["dtype"] == "int8"
    assert {"index.html", "README.md", "sw.js", "encoders/text_model_quantized.onnx"} <= set(space["files"])
    second = ["--model", model, "--images", photos, "--output_dir", str(tmp_path / "page")]
    own_hub.run(export_and_push, str(SCRIPT), repo_id, second)
    files = own_hub.run(look_up, repo_id)["files"]
    assert "encoders/text_model.onnx" in files and "encoders/text_model_quantized.onnx" not in files


def test_refuses_what_is_no_page_and_a_space_of_another_kind(own_hub, tmp_path):
    repo_id = own_hub.new_repo_id()
    with pytest.raises(ClientError, match="There is no demo in"):
        own_hub.run(push, str(tmp_path), repo_id)
    (tmp_path / "demo.json").write_text("{}")
    own_hub.run(create_gradio_space, repo_id)
    with pytest.raises(ClientError, match="is one of gradio, and not static"):
        own_hub.run(push, str(tmp_path), repo_id)


def test_a_model_s_own_folders_stay(own_hub, tmp_path):
    repo_id = own_hub.new_repo_id()
    (tmp_path / "first" / "collection").mkdir(parents=True)
    (tmp_path / "first" / "collection" / "mine.txt").write_text("mine")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text("{}")
    for name in ("first", "second"):
        own_hub.run(push_as_model, str(tmp_path / name), repo_id)
    assert "collection/mine.txt" in own_hub.server.hub.repositories[repo_id].resolve("main").files


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "Say where to: --repo_id NAME to push, --output_dir FOLDER"),
        (["--output_dir", "out", "--private", "true"], "--private concerns a push"),
        (["--output_dir", "out"], "model=nowhere does not exist"),
    ],
)
def test_says_what_is_missing(options, said, monkeypatch):
    with pytest.raises(SystemExit, match=said):
        run(monkeypatch, "--model", "nowhere", "--images", "nowhere", *options)
