"""The rows of a local index: appending, deleting, and half-written files in a folder of `datasets`."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from search_stores import DIM, make_rows, make_vectors

from modeling_cots.search.rows import RowFolder


@pytest.fixture
def folder(tmp_path):
    rows = RowFolder.create(tmp_path / "rows", DIM)
    rows.append(make_rows(make_vectors(5), year=[1, 2, 3, 4, 5]))
    rows.append(make_rows(make_vectors(3, seed=1), first=5))
    assert len(rows) == 0 and rows.adopt() == 2
    return rows


def test_datasets_opens_it(folder):
    opened = datasets.load_from_disk(str(folder.folder))
    assert opened["name"][:] == [f"pic{number}" for number in range(8)]
    np.testing.assert_array_equal(np.array(opened["embedding"][:5], np.float32), make_vectors(5))
    np.testing.assert_array_equal(folder.embeddings(slice(0, 5)), make_vectors(5))
    np.testing.assert_array_equal(folder.embeddings(np.array([6, 0])), np.array(opened[[6, 0]]["embedding"], "f4"))


def test_metadata_of_different_sources_is_joined(folder):
    folder.append(make_rows(make_vectors(1), first=8, year=[2.5], place=["Oslo"]))
    folder.adopt()
    assert folder.metadata.to_pydict() == {
        "year": [1, 2, 3, 4, 5, None, None, None, 2.5],
        "place": [None] * 8 + ["Oslo"],
    }
    assert folder.take(np.array([8, 6]))[0]["place"] == "Oslo"
    folder.check_metadata(pa.schema([("year", pa.int64())]))
    with pytest.raises(ValueError, match="'year' holds double in this index and string"):
        folder.check_metadata(pa.schema([("year", pa.string())]))


def test_half_written_files_are_no_parts(folder):
    for name in ("data-9-1.arrow.partial", "data-9-2.partial", "metadata/data-9-1.parquet.partial"):
        (folder.folder / name).write_bytes(b"half")
    assert folder.adopt() == 0 and len(folder) == 8
    folder.remove_leftovers()
    assert not list(folder.folder.rglob("*.partial"))


def test_deleted_rows_stay_deleted(folder):
    folder.delete(np.array([1, 6]))
    again = RowFolder(folder.folder, DIM)
    assert again.is_alive.tolist() == [True, False, True, True, True, True, False, True]
    assert again.positions_of(again.row_ids).tolist() == [0, 2, 3, 4, 5, 7]
    kept = pa.concat_tables(again.living_tables(rows_per_table=3))
    assert kept["name"].to_pylist() == ["pic0", "pic2", "pic3", "pic4", "pic5", "pic7"]
    assert kept["year"].to_pylist() == [1, 3, 4, 5, None, None]
