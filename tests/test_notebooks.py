"""The notebooks, from their first cell to their last, on little data and for a few steps."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from scene_files import png

from modeling_cots import ScenesDataset

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SCREEN = 50  # lines
LINE = 240  # characters, two lines of a wide screen


def run(name: str, folder: Path, **parameters) -> list[dict]:
    """The code cells after a run in `folder`, with other values in the cell of parameters."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for parameter, value in parameters.items():
        cell.source, count = re.subn(
            rf"^{parameter} = .*$", f"{parameter} = {value!r}", cell.source, flags=re.MULTILINE
        )
        assert count == 1, parameter
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    return [cell for cell in client.execute().cells if cell.cell_type == "code"]


def printed(cells: list[dict]) -> str:
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def check_sizes(cells: list[dict]) -> None:
    """No cell prints more than a screen."""
    for cell in cells:
        shown = "".join(output.get("text", "") for output in cell.outputs)
        lines = [line for part in shown.splitlines() for line in part.split("\r")[-1:]]
        assert sum(1 + len(line) // LINE for line in lines) <= SCREEN, f"{cell.source}\n{shown}"


def images_in(cell: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def repository_of(pyproject: dict) -> str:
    """The owner and name on GitHub that the project's links have, or with a placeholder where there are none yet."""
    links = " ".join(pyproject["project"]["urls"].values())
    found = re.search(r"github\.com/([\w.-]+/[\w.-]+)", links)
    return found[1] if found else "OWNER/modeling_cots"


def test_your_own_folder_becomes_a_model_that_finds_its_images(tmp_path):
    scenes = ScenesDataset("train", 80, 40)
    (tmp_path / "mine").mkdir()
    with (tmp_path / "mine" / "metadata.jsonl").open("w") as file:
        for number in range(80):
            (tmp_path / "mine" / f"{number}.png").write_bytes(png(scenes[number]["image"]))
            file.write(json.dumps({"file_name": f"{number}.png", "captions": scenes[number]["captions"]}) + "\n")
    cells = run("fine_tune", tmp_path, FOLDER="mine", MAX_STEPS=2)
    assert "72 images to train on, 8 to measure on." in printed(cells)
    assert (tmp_path / "fine_tuned" / "model.safetensors").is_file()
    results = json.loads((tmp_path / "fine_tuned" / "results.json").read_text())
    assert f"t2i R@1 {results['metrics']['t2i_recall_at_1']:5.1f}" in printed(cells)
    assert images_in(cells[3]) == 1 and images_in(cells[-1]) == 1
    check_sizes(cells)


def test_photographs_are_found_by_words_and_by_images(tmp_path):
    cells = run("search", tmp_path, MAX_STEPS=2)
    assert "Added 200 images" in printed(cells)
    assert images_in(cells[-2]) == 1 and images_in(cells[-1]) == 2
    check_sizes(cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_opens_in_colab_and_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    repository = repository_of(tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")))
    link = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    assert f'git+https://github.com/{repository}"' in notebook.cells[1].source
    assert f"(https://colab.research.google.com/assets/colab-badge.svg)]({link})" in notebook.cells[0].source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
