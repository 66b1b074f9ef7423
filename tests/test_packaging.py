"""What pyproject.toml promises, held against the files that have to keep it."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import modeling_cots
from modeling_cots.hub_export import REQUIREMENTS

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_lowest_versions_are_the_lower_bounds_of_the_dependencies_and_extras():
    project, bounds = PYPROJECT["project"], {}
    every = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    for requirement in map(Requirement, every):
        (bound,) = [part.version for part in requirement.specifier if part.operator == ">="]
        assert bounds.setdefault(canonicalize_name(requirement.name), bound) == bound, requirement
    lines = (ROOT / ".github/lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    assert set(pins) == set(bounds)
    for name, pin in pins.items():
        assert Version(pin) == Version(bounds[name]) or (pin + ".0").startswith(bounds[name] + "."), name


def test_the_demo_and_an_exported_model_ask_for_the_same_bounds():
    project = PYPROJECT["project"]
    every = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    bounds = {parsed.name: parsed.specifier for parsed in map(Requirement, every)}
    lines = (ROOT / "demo/requirements.txt").read_text(encoding="utf-8").splitlines() + REQUIREMENTS.splitlines()
    bounded = [parsed for parsed in map(Requirement, lines) if parsed.specifier]
    assert {parsed.name for parsed in bounded} == {"gradio", "transformers"}
    for parsed in bounded:
        assert parsed.specifier == bounds[parsed.name], parsed.name


def test_a_job_installs_every_extra_that_it_tests_with_at_its_lowest_version():
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"pip install -e \"\.\[([-\w,]+)\]\" -c \.github/lowest\.txt", workflow)
    assert set(extras.split(",")) == set(PYPROJECT["project"]["optional-dependencies"])


def test_the_workflow_runs_every_python_that_the_classifiers_name():
    names = [line.removeprefix("Programming Language :: Python :: ") for line in PYPROJECT["project"]["classifiers"]]
    versions = [name for name in names if re.fullmatch(r"3\.\d+", name)]
    workflow = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.*)\]", workflow)[0]) == versions
    assert PYPROJECT["project"]["requires-python"] == f">={versions[0]}"


def test_the_version_stands_in_the_package_alone():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert re.search(rf'^__version__ = "{re.escape(modeling_cots.__version__)}"', _face(), re.MULTILINE)


def _face() -> str:
    return (ROOT / "modeling_cots/__init__.py").read_text(encoding="utf-8")
