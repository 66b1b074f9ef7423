"""The local store: one writer, recovery after a crash, and a folder that `datasets` alone can search."""

import os

import datasets
import numpy as np
import pytest
from search_stores import INFO, fill, make_rows, make_vectors, names

pytest.importorskip("faiss")

from modeling_cots.search.faiss_store import FaissStore


def test_plain_datasets_searches_the_folder(tmp_path):
    vectors = make_vectors(40)
    fill(FaissStore.create(tmp_path / "index", INFO, "exact"), make_rows(vectors))
    opened = datasets.load_from_disk(str(tmp_path / "index"))
    opened.load_faiss_index("embedding", str(tmp_path / "index" / "vectors.faiss"))
    _, found = opened.get_nearest_examples("embedding", vectors[7], k=1)
    assert found["name"] == ["pic7"]


def test_rows_of_a_killed_run_are_taken_up(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, make_rows(make_vectors(20)))
    store.begin()
    store.add(make_rows(make_vectors(9, seed=1), first=20))
    store._lock.release()  # the system does this for a killed process
    reader = FaissStore(tmp_path / "index")
    assert len(reader) == 20  # a reader sees what was finished
    writer = FaissStore(tmp_path / "index")
    writer.begin()
    writer.finish()
    assert len(writer) == 29
    assert names(writer.search(make_vectors(9, seed=1)[4:5], 1, [])[0]) == ["pic24"]
    # listed rows that the vectors lack are added when the index is opened
    writer.begin()
    writer.add(make_rows(make_vectors(2, seed=2), first=29))
    writer._rows.adopt()
    writer._lock.release()
    assert names(FaissStore(tmp_path / "index").search(make_vectors(2, seed=2)[:1], 1, [])[0]) == ["pic29"]


def test_an_unfinished_first_run_says_so(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    store.begin()
    store.add(make_rows(make_vectors(20)))
    store._rows.adopt()
    store._lock.release()
    with pytest.raises(ValueError, match="unfinished"):
        FaissStore(tmp_path / "index").search(make_vectors(1), 1, [])


def test_one_writer_at_a_time(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, make_rows(make_vectors(5)))
    store.begin()
    with pytest.raises(ValueError, match="Another process is writing"):
        FaissStore(tmp_path / "index").delete(np.array([1]))
    store.finish()
    FaissStore(tmp_path / "index").begin()


def test_rebuilding_frees_what_was_deleted(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, make_rows(make_vectors(20), year=list(range(20))))
    store.delete(store._rows.row_ids[:7])
    store.rebuild("hnsw")
    opened = datasets.load_from_disk(str(tmp_path / "index"))
    assert opened["name"][:] == [f"pic{number}" for number in range(7, 20)]
    assert store._rows.metadata["year"].to_pylist() == list(range(7, 20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]


def test_nothing_is_pickled(tmp_path):
    fill(FaissStore.create(tmp_path / "index", INFO, "exact"), make_rows(make_vectors(5), year=[1] * 5))
    suffixes = {path.suffix for path in (tmp_path / "index").rglob("*") if path.is_file()}
    assert suffixes <= {".arrow", ".json", ".parquet", ".faiss", ".lock"}


def test_does_not_write_into_another_folder(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="name a new folder"):
        FaissStore.create(tmp_path, INFO, "exact")


@pytest.mark.parametrize(("index_type", "more"), [("exact", set()), ("binary", {"thresholds.npy"})])
def test_bytes_are_on_the_disk_before_a_file_has_its_name(tmp_path, monkeypatch, index_type, more):
    """Every file that the package writes is flushed when whole, and renamed after that."""
    flushed, renamed = {}, set()
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        flushed[status.st_ino] = status.st_size

    def recorded_replace(source, target):
        status = os.stat(source)
        assert flushed.get(status.st_ino) == status.st_size, f"{target} was renamed before it was flushed"
        renamed.add(os.path.relpath(target, tmp_path / "index"))
        replace(source, target)

    monkeypatch.setattr("os.fsync", recorded_fsync)
    monkeypatch.setattr("os.replace", recorded_replace)
    store = FaissStore.create(tmp_path / "index", INFO, index_type)
    fill(store, make_rows(make_vectors(100), year=[2020] * 100))
    assert store.delete(store._rows.row_ids[:3]) == 3
    written = {str(path.relative_to(tmp_path / "index")) for path in (tmp_path / "index").rglob("*") if path.is_file()}
    # `datasets` writes its own description of an empty folder, and the lock has no content.
    assert renamed == written - {"dataset_info.json", "writer.lock"}
    assert {"index.json", "state.json", "deleted.parquet", "vectors.faiss", *more} < renamed
    assert [name for name in renamed if name.startswith("metadata/")]
