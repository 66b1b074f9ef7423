"""The rooms of the package: who may import whom; a downloaded model needs nothing but torch and transformers."""

import ast
import sys
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest
from carried import CARRIED
from forks import bare_server
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_cots.hub_export import CODE_FILES

PACKAGE = Path(__file__).parents[1] / "modeling_cots"
TOP = "top"

# What each room may import beside itself. The top is what a saved model carries, and the package's face.
ALLOWED = {
    TOP: set(),
    "method": {TOP},
    "data": {TOP, "method"},
    "visualization": {TOP},
    "evaluation": {TOP, "method", "data"},
    "hub": {TOP, "data", "evaluation"},
    "search": {TOP, "data", "hub"},
    "training": {TOP, "method", "data", "visualization", "evaluation", "hub"},
    "scripts": {TOP, "method", "data", "visualization", "evaluation", "hub", "search", "training"},
}
# Files at the top that never travel with a model: `from_pretrained` of a COTSModel needs none.
NOT_CARRIED = {"__init__.py", "__main__.py", "modeling_cots_pretraining.py"}
# The other packages that a room, or a file, may import; files and rooms that are not named here may import any.
# `av` is imported inside functions only, behind transformers' own check for it; so is onnxruntime. `pillow_heif` and
# `simplejpeg` are imported in a `try`. `onnx_cots.py` alone needs tokenizers, and no transformers.
# PIL is what image processors of transformers need.
CARRIED_PACKAGES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "av", "onnxruntime", "tokenizers"}
CARRIED_PACKAGES |= {"pillow_heif", "simplejpeg", "openvino"}
THIRD_PARTY = {
    TOP: CARRIED_PACKAGES,
    "hub/handler.py": {"torch", "transformers", "huggingface_hub", "PIL", "numpy"},
    "method": {"torch", "transformers", "safetensors", "numpy"},
    "visualization": {"torch", "numpy", "matplotlib", "PIL", "transformers"},
}
# Each of these may be missing, and is imported in the files that are named alone: one reads videos, one writes them.
OPTIONAL = {
    "faiss": {"search/faiss_vectors.py", "scripts/kmeans_fitting.py"},
    "pymilvus": {"search/milvus_store.py"},
    "psycopg": {"search/postgres_store.py"},
    "pgvector": {"search/postgres_store.py"},
    "av": {"video_reading_cots.py", "data/scenes/moving.py"},
    "matplotlib": {"visualization/figures.py"},
    "onnx": {"hub/onnx_export.py", "hub/transformers_js.py"},
    "onnxruntime": {"hub/onnx_export.py", "hub/transformers_js.py", "onnx_cots.py"},
    "openvino": {"onnx_cots.py"},
    "peft": {"training/adapters.py"},
    "pillow_heif": {"image_reading_cots.py"},
    "torchdata": {"data/streaming/mixture.py"},
    "simplejpeg": {"image_reading_cots.py"},
    "ray": {"data/ray_data.py"},
}


def room_of(file: Path, package: Path = PACKAGE) -> str:
    """The folder of a file right below the package; files of its sub-folders belong to the same room."""
    parts = file.relative_to(package).parts
    return TOP if len(parts) == 1 else parts[0]


@cache
def imports_of(file: Path, package: Path = PACKAGE) -> tuple[set[str], set[str]]:
    """Rooms, and names of other packages, that a file imports anywhere in it, by relative imports of any level."""
    folder = ".".join(["modeling_cots", *file.relative_to(package).parts[:-1]])
    rooms, others = set(), set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            module = resolve_name("." * node.level + (node.module or ""), folder)
            names = [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
            for name in names:
                first, *rest = name.split(".")[1:] or [TOP]
                rooms.add(first if rest or (package / first).is_dir() else TOP)
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            others.update(alias.name.partition(".")[0] for alias in node.names)
    return rooms, others - set(sys.stdlib_module_names)


def violations(package: Path = PACKAGE) -> list[str]:
    """Every import that the table forbids, as a sentence."""
    found = []
    for file in sorted(package.rglob("*.py")):
        name, room = file.relative_to(package).as_posix(), room_of(file, package)
        if room not in ALLOWED:
            found.append(f"{name} stands in the room {room}, which the table does not know")
            continue
        rooms, others = imports_of(file, package)
        # The face imports what is carried, and beside it the heads, so that the Auto classes know them.
        found += [f"{name} imports from {other}" for other in sorted(rooms - ALLOWED[room] - {room})]
        allowed = THIRD_PARTY.get(name, THIRD_PARTY.get(room, others))
        found += [f"{name} imports {other}" for other in sorted(others - allowed)]
        if "modeling_cots" in others:
            found.append(f"{name} imports the package by its full name")
    return found


def test_rooms_import_only_what_the_table_allows():
    assert violations() == []


def test_the_table_names_every_room_and_has_no_circle():
    assert set(ALLOWED) == {room_of(file) for file in PACKAGE.rglob("*.py")}
    below = []
    for room, allowed in ALLOWED.items():
        assert allowed <= set(below), f"{room} may only import rooms above it in the table"
        below.append(room)


@pytest.mark.parametrize(
    "file, line, said",
    [
        ("data/scenes/planted.py", "from ...training.trainer import COTSTrainer", "imports from training"),
        ("data/streaming/planted.py", "from ... import scripts", "imports from scripts"),
        ("method/planted.py", "from ..data.items import EpochSeeds", "imports from data"),
        ("method/planted.py", "def read():\n    from ..data import items", "imports from data"),
        ("training/planted.py", "from ..search.index import SearchIndex", "imports from search"),
        ("planted.py", "from .method.losses import queue_logits", "imports from method"),
        ("planted.py", "import datasets", "imports datasets"),
        ("search/planted.py", "from modeling_cots.data import items", "by its full name"),
        ("attic/planted.py", "import os", "which the table does not know"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, said):
    package = tmp_path / "modeling_cots"
    for room in [*ALLOWED, "data/scenes", "data/streaming", "attic"]:
        (package / room).mkdir(parents=True, exist_ok=True)
    (package / file).write_text(line + "\n", encoding="utf-8")
    (found,) = violations(package)
    assert said in found and file in found


def test_the_top_holds_what_is_carried_and_the_face():
    assert {file.name for file in PACKAGE.glob("*.py")} == CARRIED | NOT_CARRIED


def test_a_saved_model_carries_the_closure_of_its_code_and_nothing_else():
    closure = {Path(file).name for name in CODE_FILES for file in get_relative_import_files(PACKAGE / name)}
    assert closure | set(CODE_FILES) == CARRIED


def test_optional_packages_are_imported_where_the_table_says():
    for package, homes in OPTIONAL.items():
        users = {
            file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if package in imports_of(file)[1]
        }
        assert users == homes, package


def test_importing_the_package_loads_nothing_of_training():
    code = (
        "import sys\n"
        "heavy = {'datasets', 'evaluate', 'timm', 'modeling_cots.training.trainer'}\n"
        "assert 'modeling_cots' not in sys.modules and not heavy & set(sys.modules)\n"
        "import modeling_cots\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert bare_server().run_python("-c", code).stdout.strip() == "[]"


def test_every_public_name_is_there():
    import modeling_cots

    for name in modeling_cots.__all__:
        assert getattr(modeling_cots, name).__doc__
    with pytest.raises(AttributeError, match="no attribute"):
        modeling_cots.nothing  # noqa: B018
