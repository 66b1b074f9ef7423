"""`python -m modeling_cots` lists the programs that are installed."""

import importlib
import runpy
import tomllib
from pathlib import Path

from modeling_cots.__main__ import PROGRAMS

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))


def test_it_lists_every_program(capsys):
    runpy.run_module("modeling_cots", run_name="__main__")
    printed = capsys.readouterr().out
    for name, what in PROGRAMS.items():
        assert f"    {name}" in printed and what in printed
    assert max(map(len, printed.splitlines())) < 120


def test_what_it_lists_is_what_is_installed():
    assert list(PROGRAMS) == list(PYPROJECT["project"]["scripts"])
    for name, target in PYPROJECT["project"]["scripts"].items():
        module, _, function = target.partition(":")
        # `cots-search` stands beside the package, whose import takes seconds.
        folder = "" if name == "cots-search" else "modeling_cots.scripts."
        assert module == folder + name.replace("-", "_")
        assert callable(getattr(importlib.import_module(module), function))
