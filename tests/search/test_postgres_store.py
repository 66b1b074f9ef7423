"""What only PostgreSQL has: passwords, transactions, a graph that is made at the end. test_stores.py has the rest."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from search_stores import INFO, fill, make_rows, make_vectors, names

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.search import postgres_store
from modeling_cots.search.cli import main
from modeling_cots.search.conditions import as_conditions
from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.options import is_postgres_uri
from modeling_cots.search.postgres_store import PostgresStore
from modeling_cots.search.stores import open_store, store_exists

for package in ("psycopg", "pgvector"):
    pytest.importorskip(package)


def type_of(store) -> str:
    """The type of the column of embeddings."""
    return store._value(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s",
        (store.table, "embedding"),
    )


def has_graph(store) -> bool:
    return store._value("SELECT count(*) FROM pg_indexes WHERE tablename = %s AND indexdef ~ 'hnsw'", (store.table,))


def test_tells_postgres_by_the_name():
    assert is_postgres_uri("postgresql://host/db#photos") and is_postgres_uri("postgres:///db?host=/run")
    assert is_postgres_uri("postgresql://me@host:5432,other:5433/db")
    assert not is_postgres_uri("postgresql") and not is_postgres_uri("http://host:19530")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:hidden@host/db#photos",
        "postgres://me:hid#hidden@host/db",
        "postgresql://me:hid/hidden@host/db",
        "postgresql://host/db?user=me&password=hidden#photos",
        "postgresql://host/db?password=hidden",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(address, tmp_path):
    for call in (
        lambda: open_store(address),
        lambda: store_exists(address),
        lambda: main(["query", address, "a dog"]),
        lambda: main(["index", str(tmp_path), "--model", "m", "--index", address]),
    ):
        with pytest.raises(ValueError, match="PGPASSWORD or ~/.pgpass") as caught:
            call()
        assert "hid" not in str(caught.value)


def test_the_password_comes_from_the_environment_or_the_file(new_place, monkeypatch, tmp_path):
    place = new_place("postgres")
    server = place.partition("?host=")[2].partition("#")[0]
    store = PostgresStore.create(place, INFO, "exact")
    store._run("DROP ROLE IF EXISTS guest")
    store._run("CREATE ROLE guest LOGIN SUPERUSER PASSWORD 'very-secret'")
    rules = Path(server) / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text("local all guest scram-sha-256\n" + before)
    guest = place.replace("//postgres@", "//guest@")
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        store._run("SELECT pg_reload_conf()")
        until = time.monotonic() + 60
        while True:  # the server reads the file when it comes to it
            try:
                PostgresStore(guest).close()
            except ValueError as error:
                assert "password" in str(error)
                break
            assert time.monotonic() < until
        monkeypatch.setenv("PGPASSWORD", "wrong-secret")
        with pytest.raises(ValueError, match="No PostgreSQL answers at .*authentication failed") as caught:
            PostgresStore(guest)
        assert "secret" not in str(caught.value) and caught.value.__cause__ is None
        monkeypatch.setenv("PGPASSWORD", "very-secret")
        PostgresStore(guest).close()
        monkeypatch.delenv("PGPASSWORD")
        (tmp_path / ".pgpass").write_text("*:*:*:guest:very-secret\n")
        (tmp_path / ".pgpass").chmod(0o600)
        PostgresStore(guest).close()
    finally:
        rules.write_text(before)
        store._run("SELECT pg_reload_conf()")
        store.close()


def test_nothing_answers(monkeypatch, tmp_path):
    monkeypatch.setenv("PGPASSWORD", "hidden")
    for address in (f"postgresql:///db?host={tmp_path}", "postgresql://host:port/db", "postgresql://h/db?mode=hidden"):
        with pytest.raises(ValueError, match="^No PostgreSQL answers at ") as caught:
            PostgresStore(address)
        assert "\n" not in str(caught.value) and "hidden" not in str(caught.value).replace("mode=hidden", "")


def test_the_graph_is_made_at_the_end_of_the_first_run(new_place):
    store = PostgresStore.create(new_place("postgres"), INFO, "hnsw")
    assert type_of(store) == "vector(16)" and not has_graph(store)
    with pytest.raises(KeyboardInterrupt), store.adding({"test": {"images": 9}}):
        store.add(make_rows(make_vectors(4)))
        raise KeyboardInterrupt
    assert not has_graph(store) and store.unfinished == {"test": {"images": 9}} and len(store) == 4
    fill(store, make_rows(make_vectors(3, seed=1), first=4))
    assert has_graph(store) and store.unfinished == {"test": {"images": 9}}
    with store.adding({"test": {"images": 9}}):
        pass
    assert store.unfinished == {}
    store.rebuild("halfvec")
    assert type_of(store) == "halfvec(16)" and has_graph(store) and store.info["engine"] == "halfvec"
    fill(store, make_rows(make_vectors(1, seed=2), first=7))
    assert names(store.search(make_vectors(1, seed=2), 1, [])[0]) == ["pic7"]
    store.rebuild("exact")
    assert type_of(store) == "vector(16)" and not has_graph(store) and len(store) == 8
    store.close()


def test_a_filter_finds_all_that_satisfies_it_by_the_graph_too(new_place, monkeypatch):
    store = PostgresStore.create(new_place("postgres"), INFO, "hnsw")
    vectors = make_vectors(3_000)
    far = np.argsort(vectors @ vectors[0])[:30]  # the last that a graph would come to
    fill(store, make_rows(vectors, rare=[number in far for number in range(3_000)]))
    monkeypatch.setattr(postgres_store, "FEW_ROWS", 0)
    store._connection.execute("SET enable_seqscan = off; SET enable_sort = off")
    found = store.search(vectors[:1], 20, as_conditions("rare == true"))[0]
    assert len(found) == 20 and {int(name[3:]) for name in names(found)} <= set(far.tolist())
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    store.close()


def test_an_entry_is_stored_once_and_the_last_write_counts(new_place):
    store = PostgresStore.create(new_place("postgres"), INFO, "exact")
    fill(store, make_rows(make_vectors(3), year=[1, 2, 3]))
    again = make_rows(make_vectors(1, seed=5), year=[7])
    fill(store, pa.concat_tables([again, again]))
    assert len(store) == 3 and store.search(make_vectors(1, seed=5), 1, [])[0][0]["year"] == 7
    store.close()


def test_what_the_database_cannot_hold_is_replaced(new_place):
    store = PostgresStore.create(new_place("postgres"), INFO, "exact")
    rows = make_rows(make_vectors(2), place=["a\0b", None], size=[1e300, 0.1])
    fill(store, rows)
    (hit,) = store.search(make_vectors(2)[:1], 1, as_conditions("place == 'a\\0b'"))[0]
    assert hit["place"] == "a\ufffdb" and hit["size"] == 1e300 and isinstance(hit["size"], float)
    assert store.find(as_conditions("size == 0.1")).tolist() == row_ids_of(["pic1"]).tolist()
    store.close()


def test_foreign_and_unfit_tables_are_refused(new_place, monkeypatch):
    place = new_place("postgres")
    store = PostgresStore.create(place, INFO, "exact")
    other = new_place("postgres")
    store._run(f"CREATE TABLE {other.partition('#')[2]} (a int)")
    with pytest.raises(ValueError, match="was not made by `cots-search index`"):
        PostgresStore(other)
    with pytest.raises(ValueError, match="There is a table .* already"):
        PostgresStore.create(other, INFO, "exact")
    with pytest.raises(ValueError, match="There is no table 'nothing' at"):
        PostgresStore(place.partition("#")[0] + "#nothing")
    with pytest.raises(ValueError, match="at most 48 bytes"):
        PostgresStore.create(place.partition("#")[0] + "#" + "x" * 49, INFO, "exact")
    with pytest.raises(ValueError, match="got 'int8', which needs FAISS or a Milvus server or a Milvus Lite file"):
        PostgresStore.create(new_place("postgres"), INFO, "int8")
    with pytest.raises(ValueError, match="'hnsw' takes at most 2,000 numbers, and the embeddings have 2,001"):
        PostgresStore.create(new_place("postgres"), {**INFO, "dim": 2_001}, "hnsw")
    monkeypatch.setattr(postgres_store, "LOWEST_PGVECTOR", (99, 0))
    with pytest.raises(ValueError, match="has pgvector .*, and 99.0 is needed"):
        PostgresStore(place)
    store.close()


def test_a_name_with_signs_is_a_name(new_place):
    place = new_place("postgres") + '"; DROP TABLE x; -- %s {a}'
    store = PostgresStore.create(place, INFO, "hnsw")
    fill(store, make_rows(make_vectors(3)))
    assert len(store) == 3 and store.delete(row_ids_of(["pic1"])) == 1 and store_exists(place)
    store.close()


def test_a_connection_that_the_server_ended_is_made_again(new_place):
    place = new_place("postgres")
    store, other = PostgresStore.create(place, INFO, "exact"), PostgresStore(place)
    fill(store, make_rows(make_vectors(3)))
    other._value("SELECT pg_terminate_backend(%s)", (store._connection.info.backend_pid,))
    with pytest.raises(ValueError, match="PostgreSQL refused a command"):
        len(store)
    assert names(store.search(make_vectors(1), 3, [])[0])[0] == "pic0"
    store.close()
    other.close()


def test_threads_share_a_store(new_place):
    store = PostgresStore.create(new_place("postgres"), INFO, "exact")
    vectors = make_vectors(20)
    fill(store, make_rows(vectors))

    def look(number: int) -> list[str]:
        return names(store.search(vectors[number : number + 1], 1, as_conditions("name != x"))[0])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(look, range(20)))
    assert found == [[f"pic{number}"] for number in range(20)]
    store.close()


def test_the_program_indexes_queries_and_deletes(new_place, tiny_config, tiny_processor, tmp_path, capsys):
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        ScenesDataset("train", 4, 32)[number]["image"].save(tmp_path / "photos" / f"{number}.png")
    place, photos = new_place("postgres"), os.path.realpath(tmp_path / "photos")
    main(["index", photos, "--model", str(tmp_path / "model"), "--index", place, "--engine", "hnsw"])
    main(["query", place, "--image", f"{photos}/2.png", "--top", "1"])
    assert f"1.  1.000  {photos}/2.png" in capsys.readouterr().out
    main(["delete", place, f"{photos}/2.png"])
    main(["index", photos, "--model", str(tmp_path / "model"), "--index", place])
    main(["rebuild", place, "--engine", "halfvec"])
    said = capsys.readouterr().out
    assert "Deleted 1 images; 3 are left." in said and "Added 0 images" in said and "'halfvec' and 3 images" in said
