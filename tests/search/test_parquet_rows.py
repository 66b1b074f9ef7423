"""`cots-search load`: files of embeddings go into indexes of every kind, and those of another model into none."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from search_stores import DIM, INFO, make_rows, make_vectors

from modeling_cots.search.cli import main
from modeling_cots.search.conditions import as_conditions
from modeling_cots.search.index import FORMAT
from modeling_cots.search.parquet_rows import INFO_KEY, load_files, open_files
from modeling_cots.search.rows import FIXED_COLUMNS
from modeling_cots.search.stores import open_store

pytest.importorskip("faiss")

MODEL = {**INFO, "format": FORMAT, "model_commit": None}
PER_FILE = 110  # int8 needs a hundred to train its codes
NUM_ROWS = 3 * PER_FILE
SERVER = ["server"] if os.environ.get("COTS_TEST_MILVUS") else []  # of Milvus; test_milvus_server.py starts one


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three files of 110 entries each in the folder `out`: years are integers in the first and floats in the last."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    rows = make_rows(make_vectors(NUM_ROWS))
    for part, years in enumerate(([2000] * PER_FILE, [None] * PER_FILE, [2001.5] * PER_FILE)):
        table = rows.slice(PER_FILE * part, PER_FILE).append_column("year", pa.array(years))
        write(tmp_path / "out" / f"{part}.parquet", table, MODEL)
    return tmp_path / "out"


def write(path, table: pa.Table, info: dict) -> None:
    pq.write_table(table.replace_schema_metadata({INFO_KEY: json.dumps(info)}), path)


@pytest.mark.parametrize(
    ("kind", "engine"),
    [("faiss", "exact"), ("faiss", "hnsw"), ("faiss", "int8")]
    + [(kind, engine) for kind in ("milvus", "postgres", *SERVER) for engine in ("exact", "hnsw")],
)
def test_files_become_an_index_of_any_kind(files, new_place, kind, engine, capsys):
    index = new_place(kind)
    main(["load", index, "out/0.parquet", "--engine", engine])
    assert f"Added 110 images; {index} has 110." in capsys.readouterr().out
    main(["load", index, "out"])
    said = capsys.readouterr().out
    assert f"Added 220 images; {index} has 330." in said
    store = open_store(index)
    try:
        assert store.info == {**MODEL, "engine": engine}
        vectors = make_vectors(NUM_ROWS)
        hits = store.search(vectors[::PER_FILE], 1, [])
        assert [hit[0]["name"] for hit in hits] == ["pic0", "pic110", "pic220"]
        assert hits[0][0]["score"] == pytest.approx(1, abs=1e-2)
        assert hits[2][0]["year"] == 2001.5 and hits[0][0]["captions"] == ["caption of pic0", "b"]
        assert hits[1][0]["thumbnail"]["bytes"] == b"jpeg" and "year" not in {k for k, v in hits[1][0].items() if v}
        assert len(store.find(as_conditions("year > 2000"))) == PER_FILE
        assert store.unfinished == {}
    finally:
        store.close()


@pytest.mark.parametrize("kind", ["faiss", "milvus", "postgres", *SERVER])
def test_what_is_there_or_was_deleted_is_not_taken_again(files, new_place, kind, capsys):
    index = new_place(kind)
    main(["load", index, *map(str, sorted(files.iterdir()))])
    main(["delete", index, "pic3"])
    capsys.readouterr()
    main(["load", index, "out"])
    said = capsys.readouterr()
    assert f"Added 0 images; {index} has 329." in said.out
    assert "329 of 330 images are in the index already" in said.out + said.err
    assert "1 of 330 images were deleted from it and stay so" in said.out + said.err
    main(["load", index, "out", "--restore"])
    assert f"Added 1 images; {index} has 330." in capsys.readouterr().out


def test_only_a_milvus_server_has_a_bulk_import(files):
    with pytest.raises(ValueError, match=r"--bulk_import is of a Milvus server \(http://...\), and 'IDX' is none"):
        main("load IDX out --bulk_import s3://bucket/loads".split())
    assert not os.path.exists("IDX")


@pytest.mark.parametrize("kind", ["milvus", *SERVER])
def test_a_large_load_into_a_server_names_its_bulk_import(files, new_place, kind, monkeypatch, capsys):
    monkeypatch.setattr("modeling_cots.search.cli.WORTH_AN_IMPORT", NUM_ROWS)
    index = new_place(kind)
    main(["load", index, "out/0.parquet"])
    assert "bulk_import" not in capsys.readouterr().out
    main(["load", index, "out"])
    assert ("Images are inserted. A Milvus server" in capsys.readouterr().out) == (kind == "server")


def test_a_name_that_stands_in_two_files_is_one_entry(files, capsys):
    shutil.copy(files / "0.parquet", files / "3.parquet")
    main("load IDX out".split())
    assert "Added 330 images; IDX has 330." in capsys.readouterr().out


def test_ids_are_made_of_the_names(files):
    """Those of a file may be of a version that made them in another way."""
    table = pq.read_table(files / "0.parquet")
    write(files / "0.parquet", table.set_column(0, "row_id", pa.array(["x"] * PER_FILE)), MODEL)
    main("load IDX out/0.parquet".split())
    main("load IDX out/0.parquet".split())
    store = open_store("IDX")
    assert len(store) == PER_FILE and store.names_of(store.find([])) == [f"pic{number}" for number in range(PER_FILE)]


def test_another_model_is_refused_before_anything_is_written(files):
    main("load IDX out/0.parquet".split())
    write(files / "2.parquet", make_rows(make_vectors(5)), {**MODEL, "model": "n", "model_identity": "j"})
    with pytest.raises(ValueError, match=r"'IDX' was made with the model 'm' \(i\), and .*2.parquet' with 'n' \(j\)"):
        main("load IDX out/2.parquet".split())
    with pytest.raises(ValueError, match="0.parquet' and .*2.parquet' were made with two models"):
        main("load IDX out".split())
    assert len(open_store("IDX")) == PER_FILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read: repeat the `cots-search embed`"),
        (lambda path: pq.write_table(pa.table({"a": [1]}), path), "was not written by `cots-search embed`"),
        (lambda path: write(path, make_rows(make_vectors(2)), {**MODEL, "format": 1}), "another version"),
        (lambda path: write(path, make_rows(np.ones((2, 8), np.float32)), MODEL), f"no lists of {DIM} numbers"),
        (lambda path: path.unlink(), "There is no parquet file in out"),
    ],
)
def test_says_what_is_wrong_with_a_file(files, change, message):
    for part in (1, 2):
        (files / f"{part}.parquet").unlink()
    change(files / "0.parquet")
    with pytest.raises(ValueError, match=message):
        main("load IDX out".split())


def test_a_killed_load_goes_on(files, monkeypatch):
    """What was added before the end stays, and the rest is added by the same command."""
    monkeypatch.setattr("modeling_cots.search.parquet_rows.ROWS_AT_ONCE", PER_FILE)
    main("load IDX out/0.parquet".split())
    opened = open_files(["out"])
    store = open_store("IDX")
    added, add = [], store.add

    def failing(rows):
        if added:
            raise KeyboardInterrupt
        added.append(rows)
        add(rows)

    monkeypatch.setattr(store, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        load_files(store, opened, progress=False)
    fresh = open_store("IDX")
    assert len(fresh) == 2 * PER_FILE
    assert load_files(fresh, opened, progress=False) == PER_FILE
    assert sorted(fresh.names_of(fresh.find([]))) == sorted(f"pic{number}" for number in range(NUM_ROWS))


def test_columns_of_two_kinds_are_refused(files):
    table = (
        pq.read_table(files / "1.parquet").drop_columns(["year"]).append_column("year", pa.array(["old"] * PER_FILE))
    )
    write(files / "1.parquet", table, MODEL)
    with pytest.raises(ValueError, match="year"):
        main("load IDX out".split())
    assert {*FIXED_COLUMNS} <= {*table.column_names}
