"""The wheel without the checkout: its files, its programs, and a training, an evaluation and an export by them."""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from programs import run_python
from script_runs import ENCODER, USUAL

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "modeling_cots"
PARTS = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "modeling_cots", "cots_search.py")
MODEL = {
    "text_config": {**ENCODER, "vocab_size": 150},
    "vision_config": {**ENCODER, "image_size": 32, "patch_size": 16},
    "projection_dim": 16,
    "image_vocab_size": 30,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools would leave its own folders in the checkout, and take files from them again."""
    folder = tmp_path_factory.mktemp("source")
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)
    run_python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The folder of the programs in a new environment, which sees the packages of this one behind its own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    # A line that is a path puts that folder at the end of `sys.path`, without the editable installs that it names.
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    run_python("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return folder / "bin"


@pytest.fixture
def run(programs, tmp_path):
    """A function that runs a program of the environment in an empty folder, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(name: str, *arguments: str, **options) -> str:
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [programs / name, *arguments, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_it_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == expected | {"cots_search.py"}


def test_it_is_what_is_imported(run, programs):
    printed = run("python", "-c", "import modeling_cots; print(modeling_cots.__file__)")
    assert printed.startswith(str(programs.parent))


def test_every_program_tells_its_options(run):
    listed = run("python", "-m", "modeling_cots")
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("    ")]
    assert len(names) >= 4
    for name in names:
        assert f"usage: {name}" in run(name, "--help")


def test_a_model_is_trained_measured_and_exported(run, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    run("cots-train", dataset="scenes", model_config="model.json", output_dir="trained", eval_split="none", **USUAL)
    measured = {"zero_shot_protocol": "none", "output_dir": "measured", "use_cpu": "true", "disable_tqdm": "true"}
    printed = run("cots-evaluate", dataset="scenes", model="trained", **measured)
    assert "among 200 images and 1,000 captions" in printed
    assert json.loads((tmp_path / "measured/results.json").read_text())["trained_on"] is None
    run("cots-export", model="trained", output_dir="exported")
    code = "from modeling_cots import COTSModel; print(COTSModel.from_pretrained('exported').config.projection_dim)"
    assert run("python", "-c", code).split() == ["16"]
