"""The local store: one writer, recovery after a crash, and a folder that `datasets` alone can search."""

import itertools
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pytest
from forks import ClientError, server_with_package
from search_stores import DIM, INFO, build_without_lists, fill, make_rows, make_vectors, names

pytest.importorskip("faiss")

from modeling_cots.search import rows as search_rows
from modeling_cots.search.conditions import as_conditions
from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.faiss_store import FaissStore
from modeling_cots.search.faiss_vectors import FaissVectors
from modeling_cots.search.rows import write_part
from modeling_cots.search.stores import store_exists

VECTORS = make_vectors(25)


def test_plain_datasets_searches_the_folder(tmp_path):
    vectors = make_vectors(40)
    fill(FaissStore.create(tmp_path / "index", INFO, "exact"), make_rows(vectors))
    opened = datasets.load_from_disk(str(tmp_path / "index"))
    opened.load_faiss_index("embedding", str(next((tmp_path / "index").glob("vectors-*.faiss"))))
    _, found = opened.get_nearest_examples("embedding", vectors[7], k=1)
    assert found["name"] == ["pic7"]


@pytest.mark.parametrize("index_type", ["int8", "binary"])
@pytest.mark.parametrize("target", [None, 0.9])
def test_codes_of_before_are_searched_and_added_to_until_they_are_rebuilt(tmp_path, monkeypatch, index_type, target):
    """An index of a version whose int8 and binary codes were in no lists keeps these, and what was chosen for it."""
    monkeypatch.setattr("modeling_cots.search.faiss_vectors.FEW_ROWS", 10)  # so that few vectors reach the codes
    vectors, folder = make_vectors(700), tmp_path / "index"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FaissVectors, "_build", build_without_lists)
        store = FaissStore.create(folder, INFO, index_type)
        fill(store, make_rows(vectors[:600]))
        chosen = None if target is None else store.tune(target).effort

    def recall() -> float:
        answers = FaissStore(folder).search(vectors[:50], 10, [])
        exact = np.argsort(-(vectors[:50] @ vectors.T), axis=1)[:, :10]
        found = [{int(name.removeprefix("pic")) for name in names(hits)} for hits in answers]
        return float(np.mean([len(a & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))

    store = FaissStore(folder)
    fill(store, make_rows(vectors[600:], first=600))
    held = store._newest().vectors()
    assert held.num_lists == 0 and held.effort == chosen and recall() > (0.99 if target is None else 0.8)
    assert len(list(folder.glob("thresholds-*"))) == (index_type == "binary")
    store.rebuild(index_type)
    assert store._newest().vectors().num_lists > 1 and not list(folder.glob("thresholds-*")) and recall() > 0.95


class Stopped(BaseException):
    """What Ctrl-C raises, or the end of a process."""


def add_and_stop(store, rows) -> None:
    """Add rows, and be stopped before the end."""
    with pytest.raises(Stopped), store.adding():
        store.add(rows)
        raise Stopped


def test_rows_of_a_killed_run_are_taken_up(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, make_rows(make_vectors(20)))
    add_and_stop(store, make_rows(make_vectors(9, seed=1), first=20))
    reader = FaissStore(tmp_path / "index")
    assert len(reader) == len(store) == 20  # a reader sees what was finished
    with FaissStore(tmp_path / "index").adding():
        assert len(reader) == 29
    assert names(reader.search(make_vectors(9, seed=1)[4:5], 1, [])[0]) == ["pic24"]
    for write in (lambda store: store.delete(row_ids_of(["pic0"])), lambda store: store.rebuild("hnsw")):
        first = 29 + 2 * (len(reader) == 28 + 2)
        add_and_stop(store, make_rows(make_vectors(2, seed=first), first=first))
        write(FaissStore(tmp_path / "index"))
        assert names(store.search(make_vectors(2, seed=first)[:1], 1, [])[0]) == [f"pic{first}"]
    assert len(store) == 32


def test_codes_are_trained_on_a_whole_first_run(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "int8")
    add_and_stop(store, make_rows(make_vectors(120)))
    assert store.search(make_vectors(1), 1, []) == [[]]
    assert store.delete(row_ids_of(["pic7"])) == 1
    # Without codes the rows are compared directly.
    assert names(store.search(make_vectors(120)[8:9], 1, [])[0]) == ["pic8"] and len(store) == 119
    fill(store, make_rows(make_vectors(9, seed=1), first=120))
    assert len(store) == 128 and names(store.search(make_vectors(9, seed=1)[:1], 1, [])[0]) == ["pic120"]


def test_too_few_rows_for_an_index_type_are_kept(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "int8")
    with pytest.raises(ValueError, match="use 'exact'"):
        fill(store, make_rows(make_vectors(20)))
    with pytest.raises(ValueError, match="use 'exact'"):
        store.rebuild("binary")
    store.rebuild("exact")
    assert len(store) == 20 and names(store.search(make_vectors(20)[:1], 1, [])[0]) == ["pic0"]


def test_one_writer_at_a_time(tmp_path):
    store, other = FaissStore.create(tmp_path / "index", INFO, "exact"), FaissStore(tmp_path / "index")
    fill(store, make_rows(make_vectors(5)))
    with store.adding():
        for write in (lambda: other.delete(np.array([1])), lambda: other.rebuild("exact"), other.adding().__enter__):
            with pytest.raises(ValueError, match="Another process is writing"):
                write()
    assert other.delete(row_ids_of(["pic1"])) == 1


@pytest.mark.parametrize("fault", [Stopped, ValueError, OSError])
@pytest.mark.parametrize("place", ["write_part", "write_deleted", "describe_for_datasets", "FaissVectors.save"])
def test_whoever_is_stopped_lets_others_write(tmp_path, monkeypatch, fault, place):
    store, other = FaissStore.create(tmp_path / "index", INFO, "exact"), FaissStore(tmp_path / "index")
    fill(store, make_rows(make_vectors(5)))
    monkeypatch.setattr(f"modeling_cots.search.faiss_store.{place}", Mock(side_effect=fault("the disk is full")))
    writes = [
        (lambda: fill(store, make_rows(make_vectors(2, seed=1), first=5)), place != "write_deleted"),
        (lambda: store.delete(row_ids_of(["pic4"])), place in ("write_deleted", "describe_for_datasets")),
        (lambda: store.rebuild("hnsw"), place != "write_deleted"),
    ]
    for write in [write for write, comes_there in writes if comes_there]:
        with pytest.raises(Stopped if fault is Stopped else ValueError, match="the disk is full"):
            write()
        assert other.delete(row_ids_of(["nothing"])) == 0
    store.close()
    monkeypatch.undo()
    assert other.info["engine"] == "exact" and names(other.search(make_vectors(5)[:1], 9, [])[0])[0] == "pic0"
    other.rebuild("exact")
    assert len(store) == 5 + 2 * (place in ("FaissVectors.save",))


def test_late_parts_of_a_killed_run_are_refused(tmp_path):
    """A process of a killed run that is still alive, when another run has begun."""
    main, late = FaissStore.create(tmp_path / "index", INFO, "exact"), FaissStore(tmp_path / "index")
    with pytest.raises(Stopped), main.adding():
        late.refresh()
        late.add(make_rows(make_vectors(3)))
        raise Stopped
    with FaissStore(tmp_path / "index").adding():
        with pytest.raises(ValueError, match="has written .* since .* repeat the command"):
            late.add(make_rows(make_vectors(3, seed=1), first=3))
        # It may have passed the check just before.
        write_part(tmp_path / "index", [make_rows(make_vectors(3))], DIM, late._session)
    assert len(late) == 3


def test_types_that_two_processes_wrote_at_once_are_refused(tmp_path):
    main, second = FaissStore.create(tmp_path / "index", INFO, "exact"), FaissStore(tmp_path / "index")
    with pytest.raises(ValueError, match="'year' holds numbers in this index and texts"), main.adding():
        second.refresh()
        main.add(make_rows(make_vectors(3), year=[1, 2, 3]))
        second.add(make_rows(make_vectors(3, seed=1), first=3, year=["a", "b", "c"]))
        with pytest.raises(ValueError, match="'year' holds numbers"):
            main.add(make_rows(make_vectors(3, seed=1), first=3, year=["a", "b", "c"]))
    with main.adding():
        pass
    assert len(second) == 3 and names(second.search(make_vectors(3)[:1], 1, [])[0]) == ["pic0"]


def test_threads_share_a_store_that_is_written_to(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    vectors = make_vectors(60)
    fill(store, make_rows(vectors[:30], year=[0] * 30))
    where = as_conditions("year == 0")

    def look(number: int) -> list[str]:
        return names(store.search(vectors[number : number + 1], 1, where)[0])

    with ThreadPoolExecutor(8) as pool:
        found = [(number % 30, pool.submit(look, number % 30)) for number in range(300)]
        held = store._newest(with_vectors=True)
        for number in range(30, 40):
            fill(store, make_rows(vectors[number : number + 1], first=number, year=[1]))
        store.rebuild("hnsw")
        assert len(held.vectors()) == len(held.rows) == 30  # a thread may still search it
        assert all(call.result() == [f"pic{number}"] for number, call in found)


def mapped(folder) -> int:
    """How many files of a folder this process has mapped into memory."""
    return sum(f" {folder}/" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("modeling_cots.search.rows.PARTS_TO_MERGE", 4)
    monkeypatch.setattr("modeling_cots.search.rows.ROWS_PER_PART", 40)
    monkeypatch.setattr("modeling_cots.search.rows.ROWS_PER_BATCH", 5)


def test_the_parts_of_a_long_run_are_merged_while_it_writes(tmp_path, small_parts):
    folder = tmp_path / "index"
    store, vectors = FaissStore.create(folder, INFO, "exact"), make_vectors(300)
    with store.adding({"test": {"images": 300, "before": 0, "entries": 0}}):  # by which others see it at once
        reader = FaissStore(folder)
        for first in range(0, 300, 3):
            year = [first] * 3 if first % 2 else [None] * 3
            store.add(make_rows(vectors[first : first + 3], first=first, year=year))
            assert len(list(folder.glob("data-*.arrow"))) <= 4 + 300 // 20
            if first % 60 == 57:
                assert len(reader) == first + 3
                assert names(reader.search(vectors[first : first + 1], 1, [])[0]) == [f"pic{first}"]
    num_before, opened = mapped(folder), FaissStore(folder)
    found = [names(row)[0] for row in opened.search(vectors, 1, [])]
    assert found == [f"pic{number}" for number in range(300)] and mapped(folder) - num_before <= 4 + 300 // 20
    assert len(opened.find(as_conditions("year == 33"))) == 3 and opened.count(as_conditions("year >= 0")) == 150
    rows = datasets.load_from_disk(str(folder))
    assert rows["name"][:] == [f"pic{number}" for number in range(300)]


def test_many_small_additions_are_merged(tmp_path, small_parts):
    folder = tmp_path / "index"
    store, vectors = FaissStore.create(folder, INFO, "hnsw"), make_vectors(90)
    for number in range(90):
        fill(store, make_rows(vectors[number : number + 1], first=number, year=[number]))
        if number in (30, 60):
            store.delete(row_ids_of([f"pic{number - 1}", "pic2"]))
    assert len(store._newest().rows.parts) <= 4 + 90 // 20 and len(store) == 87
    assert sum(path.suffix == ".arrow" for path in folder.iterdir()) == len(store._newest().rows.parts)
    for handle in (store, FaissStore(folder)):
        found = [names(row)[0] for row in handle.search(vectors, 1, [])]
        gone = {2, 29, 59}
        assert [number for number in range(90) if found[number] != f"pic{number}"] == sorted(gone)
        assert handle.was_deleted(row_ids_of(["pic2", "pic29", "pic3"])).tolist() == [True, True, False]
    store.rebuild("exact")
    assert [names(row)[0] for row in store.search(vectors[3:9], 1, [])] == [f"pic{number}" for number in range(3, 9)]


def test_what_a_killed_run_had_merged_is_taken_up_once(tmp_path, small_parts, monkeypatch):
    store, vectors = FaissStore.create(tmp_path / "index", INFO, "exact"), make_vectors(12)
    monkeypatch.setattr("modeling_cots.search.faiss_store.remove_part", lambda *_: None)  # killed before it
    with pytest.raises(Stopped), store.adding():
        for first in range(0, 12, 3):
            store.add(make_rows(vectors[first : first + 3], first=first))
        raise Stopped
    assert len(FaissStore(tmp_path / "index")) == 0
    with store.adding():
        pass
    assert len(store) == 12 and names(store.search(vectors[4:5], 2, [])[0])[0] == "pic4"
    assert len(set(store._newest().rows.row_ids.tolist())) == 12


def test_a_damaged_batch_of_a_merged_part_is_noticed_and_others_are_read(tmp_path, small_parts):
    store, vectors = FaissStore.create(tmp_path / "index", INFO, "int8"), make_vectors(240)
    with store.adding():
        for first in range(0, 240, 3):
            store.add(make_rows(vectors[first : first + 3], first=first))
    (path, *_) = sorted((tmp_path / "index").glob("data-*.arrow"))
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    opened = FaissStore(tmp_path / "index")
    assert [row["name"] for row in opened._newest().rows.take(np.array([0, 1]))] == ["pic0", "pic1"]
    with pytest.raises(ValueError, match=f"{path.name}.*is damaged"):
        opened._newest().rows.take(np.arange(240))


def act(folder: str, action: str) -> None:
    if action == "create":
        FaissStore.create(folder, INFO, "exact")
    elif action == "add":
        store = FaissStore(folder)
        with store.adding():  # as `SearchIndex` does: what a killed run has added is not added again
            rows = make_rows(VECTORS, year=[3] * 25)
            store.add(rows.filter(pa.array(~store.has(row_ids_of(rows["name"].to_pylist())))))
    elif action == "merge":
        search_rows.PARTS_TO_MERGE = 3
        store = FaissStore(folder)
        with store.adding():
            for first in range(20, 25):
                row = make_rows(VECTORS[first : first + 1], first=first, year=[3])
                if not store.has(row_ids_of([f"pic{first}"]))[0]:
                    store.add(row)
    elif action == "delete":
        FaissStore(folder).delete(row_ids_of(["pic3"]))
    else:
        FaissStore(folder).rebuild(action)


def act_and_be_killed(folder: str, action: str, moment: int) -> None:
    """In a process: kill itself when it opens, renames, makes or removes a file of the index for the n-th time."""
    moments = itertools.count()

    def hook(event: str, args: tuple) -> None:
        is_moment = event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(folder)
        if is_moment and next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    act(folder, action)


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["create", "add", "merge", "delete", "hnsw"])
def test_after_a_kill_the_next_command_works(tmp_path, action, step):
    (tmp_path / "whole").mkdir()
    if action != "create":
        store = FaissStore.create(tmp_path / "whole", INFO, "exact")
        fill(store, make_rows(VECTORS[:20], year=[3] * 20))
        store.delete(row_ids_of(["pic1", "pic2"]))
    for moment in itertools.count(start=2, step=step):
        folder = str(tmp_path / str(moment))
        shutil.copytree(tmp_path / "whole", folder)
        try:
            server_with_package().start(act_and_be_killed, folder, action, moment).result()
            break  # it has no such moment
        except ClientError as error:
            assert "died" in str(error)
        if action == "create" and not store_exists(folder):
            act(folder, "create")
        check_after_kill(folder, action)
    assert moment > (3 if action == "create" else 20)


def check_after_kill(folder: str, action: str) -> None:
    store = FaissStore(folder)
    if action != "create":
        # The two deleted ones come back with the others that are added.
        assert len(store) in {"add": (18, 25), "merge": range(18, 24), "delete": (18, 17)}.get(action, (18,))
        assert names(store.search(VECTORS[7:8], 1, as_conditions("year == 3"))[0]) == ["pic7"]
        act(folder, action)
    store.rebuild("exact")
    act(folder, "add")
    for number in range(25):
        assert names(FaissStore(folder).search(VECTORS[number : number + 1], 30, [])[0])[0] == f"pic{number}"
    assert len(store) == 25
    listed = {*store._newest().manifest.files, "index.json", "state.json", "dataset_info.json", "writer.lock"}
    assert {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()} == listed


def test_rebuilding_frees_what_was_deleted(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, make_rows(make_vectors(20), year=list(range(20))))
    store.delete(row_ids_of([f"pic{number}" for number in range(7)]))
    store.rebuild("hnsw")
    opened = datasets.load_from_disk(str(tmp_path / "index"))
    assert opened["name"][:] == [f"pic{number}" for number in range(7, 20)]
    found = store.search(make_vectors(1), 20, [])[0]
    assert sorted((hit["year"], hit["name"]) for hit in found) == [(year, f"pic{year}") for year in range(7, 20)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert len(list((tmp_path / "index").rglob("*.arrow"))) == 1
    assert not list((tmp_path / "index").glob("deleted-*"))


def test_foreign_files_stay(tmp_path):
    store = FaissStore.create(tmp_path / "index", INFO, "exact")
    fill(store, make_rows(make_vectors(5)))
    foreign = ["data-00000-of-00001.arrow", "notes.partial", "deleted-.parquet", "metadata/data-train.parquet"]
    for name in foreign:
        (tmp_path / "index" / name).write_text("foreign")
    store.rebuild("hnsw")
    assert all((tmp_path / "index" / name).read_text() == "foreign" for name in foreign)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / foreign[0]).write_text("foreign")
    with pytest.raises(ValueError, match="not an empty folder: name a new folder"):
        FaissStore.create(tmp_path / "dataset", INFO, "exact")


def test_nothing_is_pickled(tmp_path):
    fill(FaissStore.create(tmp_path / "index", INFO, "exact"), make_rows(make_vectors(5), year=[1] * 5))
    suffixes = {path.suffix for path in (tmp_path / "index").rglob("*") if path.is_file()}
    assert suffixes <= {".arrow", ".json", ".parquet", ".faiss", ".lock"}


def test_does_not_write_into_another_folder(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="name a new folder"):
        FaissStore.create(tmp_path, INFO, "exact")


@pytest.mark.parametrize(("index_type", "more"), [("int8", set()), ("binary", {"thresholds"})])
def test_bytes_are_on_the_disk_before_a_file_has_its_name(tmp_path, monkeypatch, index_type, more):
    """Every file that the package writes is flushed when whole, and renamed after that."""
    monkeypatch.setattr(FaissVectors, "_build", build_without_lists)  # thresholds belong to binary codes of before
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
    assert store.delete(row_ids_of(["pic0", "pic1", "pic2"])) == 3
    written = {str(path.relative_to(tmp_path / "index")) for path in (tmp_path / "index").rglob("*") if path.is_file()}
    assert renamed >= written - {"writer.lock"}  # the lock has no content
    kinds = {"index.json", "state.json", "dataset_info.json", "data", "metadata/data", "vectors", *more}
    assert {name.partition("-")[0] for name in renamed} == kinds | {"deleted", "removed"}
