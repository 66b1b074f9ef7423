"""Every command and every piece of code in docs/hub.md, in its order, against a hub."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import run_python

from modeling_cots import COTSForPreTraining, export_repository

pytest_plugins = ["hub_fixtures"]

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(encoding="utf-8"), re.DOTALL)
WITHOUT_PACKAGE = 'import sys\nsys.modules["modeling_cots"] = None\n'


@pytest.mark.slow
def test_everything_in_the_document_runs(hub, tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(0)
    export_repository(COTSForPreTraining(tiny_config), tiny_processor, tmp_path / "runs" / "quickstart")
    image = Image.radial_gradient("L").convert("RGB")
    (tmp_path / "PHOTOS").mkdir()
    for name in ("image.jpg", "PHOTOS/one.png"):
        image.save(tmp_path / name)
    names = {name: hub.new_repo_id() for _, block in BLOCKS for name in re.findall(r"you/[\w-]+", block)}
    environment = {**hub.environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    assert len(BLOCKS) >= 7 and len(names) == 4
    for language, block in BLOCKS:
        for name in sorted(names, key=len, reverse=True):
            block = block.replace(name, names[name])
        if language == "bash":
            lines = block.replace("\\\n", " ").strip().splitlines()
            commands = [[ROOT / words[1], *words[2:]] for words in map(shlex.split, lines)]
        else:
            # What needs no package must do without it.
            uses_package = "modeling_cots" in block
            commands = [["-c", block if uses_package else WITHOUT_PACKAGE + block]]
        for command in commands:
            assert run_python(*command, cwd=tmp_path, env=environment).stdout.strip()
