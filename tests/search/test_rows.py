"""The rows of a local index: parts, deleted rows, and half-written files in a folder of `datasets`."""

from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
from search_stores import DIM, make_rows, make_vectors

from modeling_cots.search.manifest import Manifest
from modeling_cots.search.rows import (
    Rows,
    describe_for_datasets,
    unify_metadata,
    unlisted_parts,
    write_deleted,
    write_part,
)

EMPTY = Manifest(generation=7, info={"dim": DIM})


def written(folder, *tables: pa.Table, manifest: Manifest = EMPTY) -> Manifest:
    """The manifest with these tables as parts."""
    return manifest.with_parts([write_part(folder, [table], DIM, manifest.generation) for table in tables])


@pytest.fixture
def manifest(tmp_path):
    return written(tmp_path, make_rows(make_vectors(5), year=[1, 2, 3, 4, 5]), make_rows(make_vectors(3, 1), first=5))


def test_embeddings_of_any_rows_in_any_order(tmp_path, monkeypatch):
    """Rows are taken from the files at once, in parts of several batches, with captions of any length between them."""
    monkeypatch.setattr("modeling_cots.search.rows.ROWS_PER_BATCH", 7)
    vectors, tables = make_vectors(60), []
    for start, stop in ((0, 1), (1, 24), (24, 60)):
        table = make_rows(vectors[start:stop], first=start)
        captions = pa.array([["a" * number] for number in range(start, stop)], table["captions"].type)
        tables.append(table.set_column(table.column_names.index("captions"), "captions", captions))
    rows = Rows(tmp_path, written(tmp_path, *tables))
    assert [len(part.batches) for part in rows.parts.values()] == [1, 4, 6]
    positions = np.random.default_rng(0).integers(0, 60, 200)  # some more than once
    np.testing.assert_array_equal(rows.embeddings(positions), vectors[positions])
    np.testing.assert_array_equal(rows.embeddings(slice(5, 40)), vectors[5:40])
    assert rows.embeddings(np.zeros(0, np.int64)).shape == (0, DIM)


def test_datasets_opens_the_parts(manifest, tmp_path):
    rows = Rows(tmp_path, manifest)
    describe_for_datasets(tmp_path, manifest)
    opened = datasets.load_from_disk(str(tmp_path))
    assert opened["name"][:] == [f"pic{number}" for number in range(8)]
    np.testing.assert_array_equal(np.array(opened["embedding"][:5], np.float32), make_vectors(5))
    np.testing.assert_array_equal(rows.embeddings(slice(0, 5)), make_vectors(5))
    np.testing.assert_array_equal(rows.embeddings(np.array([6, 0])), np.array(opened[[6, 0]]["embedding"], "f4"))


def test_metadata_of_different_sources_is_joined(manifest, tmp_path):
    more = make_rows(make_vectors(1), first=8, year=[2.5], place=["Oslo"])
    rows = Rows(tmp_path, written(tmp_path, more, manifest=manifest))
    assert rows.filterable.select(["year", "place"]).to_pydict() == {
        "year": [1, 2, 3, 4, 5, None, None, None, 2.5],
        "place": [None] * 8 + ["Oslo"],
    }
    assert [row["place"] for row in rows.take(np.array([8, 6]))] == ["Oslo", None]
    present = rows.filterable.schema
    assert unify_metadata(present, pa.schema([("year", pa.int64()), ("new", pa.bool_())])).field("new")
    with pytest.raises(ValueError, match="'year' holds numbers in this index and texts"):
        unify_metadata(present, pa.schema([("year", pa.string())]))


def test_whole_parts_of_the_same_generation_are_taken_up(manifest, tmp_path):
    parts = unlisted_parts(tmp_path, EMPTY)
    assert EMPTY.with_parts(parts) == manifest
    assert unlisted_parts(tmp_path, manifest) == [] == unlisted_parts(tmp_path, replace(EMPTY, generation=8))


@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
@pytest.mark.parametrize("file", [0, 1])
def test_damaged_parts_are_not_taken_up(manifest, tmp_path, damage, file):
    path = tmp_path / sorted(name for name in manifest.files if name.endswith((".arrow", ".parquet")[file]))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "changed" else content[: len(content) // 2])
    assert [part.num_rows for part in unlisted_parts(tmp_path, EMPTY)] == [3]


def test_deleted_rows_are_left_out(manifest, tmp_path):
    files = {"deleted-1.parquet": write_deleted(tmp_path, "deleted-1.parquet", np.array([1, 6]))}
    rows = Rows(tmp_path, manifest.with_files(files, deleted="deleted-1.parquet"))
    assert rows.is_alive.tolist() == [True, False, True, True, True, True, False, True]
    assert rows.positions_of(rows.row_ids).tolist() == [0, 2, 3, 4, 5, 7]
    kept = pa.concat_tables([table for part in rows.living_tables() for table in part], promote_options="default")
    assert kept["name"].to_pylist() == ["pic0", "pic2", "pic3", "pic4", "pic5", "pic7"]
    assert kept["year"].to_pylist() == [1, 3, 4, 5, None, None]


def test_no_rows(tmp_path):
    rows = Rows(tmp_path, EMPTY)
    assert len(rows) == 0 and list(rows.living_tables()) == [] and rows.take(np.zeros(0, int)) == []
    assert rows.embeddings(slice(0, 0)).shape == (0, DIM) and rows.filterable.column_names == ["name", "source"]
