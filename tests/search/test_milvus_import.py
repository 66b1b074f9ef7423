"""Bulk imports into a Milvus server: equal to inserts, each image once, and what happens where they fail.

`test_milvus_server.py` starts the server. COTS_TEST_MILVUS names another one, on a machine that shares /tmp with this,
or whose storage COTS_TEST_MILVUS_STORAGE names.
"""

import json
import os
from unittest.mock import Mock

import fsspec
import pyarrow.parquet as pq
import pytest
from search_stores import INFO, fill, make_rows, make_vectors, names

from modeling_cots.search.conditions import as_conditions
from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.index import FORMAT
from modeling_cots.search.milvus_store import TOKEN_VARIABLE, ImportRefused, MilvusStore
from modeling_cots.search.parquet_rows import INFO_KEY, load_files, open_files
from modeling_cots.search.stores import create_store

pytest.importorskip("pymilvus")

NUM, PER_FILE = 60, 20
on_a_server = pytest.mark.skipif(
    "COTS_TEST_MILVUS" not in os.environ, reason="no server: test_milvus_server.py starts one"
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files of 20 entries each, each a part of its own when it is loaded."""
    monkeypatch.setattr("modeling_cots.search.parquet_rows.ROWS_AT_ONCE", PER_FILE)
    monkeypatch.setattr("modeling_cots.search.milvus_import.BYTES_PER_FILE", 1)
    columns = {
        "year": [2000 + number if number % 3 else None for number in range(NUM)],
        "share": [float("nan") if number == 5 else number / 7 for number in range(NUM)],
        'a "b"\\\n日本': [f"'{number}\" \\ 日本" for number in range(NUM)],
    }
    rows = make_rows(make_vectors(NUM), **columns)
    for part in range(NUM // PER_FILE):
        table = rows.slice(PER_FILE * part, PER_FILE)
        info = {**INFO, "format": FORMAT, "model_commit": None}
        pq.write_table(table.replace_schema_metadata({INFO_KEY: json.dumps(info)}), tmp_path / f"{part}.parquet")
    return open_files([str(tmp_path)])


def entries_of(store) -> list[dict]:
    """All entries, in the order of their names, without the score."""
    hits = store.search(make_vectors(1), 2 * NUM, [])[0]
    return sorted(({**hit, "score": None} for hit in hits), key=lambda hit: hit["name"])


@on_a_server
def test_an_import_into_a_server_equals_inserts(new_place, files, tmp_path, capsys):
    folder = os.environ.get("COTS_TEST_MILVUS_STORAGE", str(tmp_path / "storage"))
    stores = [create_store(new_place("server"), INFO, "exact") for _ in range(2)]
    for store in stores:
        fill(store, make_rows(make_vectors(NUM)[7:9], first=7, year=[1, 2]))  # two of them are there already
        fill(store, make_rows(make_vectors(1), first=NUM - 1))
        store.delete(row_ids_of([f"pic{NUM - 1}"]))
    numbers = [
        load_files(store, [*files, *files[:1]], bulk_import=folder, progress=False)
        for store, folder in zip(stores, (None, folder), strict=True)
    ]
    said = capsys.readouterr().out
    assert said.count("2 of 60 images are in the index already") == 2 and "deleted from it and stay so" in said
    assert "Inserts instead" not in said
    assert numbers == [NUM - 3, NUM - 3] and [len(store) for store in stores] == [NUM - 1, NUM - 1]
    assert entries_of(stores[0]) == entries_of(stores[1])
    for where in ("year >= 2030", "share > 7", "name == pic4", "year == 2"):
        found = [sorted(store.find(as_conditions(where))) for store in stores]
        assert found[0] == found[1] and len(found[0]) > 0
    queries = make_vectors(NUM)[:3]
    assert [names(hits) for hits in stores[0].search(queries, 5, [])] == [
        names(hits) for hits in stores[1].search(queries, 5, [])
    ]
    storage, root = fsspec.core.url_to_fs(folder)
    assert not storage.glob(f"{root}/cots_import_{stores[1].collection}*")
    for store in stores:
        store.close()


@on_a_server
def test_a_server_imports_nothing_twice_after_a_failure_and_a_kill(new_place, files, tmp_path, monkeypatch):
    store, folder = create_store(new_place("server"), INFO, "exact"), str(tmp_path / "storage")
    started, start = [], store.start_import

    def start_import(file: str) -> int:
        started.append(file)
        job = start(file if len(started) != 2 else str(tmp_path / "1.parquet"))  # no file of the server's columns
        if len(started) == 4:
            raise KeyboardInterrupt
        return job

    with monkeypatch.context() as patch:
        patch.setattr(store, "start_import", start_import)
        with pytest.raises(ValueError, match=r"has not imported 20 images \(.*\): repeat the command"):
            load_files(store, files, bulk_import=folder, progress=False)
        with pytest.raises(KeyboardInterrupt):  # when the missing file is submitted
            load_files(store, files, bulk_import=folder, progress=False)
    assert len(list((tmp_path / "storage").glob("*/*.parquet"))) == 1
    if not all(store.imports().values()):  # the last job still runs
        with pytest.raises(ValueError, match="wait for its end"):
            load_files(store, files, progress=False)
    assert load_files(store, files, bulk_import=folder, progress=False) == 0
    assert len(store) == NUM and len({hit["name"] for hit in entries_of(store)}) == NUM
    store.close()


@on_a_server
def test_a_server_that_does_not_read_the_folder_gets_inserts(new_place, files, capsys):
    store = create_store(new_place("server"), INFO, "exact")
    assert load_files(store, files, bulk_import="memory://storage", progress=False) == NUM
    assert "Inserts instead of a bulk import: the server cannot read memory://storage (" in capsys.readouterr().out
    assert len(store) == NUM
    store.close()


class Server:
    """The store of a server in a database of its own, as far as imports go."""

    def __init__(self, states=(), refusal=None):
        self.messages = Mock()
        self.messages.do_bulk_insert.side_effect = refusal
        self.messages.list_bulk_insert_tasks.return_value = [
            Mock(task_id=n, state=each) for n, each in enumerate(states)
        ]
        self.store = MilvusStore.__new__(MilvusStore)
        self.store.collection, self.store._uri, self.store._kinds = "photos", "http://host:19530/mine", {}
        self.store._client = Mock()
        self.store._client._get_connection.return_value = self.messages
        self.store._client._generate_call_context.return_value = "mine"


def test_imports_are_of_the_database_that_the_address_names():
    server = Server()
    server.store.start_import("file")
    server.store.import_state(3)
    server.store.imports()
    for name in ("do_bulk_insert", "get_bulk_insert_state", "list_bulk_insert_tasks"):
        assert getattr(server.messages, name).call_args.kwargs["context"] == "mine"
    assert server.messages.do_bulk_insert.call_args.kwargs["retry_times"] == 0, "a job may have begun"


@pytest.mark.parametrize("state", [0, 2, 5])
def test_nothing_is_written_while_an_import_goes_on(state):
    store = Server(states=[6, 1, state]).store
    assert store.imports() == {0: True, 1: True, 2: False}
    with pytest.raises(ValueError, match="importing into 'photos' .* repeat that command"):
        with store.adding():
            raise AssertionError
    with Server(states=[6, 1, 7]).store.adding():
        pass


def test_a_server_that_takes_no_import_says_why_without_the_password(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "root:secret")
    server = Server(refusal=RuntimeError("root:secret may not import"))
    with pytest.raises(ImportRefused, match=r"^\*\*\* may not import$"):
        server.store.start_import("file")


@pytest.mark.parametrize("kind", ["faiss", "milvus"])
def test_only_a_server_has_a_bulk_import(new_place, files, kind, tmp_path):
    store = create_store(new_place(kind), INFO, "exact")
    with pytest.raises(ValueError, match="A bulk import needs a Milvus server"):
        load_files(store, files, bulk_import=str(tmp_path), progress=False)
    assert len(store) == 0
    store.close()
