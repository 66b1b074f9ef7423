"""The contract of the vector stores, `load` and bulk imports on a real Milvus server in a network of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from milvus_server import IN_A_NETWORK_OF_ITS_OWN
from milvus_server import __file__ as server

pytest.importorskip("milvus", reason="the standalone server, milvus 2.3.5, is not installed")
pytest.importorskip("pymilvus")


ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
FILES = [f"tests/search/test_{name}.py" for name in ("stores", "milvus_store", "milvus_import", "parquet_rows")]


@pytest.fixture(scope="module")
def network():
    """The words that start a command in a network of its own."""
    try:
        subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"unshare cannot make a network here: {error}")
    return IN_A_NETWORK_OF_ITS_OWN


def run(network: list[str], *words) -> None:
    command = [*network, sys.executable, server, *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert result.returncode == 0, result.stdout[-6_000:] + result.stderr[-2_000:]
    assert " passed" in result.stdout


@pytest.mark.slow
def test_the_contract_holds_on_a_real_server(network, tmp_path):
    run(network, tmp_path / "data", *PYTEST, "-k", "server", *FILES)


@pytest.mark.slow
def test_a_server_imports_from_a_bucket(network, tmp_path):
    for package in ("moto", "s3fs"):
        pytest.importorskip(package)
    chosen = "test_an_import_into_a_server_equals_inserts"
    run(network, "--bucket", tmp_path / "data", *PYTEST, f"tests/search/test_milvus_import.py::{chosen}")
