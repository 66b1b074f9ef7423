"""What only Milvus has: names of indexes, the token, several collections in one file. test_stores.py has the rest."""

import os
from unittest.mock import Mock

import pytest
from search_stores import INFO, fill, make_rows, make_vectors, names

pytest.importorskip("milvus_lite")

from pymilvus import DataType, MilvusClient

from modeling_cots.search.milvus_store import MilvusStore, _connected, _open_clients, connect, is_milvus_uri


def test_tells_milvus_by_the_name():
    assert is_milvus_uri("http://localhost:19530") and is_milvus_uri("https://host:19530#photos")
    assert is_milvus_uri("photos.db") and is_milvus_uri("photos.db#cats")
    assert not is_milvus_uri("photos") and not is_milvus_uri("photos.dbx")


def test_collections_share_a_file(tmp_path):
    first = MilvusStore.create(f"{tmp_path}/a.db#first", INFO, "exact")
    second = MilvusStore.create(f"{tmp_path}/a.db#second", {**INFO, "model": "other"}, "exact")
    fill(first, make_rows(make_vectors(4)))
    fill(second, make_rows(make_vectors(2), first=50))
    assert len(first) == 4 and len(second) == 2 and second.info["model"] == "other"
    assert names(second.search(make_vectors(1), 9, [])[0])[0] == "pic50"
    with pytest.raises(ValueError, match="no collection 'third'"):
        MilvusStore(f"{tmp_path}/a.db#third")
    first.close()
    second.close()


def test_a_killed_rebuild_is_finished_when_the_collection_is_opened(tmp_path, monkeypatch):
    store = MilvusStore.create(f"{tmp_path}/a.db", INFO, "exact")
    fill(store, make_rows(make_vectors(4)))
    with monkeypatch.context() as patch:
        patch.setattr(store._client, "create_index", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.rebuild("hnsw")
    store.close()
    again = MilvusStore(f"{tmp_path}/a.db")
    assert again.info["engine"] == "hnsw"
    assert names(again.search(make_vectors(4)[2:3], 1, [])[0]) == ["pic2"]
    again.close()


def test_what_cannot_be_opened_or_made_is_closed(tmp_path):
    place = f"{tmp_path}/a.db"
    with _connected(place) as client:
        client.create_collection("foreign", dimension=4)
    for call in (
        lambda: MilvusStore(f"{place}#foreign"),
        lambda: MilvusStore(f"{place}#nothing"),
        lambda: MilvusStore.create(f"{place}#foreign", INFO, "exact"),
    ):
        with pytest.raises(ValueError, match="not made by|no collection|already"):
            call()
        assert _open_clients[place] == 0


def test_a_collection_of_an_older_version_is_refused(tmp_path, monkeypatch):
    place = f"{tmp_path}/a.db"

    def older_schema(dim: int):
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("row_id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
        return schema

    monkeypatch.setattr("modeling_cots.search.milvus_store._schema", older_schema)
    with pytest.raises(ValueError, match="older version, whose ids of two images could be the same: make a new one"):
        MilvusStore.create(place, INFO, "exact")
    assert _open_clients[place] == 0


def test_results_have_the_metadata_that_another_handle_added(tmp_path):
    store = MilvusStore.create(f"{tmp_path}/a.db", INFO, "exact")
    fill(store, make_rows(make_vectors(2), year=[1, 2]))
    assert store.columns == ["name", "source", "year"]
    other = MilvusStore(f"{tmp_path}/a.db")
    fill(other, make_rows(make_vectors(3, seed=1), first=2, place=["Oslo"] * 3))
    (hit,) = store.search(make_vectors(3, seed=1)[:1], 1, [])[0]
    assert hit["place"] == "Oslo" and "year" not in hit and "embedding" not in hit
    store.close()
    other.close()


def test_binary_codes_are_not_offered(tmp_path):
    with pytest.raises(ValueError, match="exact, hnsw, int8; got 'binary', which needs FAISS"):
        MilvusStore.create(f"{tmp_path}/a.db", INFO, "binary")


def test_the_embedded_file_has_no_product_quantization(tmp_path):
    with pytest.raises(ValueError, match="Milvus Lite.*got 'ivfpq', which needs FAISS or a Milvus server"):
        MilvusStore.create(f"{tmp_path}/a.db", INFO, "ivfpq")
    store = MilvusStore.create(f"{tmp_path}/a.db", INFO, "exact")
    with pytest.raises(ValueError, match="Milvus Lite"):
        store.rebuild("ivfpq")
    store.close()


def test_long_texts_are_cut_to_what_fits(tmp_path):
    store = MilvusStore.create(f"{tmp_path}/a.db", INFO, "exact")
    rows = make_rows(make_vectors(1)).to_pylist()[0]
    rows["captions"] = ["x" * 40_000, "y" * 40_000]
    fill(store, make_rows(make_vectors(1)).from_pylist([rows], schema=make_rows(make_vectors(1)).schema))
    assert store.search(make_vectors(1), 1, [])[0][0]["captions"] == ["x" * 40_000]
    store.close()


def test_what_json_lacks_is_missing(tmp_path):
    store = MilvusStore.create(f"{tmp_path}/a.db", INFO, "exact")
    fill(store, make_rows(make_vectors(3), share=[float("nan"), float("inf"), 0.5]))
    hits = store.search(make_vectors(3), 3, [])[0]
    assert sorted((hit["name"], hit.get("share")) for hit in hits) == [("pic0", None), ("pic1", None), ("pic2", 0.5)]
    assert store.columns == ["name", "source", "share"]
    store.close()


def test_the_token_is_in_no_message(monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:very-secret")

    class Client:
        def __init__(self, uri, token):
            assert token == "root:very-secret"  # where it belongs
            raise RuntimeError(f"refused {token}")

    monkeypatch.setattr("pymilvus.MilvusClient", Client)
    with pytest.raises(ValueError, match="No Milvus answers") as caught:
        connect("http://localhost:1")
    assert "very-secret" not in str(caught.value) and caught.value.__cause__ is None


def test_a_password_in_the_address_is_refused():
    with pytest.raises(ValueError, match="MILVUS_TOKEN") as caught:
        connect("http://root:hidden@localhost:19530")
    assert "hidden" not in str(caught.value)


@pytest.mark.skipif("COTS_TEST_MILVUS" not in os.environ, reason="no server: test_milvus_server.py starts one")
def test_only_a_large_run_ends_with_a_flush_on_a_server(new_place, monkeypatch):
    monkeypatch.setattr("modeling_cots.search.milvus_store.ROWS_TO_FLUSH", 20)
    store = MilvusStore.create(new_place("server"), INFO, "exact")
    for num, first, flushed in ((19, 0, 0), (20, 19, 39)):
        with store.adding({"run": {"images": num + 5, "before": 5, "entries": 0}}):
            store.add(make_rows(make_vectors(num), first=first))
        assert len(store) == num + first
        segments = store._client.list_persistent_segments(store.collection)
        assert sum(segment.num_rows for segment in segments) == flushed
    store.close()
