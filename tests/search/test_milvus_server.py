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
FILES = [f"tests/search/test_{name}.py" for name in ("stores", "milvus_store", "milvus_import", "parquet_rows")]


@pytest.fixture(scope="module")
def network():
    """The words that start a command in a network of its own."""
    try:
        subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"unshare cannot make a network here: {error}")
    return IN_A_NETWORK_OF_ITS_OWN


@pytest.mark.slow
def test_the_contract_holds_on_a_real_server(network, tmp_path):
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "server", *FILES]
    command = [*network, sys.executable, server, str(tmp_path / "data"), *tests]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert result.returncode == 0, result.stdout[-6_000:] + result.stderr[-2_000:]
    assert " passed" in result.stdout
