"""The rows of a local search index: an append-only `datasets` folder with one row for each entry.

`datasets.load_from_disk(folder)` opens it. A part (data-*.arrow) appears when its finished file is renamed, so that a
killed run leaves no half-written part, and several processes can write at once. The next writer lists new parts in
state.json. Metadata is in metadata/*.parquet, because its columns may differ between sources. Deleting writes
positions to deleted.parquet; rebuilding the index frees the bytes. The index of the vectors is in faiss_vectors.py.
"""

import hashlib
import json
import os
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.atomic_write import PARTIAL_SUFFIX, atomic_write

# Every entry has these columns; any other column of a table is metadata.
FIXED_COLUMNS = ("row_id", "name", "source", "captions", "thumbnail", "embedding")
STATE, DELETED, METADATA = "state.json", "deleted.parquet", "metadata"
# Names that a column of metadata cannot have: "" stands for no metadata here, the others are those of Milvus.
RESERVED_COLUMNS = (*FIXED_COLUMNS, "", "$meta", "_seq", "_partition")


def fixed_features(dim: int) -> datasets.Features:
    """The columns of every entry: id, name, source, captions, a small JPEG and the embedding."""
    return datasets.Features(
        {
            "row_id": datasets.Value("int64"),
            "name": datasets.Value("string"),
            "source": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "thumbnail": datasets.Image(decode=False),
            "embedding": datasets.List(datasets.Value("float32"), length=dim),
        }
    )


def as_hit(row: dict, score: float) -> dict:
    """An entry that was found, with its cosine as `score`; the data's own column of that name is then `score_`."""
    if "score" in row:
        row = {**row, free_name("score", row): row["score"]}
    return {**row, "score": score}


def join_tables(tables: list[pa.Table]) -> pa.Table:
    """One table of all rows and columns; a column of integers in one and of floats in another table becomes floats."""
    floats = {field.name for table in tables for field in table.schema if pa.types.is_floating(field.type)}
    rounded = []
    for table in tables:
        for place, field in enumerate(table.schema):
            # Arrow itself refuses integers that a float has to round.
            if field.name in floats and pa.types.is_integer(field.type):
                table = table.set_column(place, field.name, table[field.name].cast(pa.float64(), safe=False))
        rounded.append(table)
    return pa.concat_tables(rounded, promote_options="permissive")


def free_name(name: str, taken: Container[str]) -> str:
    """The name with as many underscores at its end as make it free."""
    while name in taken:
        name += "_"
    return name


