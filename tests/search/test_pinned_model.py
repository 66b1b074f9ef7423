"""An index made with a model of the Hub, through the real client: its commit is kept, whatever is pushed later."""

import contextlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_cots import COTSModel, COTSProcessor
from modeling_cots.search.cli import main
from modeling_cots.search.manifest import parse_manifest, read_manifest

pytest.importorskip("faiss")
pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def folder(saved_model, tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (9, 9), (60 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


# --- what clients do


def push(source: str, repo_id: str, shift: float = 0.0, **options) -> str:
    model = COTSModel.from_pretrained(source)
    with torch.no_grad():
        model.text_projection.weight.add_(shift)
    return model.push_to_hub(repo_id, processor=COTSProcessor.from_pretrained(source), **options).oid


def cots_search(folder: str, *words: str) -> str:
    """What the command prints, or its error."""
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main(list(words))
        except ValueError as error:
            return str(error)
    return said.getvalue()


def forget_commit(index: Path) -> None:
    """As `SearchIndex.create` with a `model_name` makes an index from a model that was loaded elsewhere."""
    manifest = parse_manifest(read_manifest(index), index)
    replace(manifest, info={**manifest.info, "model_commit": None}).write(index)


# --- tests


@pytest.mark.parametrize("place", ["IDX", "photos.db"])
def test_the_commit_is_stored_and_used(hub, folder, place):
    if place.endswith(".db"):
        pytest.importorskip("milvus_lite")
    repo_id, source = hub.new_repo_id(), str(folder / "model")
    first = hub.run(push, source, repo_id)

    def run(*words: str) -> str:
        return hub.run(cots_search, str(folder), *words)

    assert "IDX has 4" in run("index", "photos", "--model", repo_id, "--index", place).replace(place, "IDX")
    found = run("query", place, "red")
    assert found.count("png") == 4
    second = hub.run(push, source, repo_id, 0.1)
    assert second != first

    # The author has pushed other weights: the index keeps to its own, also where more images are added.
    assert run("query", place, "red") == found
    Image.new("RGB", (9, 9), "blue").save(folder / "photos" / "4.png")
    assert "Added 1 images" in run("index", "photos", "--model", repo_id, "--index", place)
    Image.new("RGB", (9, 9), "green").save(folder / "photos" / "5.png")
    assert "Added 1 images" in run("add", place, "photos")
    # `--revision` says otherwise.
    assert "another one" in run("query", place, "red", "--revision", "main")
    assert run("query", place, "red", "--revision", first).count("png") == 6


def test_an_index_that_knows_no_commit_says_how_to_name_it(hub, folder):
    repo_id, source = hub.new_repo_id(), str(folder / "model")
    first = hub.run(push, source, repo_id)
    hub.run(cots_search, str(folder), "index", "photos", "--model", repo_id, "--index", "IDX")
    assert json.loads((folder / "IDX" / "index.json").read_text())["info"]["model_commit"] == first
    forget_commit(folder / "IDX")
    assert hub.run(cots_search, str(folder), "query", "IDX", "red").count("png") == 4
    hub.run(push, source, repo_id, 0.1)
    said = hub.run(cots_search, str(folder), "query", "IDX", "red")
    assert "another one" in said and "--revision" in said and "\n" not in said.strip()
    assert hub.run(cots_search, str(folder), "query", "IDX", "red", "--revision", first).count("png") == 4


def test_a_branch_with_a_slash_and_a_revision_that_is_not_there(hub, folder):
    repo_id, source = hub.new_repo_id(), str(folder / "model")
    hub.run(push, source, repo_id)
    branch = hub.run(push, source, repo_id, 0.1, revision="feature/x")
    said = hub.run(
        cots_search, str(folder), "index", "photos", "--model", repo_id, "--revision", "feature/x", "--index", "IDX"
    )
    assert "IDX has 4" in said
    assert json.loads((folder / "IDX" / "index.json").read_text())["info"]["model_commit"] == branch
    said = hub.run(cots_search, str(folder), "query", "IDX", "red", "--revision", "v9")
    assert said.startswith("There is no COTS model in") and "at the revision 'v9'" in said


def test_a_revision_of_a_folder_is_refused(folder):
    said = cots_search(str(folder), "index", "photos", "--model", "model", "--revision", "v1", "--index", "IDX")
    assert "model=model is no Hub id and has no revision 'v1'" in said
    for option in ("--dataset_revision", "--dataset_config"):
        said = cots_search(str(folder), "index", "photos", "--model", "model", option, "v1", "--index", "IDX")
        assert f"{option[2:]}=v1 belongs to a Hub id" in said
