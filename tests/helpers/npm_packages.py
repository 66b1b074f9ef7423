"""The npm packages in tests/node/package.json: what the browser demo runs on, and transformers.js."""

import shutil
from pathlib import Path

import pytest

NODE = Path(__file__).parents[1] / "node"
INSTALL = "npm install --ignore-scripts --no-package-lock --prefix tests/node"


def node_modules() -> Path:
    """Their folder; a test is skipped where they are not installed."""
    if not (NODE / "node_modules").is_dir():
        pytest.skip(f"the npm packages are missing: {INSTALL}")
    return NODE / "node_modules"


def skip_without_node() -> None:
    """Skip a test where node, which runs transformers.js without a browser, is missing."""
    if shutil.which("node") is None:
        pytest.skip("node is missing: apt-get install nodejs npm")