class RowFolder:
    """
    The rows of an index of embeddings of `dim` numbers.

    Args:
        folder: A folder that `create` made.
        dim: The numbers of an embedding.
    """

    def __init__(self, folder: str | os.PathLike, dim: int):
        self.folder, self.dim = Path(folder), dim
        self.reload()

    @classmethod
    def create(cls, folder: str | os.PathLike, dim: int) -> "RowFolder":
        """Make a folder without rows; `datasets` itself writes the files that describe it."""
        empty = pa.Table.from_pylist([], schema=fixed_features(dim).arrow_schema)
        with _quiet():
            datasets.Dataset(empty).save_to_disk(folder)
        (Path(folder) / METADATA).mkdir()
        # `datasets` cannot open a folder without a part.
        first = "data-00000.arrow"
        _write_arrow(Path(folder) / first, empty)
        state = json.loads((Path(folder) / STATE).read_text(encoding="utf-8"))
        with atomic_write(Path(folder) / STATE) as partial:
            partial.write_text(json.dumps({**state, "_data_files": [{"filename": first}]}), encoding="utf-8")
        return cls(folder, dim)

    def __len__(self) -> int:
        return len(self.row_ids)

    def append(self, rows: pa.Table) -> None:
        """Write one part, which `adopt` adds to the index. Several processes may write at the same time."""
        features = fixed_features(self.dim)
        schema = features.arrow_schema
        part = f"data-{time.time_ns():020d}-{os.getpid():07d}"
        extra = rows.drop_columns(list(FIXED_COLUMNS))
        if extra.num_columns:
            with atomic_write(self.folder / METADATA / f"{part}.parquet") as partial:
                pq.write_table(extra, partial)
        fixed = pa.table([rows[name].cast(schema.field(name).type) for name in FIXED_COLUMNS], schema=schema)
        _write_arrow(self.folder / f"{part}.arrow", fixed)

    def adopt(self) -> int:
        """Add parts that are not listed yet to state.json, as the only writer; returns their number."""
        state = self._state()
        listed = [entry["filename"] for entry in state["_data_files"]]
        new = sorted(path.name for path in self.folder.glob("data-*.arrow") if path.name not in set(listed))
        if new:
            files = [*listed, *new]
            state["_data_files"] = [{"filename": name} for name in files]
            state["_fingerprint"] = hashlib.blake2b("/".join(files).encode(), digest_size=8).hexdigest()
            with atomic_write(self.folder / STATE) as partial:
                partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
        self.reload()
        return len(new)

    def remove_leftovers(self) -> None:
        """Remove the half-written files of a killed writer, as the only writer."""
        for path in (*self.folder.glob(f"*{PARTIAL_SUFFIX}"), *self.folder.glob(f"{METADATA}/*{PARTIAL_SUFFIX}")):
            path.unlink()

    def reload(self) -> None:
        """Open the listed parts: rows are memory-mapped, ids and metadata are read into memory."""
        self.rows = datasets.load_from_disk(str(self.folder)).with_format("arrow")
        self.row_ids = self.rows.data.column("row_id").to_numpy() if len(self.rows) else np.zeros(0, np.int64)
        self.metadata = self._load_metadata()
        self.is_alive = np.ones(len(self), dtype=bool)
        if (self.folder / DELETED).exists():
            self.is_alive[pq.read_table(self.folder / DELETED)["position"].to_numpy()] = False

    def positions_of(self, row_ids: np.ndarray) -> np.ndarray:
        """The positions of the rows with these ids, without deleted ones."""
        return np.flatnonzero(np.isin(self.row_ids, row_ids) & self.is_alive)

    def embeddings(self, positions: np.ndarray | slice) -> np.ndarray:
        """(n, dim) float32, copied from the mapped file."""
        rows = self.rows.data.column("embedding")
        if isinstance(positions, slice):
            start, stop, _ = positions.indices(len(self))
            values = rows.slice(start, stop - start).combine_chunks()
        else:
            values = rows.take(pa.array(positions)).combine_chunks()
        return values.flatten().to_numpy().reshape(-1, self.dim)

    def take(self, positions: np.ndarray, columns: list[str] | None = None) -> list[dict]:
        """Rows as dictionaries, metadata included."""
        columns = [name for name in FIXED_COLUMNS if name != "embedding"] if columns is None else columns
        # Row by row, because `Table.take` would copy and join the chunks of all columns.
        rows = [self.rows.data.table.select(columns).slice(int(position), 1).to_pylist()[0] for position in positions]
        extra = self.metadata.take(pa.array(positions)).to_pylist() if self.metadata.num_columns else [{}] * len(rows)
        return [{**row, **more} for row, more in zip(rows, extra, strict=True)]

    def filterable(self) -> pa.Table:
        """Name, source and metadata of all rows."""
        columns = {name: self.rows.data.column(name) for name in ("name", "source")}
        return pa.table({**columns, **{name: self.metadata[name] for name in self.metadata.column_names}})

    def delete(self, positions: np.ndarray) -> None:
        """Mark rows as deleted, here and in deleted.parquet."""
        self.is_alive[positions] = False
        with atomic_write(self.folder / DELETED) as partial:
            pq.write_table(pa.table({"position": np.flatnonzero(~self.is_alive)}), partial)

    def living_tables(self, rows_per_table: int = 4096) -> Iterator[pa.Table]:
        """All rows that are not deleted, as tables with their metadata, to write them again."""
        table = self.rows.data.table
        for name in self.metadata.column_names:
            table = table.append_column(name, self.metadata[name])
        for start in range(0, len(self), rows_per_table):
            alive = self.is_alive[start : start + rows_per_table]
            if alive.any():
                yield table.slice(start, rows_per_table).filter(pa.array(alive))

    def check_metadata(self, schema: pa.Schema) -> None:
        """Raise `ValueError` if a column of metadata in `schema` has another type than the same column here."""
        for field in schema:
            if field.name in FIXED_COLUMNS or field.name not in self.metadata.column_names:
                continue
            present = self.metadata.schema.field(field.name)
            try:
                pa.unify_schemas([pa.schema([present]), pa.schema([field])], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
                raise ValueError(
                    f"The metadata {field.name!r} holds {present.type} in this index and {field.type} in the new "
                    f"entries: rename one of them, or keep an index for each."
                ) from error

    def _state(self) -> dict:
        return json.loads((self.folder / STATE).read_text(encoding="utf-8"))

    def _load_metadata(self) -> pa.Table:
        tables = []
        for entry in self._state()["_data_files"]:
            path = self.folder / METADATA / Path(entry["filename"]).with_suffix(".parquet").name
            if path.exists():
                tables.append(pq.read_table(path))
            else:  # the empty first part, and sources without metadata: only the number of rows matters
                with pa.memory_map(str(self.folder / entry["filename"])) as source:
                    num_rows = sum(batch.num_rows for batch in pa.ipc.open_stream(source))
                tables.append(pa.table({"": pa.nulls(num_rows)}))
        joined = join_tables(tables)
        return joined.drop_columns([""]) if "" in joined.column_names else joined


def _write_arrow(path: Path, table: pa.Table) -> None:
    with atomic_write(path) as partial:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar of `datasets`, which would announce a file of no rows."""
    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()
