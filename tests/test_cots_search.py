"""The program `cots-search`: what it imports before it has something to do, and how it ends."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modeling_cots.search import options
from modeling_cots.search.backends import ONNX_DTYPES, TORCH_DTYPES
from modeling_cots.search.index_types import INDEX_TYPES
from modeling_cots.search.options import build_parser

ROOT = Path(__file__).parents[1]
RUN = """
import sys
import cots_search
try:
    cots_search.main()
finally:
    heavy = {"modeling_cots", "torch", "transformers", "numpy", "pyarrow", "datasets", "PIL"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""


def run(*words: str, cwd: Path) -> tuple[str, str, int]:
    """What a command says and how it ends, in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{RUN}", *words]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return ended.stdout, ended.stderr, ended.returncode


@pytest.mark.parametrize(
    ("command", "said", "status"),
    [
        ("--help", "flickr8k_dinov2", 0),
        ("query --help", "--image_weight", 0),
        ("serve --help", "127.0.0.1", 0),
        ("qurey IDX dog", "invalid choice: 'qurey'", 2),
        ("query IDX dog --tpo 3", "unrecognized arguments: --tpo 3", 2),
        ("query IDX dog --to 3", "unrecognized arguments: --to 3", 2),
        ("query IDX dog --top 0", "'0' is not a whole number of at least 1", 2),
        ("query IDX dog --image_weight 2", "'2' is not a number between 0", 2),
        ("rebuild IDX --target_recall 1.5", "'1.5' is not a share above 0 and at most 1, such as 0.95", 2),
        ("rebuild IDX --target_recall 0", "'0' is not a share above 0 and at most 1, such as 0.95", 2),
        ("serve IDX --port 70000", "'70000' is not a port", 2),
        ("index PHOTOS", "required: --model, --index", 2),
        ("query IDX dog", "There is no index in 'IDX': make one with `cots-search index`.", 1),
        ("serve photos.db", "There is no index in 'photos.db'", 1),
        ("delete IDX a.jpg", "There is no index in 'IDX'", 1),
        ("rebuild IDX", "There is no index in 'IDX'", 1),
        ("add IDX PHOTOS", "There is no index in 'IDX'", 1),
        ("embed PHOTOS --model m", "required: --output, --checkpoint", 2),
        (
            "embed PHOTOS --model m --output o --checkpoint c --gpus_per_actor -1",
            "'-1' is not a number of at least 0",
            2,
        ),
        ("embed ./nothing --model m --output o --checkpoint c", "The data set './nothing' does not exist.", 1),
        ("load IDX", "required: files", 2),
        ("query . --image dog.jpg", "No such file: 'dog.jpg'", 1),
        ("query . --html out.html", "--html takes one query", 1),
        ("index ./nothing --model m --index IDX", "The data set './nothing' does not exist.", 1),
        ("index . --model runs/nothing --index IDX", "There is no COTS model in 'runs/nothing': no such folder.", 1),
        ("index . --model ./nothing --index IDX", "There is no COTS model in './nothing': no such folder.", 1),
        ("query IDX dog --debug", "ValueError: There is no index in 'IDX'", 1),
    ],
)
def test_help_and_slips_import_nothing_heavy(command, said, status, tmp_path):
    (tmp_path / "runs").mkdir()
    out, err, ended = run(*command.split(), cwd=tmp_path)
    assert ended == status and said in out + err and out.splitlines()[-1] == "imported: []"
    if status and "--debug" not in command:
        assert len(err.splitlines()) == 1


def test_the_options_name_every_index_type_and_precision():
    assert options.INDEX_TYPES == ", ".join(INDEX_TYPES)
    assert options.TORCH_DTYPES == ", ".join(TORCH_DTYPES) and options.ONNX_DTYPES == ", ".join(ONNX_DTYPES)


def test_every_command_has_its_words():
    commands = build_parser()._subparsers._group_actions[0].choices
    assert list(commands) == ["index", "add", "embed", "load", "query", "serve", "delete", "rebuild"]
    for parser in commands.values():
        assert all(action.help for action in parser._actions)


def test_it_is_installed_beside_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]["cots-search"] == "cots_search:main"
    assert "py_modules = cots_search" in (ROOT / "setup.cfg").read_text(encoding="utf-8")
