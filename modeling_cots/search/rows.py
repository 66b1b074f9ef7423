"""The rows of one generation of a local search index, in parts that are never changed.

A part is two files: data-*.arrow holds the entries in batches, memory-mapped; metadata/data-*.parquet holds what
conditions look at (ids, names, sources and metadata) in memory, because the columns of metadata may differ between
sources. The name of a part holds the generation that it was written for and the checksum of the parquet file, which is
written last and holds the checksums of the other: a killed run leaves no half-written part, and several processes can
write parts at once. `datasets.load_from_disk(folder)` opens the parts, too.

Each part costs a memory map, of which a process may have 65,530, and time to open it. So many small parts are merged
into one; rows keep their order, and with it the positions by which vectors and deleted rows are known.
"""

import hashlib
import json
import os
import time
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.atomic_write import PARTIAL_SUFFIX, atomic_write, flush_to_disk
from .conditions import kind_of_type, mixed_kinds
from .manifest import (
    Manifest,
    WrittenPart,
    check_bytes,
    checked_bytes,
    describe_bytes,
    describe_file,
    open_file,
)

# Every entry has these columns; any other column of a table is metadata.
FIXED_COLUMNS = ("row_id", "name", "source", "captions", "thumbnail", "embedding")
CONTENT = "content"  # a digest of an entry's pixels, stored like metadata: an index of before has none
# The last four are names of Milvus, and what it cannot name.
RESERVED_COLUMNS = (*FIXED_COLUMNS, CONTENT, "$meta", "_seq", "_partition", "")
LOOKED_AT = ("row_id", "name", "source")  # these stand in both files of a part
ROW_ID_DTYPE = np.dtype("S32")  # 128 bits in hexadecimal
LOOKED_AT_SCHEMA = pa.schema([("row_id", pa.string()), ("name", pa.string()), ("source", pa.string())])
METADATA = "metadata"
DATASETS_FILES = ("state.json", "dataset_info.json")
ARROW_FILE = b"cots.arrow_file"  # describes the other file of a part, in the parquet file
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's IPC format
ROWS_PER_BATCH = 1_024  # what is checked and read at once
PARTS_TO_MERGE = 64  # so many small parts, one after the other, become one
ROWS_PER_PART = 65_536  # of a merged part, at most; one of half of these is not small


def fixed_features(dim: int):
    """The columns of every entry as `datasets.Features`: id, name, source, captions, a small JPEG, the embedding."""
    import datasets  # takes a second, which a query does not need

    return datasets.Features(
        {
            "row_id": datasets.Value("string"),
            "name": datasets.Value("string"),
            "source": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "thumbnail": datasets.Image(decode=False),
            "embedding": datasets.List(datasets.Value("float32"), length=dim),
        }
    )


def ids_in(column: pa.ChunkedArray) -> np.ndarray:
    """(n,) row ids of a column of them, as `row_ids_of` makes them."""
    chunks = [np.zeros(0, ROW_ID_DTYPE)]
    for chunk in column.chunks:
        fixed = chunk.cast(pa.binary(ROW_ID_DTYPE.itemsize))
        chunks.append(np.frombuffer(fixed.buffers()[1], ROW_ID_DTYPE)[fixed.offset : fixed.offset + len(fixed)])
    return np.concatenate(chunks)


def are_among(row_ids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) boolean: which of these ids are among the others. NumPy's `isin` would sort millions of texts."""
    arrays = [
        pa.Array.from_buffers(
            pa.binary(ROW_ID_DTYPE.itemsize), len(ids), [None, pa.py_buffer(np.ascontiguousarray(ids))]
        )
        for ids in (row_ids, others)
    ]
    return pc.is_in(arrays[0], value_set=arrays[1]).to_numpy(zero_copy_only=False)


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


def files_of(part: str) -> tuple[str, str]:
    """The Arrow file and the parquet file of a part."""
    return f"{part}.arrow", f"{METADATA}/{part}.parquet"


def write_part(
    folder: Path, tables: Iterable[pa.Table], dim: int, generation: int, replaces: Sequence[str] = ()
) -> WrittenPart:
    """
    Write the rows of all tables as one part for a generation. Several processes may do so at the same time.

    Args:
        folder: The index.
        tables: Rows with all fixed columns and any metadata; they are read one after the other.
        dim: How many numbers an embedding has.
        generation: That of the manifest that will list the part.
        replaces: The parts of which these are the rows; from the end of this call on they count as gone.
    """
    began = f"data-{generation:08d}-{time.time_ns():020d}"
    partial = folder / f"{began}.arrow{PARTIAL_SUFFIX}"
    try:
        with open(partial, "wb") as file:
            stored, batches, looked_at = _write_batches(file, tables, dim)
        flush_to_disk(partial)
        described = {"file": stored, "batches": batches, "replaces": list(replaces)}
        columns = pa.BufferOutputStream()
        pq.write_table(looked_at.replace_schema_metadata({ARROW_FILE: json.dumps(described)}), columns)
        size, checksum = describe_bytes(columns.getvalue())
        name = f"{began}-{checksum:08x}"
        arrow_file, parquet_file = files_of(name)
        os.replace(partial, folder / arrow_file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    (folder / METADATA).mkdir(exist_ok=True)
    flush_to_disk(folder)
    with atomic_write(folder / parquet_file) as metadata:
        metadata.write_bytes(columns.getvalue())
    files = {arrow_file: stored, parquet_file: (size, checksum)}
    return WrittenPart(name, len(looked_at), files, looked_at.schema, tuple(replaces))


def _write_batches(file: BinaryIO, tables: Iterable[pa.Table], dim: int) -> tuple[tuple[int, int], list, pa.Table]:
    """Write an Arrow stream; returns its bytes and CRC-32, what `Batch` is given of each batch, and the metadata."""
    schema = fixed_features(dim).arrow_schema
    header = schema.serialize().to_pybytes()
    place, written, whole, batches, looked_at = 0, header, 0, [], [LOOKED_AT_SCHEMA.empty_table()]
    for table in tables:
        for start in range(0, len(table), ROWS_PER_BATCH):
            rows = table.slice(start, ROWS_PER_BATCH)
            fixed = pa.table([rows[name].cast(schema.field(name).type) for name in FIXED_COLUMNS], schema=schema)
            (batch,) = fixed.combine_chunks().to_batches()
            written += batch.serialize().to_pybytes()
            file.write(written)
            batches.append((len(rows), place, len(written), zlib.crc32(written)))
            place, whole, written = place + len(written), zlib.crc32(written, whole), b""
            looked_at.append(rows.drop_columns([name for name in FIXED_COLUMNS if name not in LOOKED_AT]))
    file.write(written + END_OF_STREAM)
    stored = (place + len(written + END_OF_STREAM), zlib.crc32(written + END_OF_STREAM, whole))
    return stored, batches, join_tables(looked_at)


def unlisted_parts(
    folder: Path, manifest: Manifest, known: Mapping[str, WrittenPart] = MappingProxyType({})
) -> list[WrittenPart]:
    """The whole parts that were written for this generation and are not in it, without those that others replace.

    `known` ones are not read again.
    """
    while True:
        try:
            parts = _unlisted_parts(folder, manifest, known)
        except FileNotFoundError:  # a process has merged parts in between
            continue
        replaced = {name for part in parts for name in part.replaces}
        return [part for part in parts if part.name not in replaced]


def _unlisted_parts(folder: Path, manifest: Manifest, known: Mapping[str, WrittenPart]) -> list[WrittenPart]:
    """`unlisted_parts` with the replaced ones. Raises `FileNotFoundError` for a part that went away meanwhile."""
    listed, parts = {name for name, _ in manifest.parts}, []
    for path in unlisted_files(folder, manifest.generation):
        if path.stem in known:
            parts.append(known[path.stem])
            continue
        if path.stem in listed:
            continue
        arrow_file, parquet_file = files_of(path.stem)
        try:
            files = {parquet_file: (path.stat().st_size, int(path.stem.rpartition("-")[2], base=16))}
            looked_at = pq.read_table(pa.BufferReader(checked_bytes(folder, parquet_file, files[parquet_file])))
            described = json.loads(looked_at.schema.metadata[ARROW_FILE])
            files[arrow_file] = tuple(described["file"])
            checked_bytes(folder, arrow_file, files[arrow_file])
        except (OSError, ValueError):
            if not path.exists():
                raise FileNotFoundError(path) from None
            continue  # damaged: its images are embedded again
        replaces = tuple(described["replaces"])
        parts.append(WrittenPart(path.stem, len(looked_at), files, looked_at.schema, replaces))
    return parts


def unlisted_files(folder: Path, generation: int) -> list[Path]:
    """The files of metadata of all parts that were written for a generation, in their order."""
    return sorted(folder.glob(f"{METADATA}/data-{generation:08d}-*.parquet"))


def remove_part(folder: Path, name: str) -> None:
    """Remove the files of a part: first the one by which readers find it."""
    for file in reversed(files_of(name)):
        (folder / file).unlink(missing_ok=True)


def groups_to_merge(parts: Sequence[tuple[str, int]]) -> list[list[str]]:
    """
    The names of the parts of which one is to be made, for each such part; they stand one after the other.

    Args:
        parts: The names of all parts, in order, each with its number of rows.
    """
    groups: list[list[str]] = []
    for is_small, run in groupby(parts, key=lambda part: part[1] < ROWS_PER_PART // 2):
        small = list(run)
        if not is_small or len(small) < PARTS_TO_MERGE:
            continue
        size = ROWS_PER_PART + 1
        for name, num_rows in small:
            if size + num_rows > ROWS_PER_PART:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += num_rows
    return [group for group in groups if len(group) > 1]


class Batch:
    """
    Rows of a part that are read and checked together.

    Args:
        content: The file of the part, mapped into memory.
        described: The number of rows; where the batch begins in the file; its bytes and their CRC-32. The first one
            begins with the schema of the file.
        folder, file: For the message about a damaged file.

    Raises `DamagedIndexError` when rows are taken from bytes that are not those that were written.
    """

    def __init__(self, content: pa.Buffer, described: tuple[int, int, int, int], folder: Path, file: str):
        self.num_rows, self._start, self._size, self._checksum = described
        self._content, self._folder, self._file = content, folder, file

    @cached_property
    def table(self) -> pa.Table:
        """The fixed columns, memory-mapped."""
        mine = self._content.slice(self._start, self._size)
        check_bytes(mine, self._folder, self._file, (self._size, self._checksum))
        if self._start == 0:
            return pa.ipc.open_stream(mine).read_all()
        schema = pa.ipc.open_stream(self._content).schema
        return pa.Table.from_batches([pa.ipc.read_record_batch(mine, schema)])

    @cached_property
    def embeddings(self) -> np.ndarray:
        """(rows, dim) float32, memory-mapped."""
        (column,) = self.table["embedding"].chunks
        return column.flatten().to_numpy().reshape(self.num_rows, -1)

    @property
    def first_number(self) -> int:
        """Where the embeddings begin in the file, counted in numbers of four bytes; Arrow aligns them to eight."""
        return (self.embeddings.ctypes.data - self._content.address) // 4


class Part:
    """
    One part of the rows.

    Args:
        folder: The index.
        name, num_rows: As the manifest lists them.
        files: The files of the index with their sizes and checksums.

    Raises `DamagedIndexError` for a file that is missing or damaged; the Arrow file's bytes are checked batch by
    batch, before the first row is taken from one.
    """

    def __init__(self, folder: Path, name: str, num_rows: int, files: Mapping[str, tuple[int, int]]):
        self.name, self.num_rows = name, num_rows
        arrow_file, parquet_file = files_of(name)
        self.stored = files[arrow_file], files[parquet_file]
        content = open_file(folder, arrow_file, self.stored[0])
        looked_at = pq.read_table(pa.BufferReader(checked_bytes(folder, parquet_file, self.stored[1])))
        described = json.loads(looked_at.schema.metadata[ARROW_FILE])
        self._content = content
        self.batches = [Batch(content, each, folder, arrow_file) for each in described["batches"]]
        self.looked_at = looked_at.replace_schema_metadata(None)

    def runs_of_numbers(self, length: int) -> np.ndarray:
        """(n, `length`) float32, memory-mapped: row i are the numbers of the Arrow file from the i-th on."""
        numbers = np.frombuffer(self._content, np.float32, self._content.size // 4)
        return np.lib.stride_tricks.sliding_window_view(numbers, length)

    def tables(self) -> Iterator[pa.Table]:
        """The rows of each batch with all columns, as `write_part` takes them."""
        start = 0
        metadata = self.looked_at.drop_columns(list(LOOKED_AT))
        for batch in self.batches:
            table = batch.table
            for name, column in zip(metadata.column_names, metadata.columns, strict=True):
                table = table.append_column(name, column.slice(start, batch.num_rows))
            yield table
            start += batch.num_rows


class Rows:
    """
    The rows of one generation; nothing in it changes.

    Args:
        folder: The index.
        manifest: The generation.
        known: The rows of another generation, whose parts are not read again.

    Raises `DamagedIndexError` for a file that is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest, known: "Rows | None" = None):
        self.dim = manifest.info["dim"]
        known_parts = {} if known is None else known.parts
        self.parts: dict[str, Part] = {}
        for name, num_rows in manifest.parts:
            stored = tuple(manifest.files[file] for file in files_of(name))
            part = known_parts.get(name)
            is_same = part is not None and part.stored == stored
            self.parts[name] = part if is_same else Part(folder, name, num_rows, manifest.files)
        tables = [LOOKED_AT_SCHEMA.empty_table(), *(part.looked_at for part in self.parts.values())]
        looked_at = join_tables(tables)
        self.row_ids = ids_in(looked_at["row_id"])
        self.filterable = looked_at.drop_columns(["row_id"])  # names, sources and metadata
        self.is_alive = np.ones(len(self), dtype=bool)
        if manifest.deleted is not None:
            content = checked_bytes(folder, manifest.deleted, manifest.files[manifest.deleted])
            self.is_alive[pq.read_table(pa.BufferReader(content))["position"].to_numpy()] = False
        self.removed = np.zeros(0, ROW_ID_DTYPE)
        if manifest.removed is not None:
            content = checked_bytes(folder, manifest.removed, manifest.files[manifest.removed])
            self.removed = ids_in(pq.read_table(pa.BufferReader(content))["row_id"])
        self._batches = [batch for part in self.parts.values() for batch in part.batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        # For `embeddings`: the part of each batch, where its embeddings begin in the file, and the file's numbers.
        self._in_part = np.repeat(np.arange(len(self.parts)), [len(part.batches) for part in self.parts.values()])
        self._first_numbers = np.full(len(self._batches), -1)  # -1: not checked yet
        self._runs: list[np.ndarray | None] = [None] * len(self.parts)

    def __len__(self) -> int:
        return len(self.row_ids)

    @cached_property
    def are_all_alive(self) -> bool:
        """Whether no entry is deleted."""
        return bool(self.is_alive.all())

    def positions_of(self, row_ids: np.ndarray) -> np.ndarray:
        """The positions of the rows with these ids, without deleted ones."""
        return np.flatnonzero(are_among(self.row_ids, row_ids) & self.is_alive)

    def embeddings(self, positions: np.ndarray | slice) -> np.ndarray:
        """(n, dim) float32, copied from the mapped files."""
        if isinstance(positions, slice):
            positions = np.arange(*positions.indices(len(self)))
        vectors = np.empty((len(positions), self.dim), np.float32)
        numbers = self._batch_numbers(positions)
        for number in np.unique(numbers[self._first_numbers[numbers] < 0]):
            self._first_numbers[number] = self._batches[number].first_number
        # One step for each file and not for each batch: candidates come from almost as many batches as they are many.
        first = self._first_numbers[numbers] + (positions - self._starts[numbers]) * self.dim
        in_part = self._in_part[numbers]
        for number in np.unique(in_part):
            inside = in_part == number
            vectors[inside] = self._runs_of_part(number)[first[inside]]
        return vectors

    def _runs_of_part(self, number: int) -> np.ndarray:
        runs = self._runs[number]
        if runs is None:
            runs = self._runs[number] = list(self.parts.values())[number].runs_of_numbers(self.dim)
        return runs

    def take(self, positions: np.ndarray) -> list[dict]:
        """Rows as dictionaries, with metadata and without embeddings."""
        columns = [name for name in FIXED_COLUMNS if name != "embedding"]
        rows = []
        # Row by row, because `Table.take` would copy and join the chunks of all columns.
        for position, number in zip(positions, self._batch_numbers(positions), strict=True):
            entry = self._batches[number].table.select(columns).slice(int(position - self._starts[number]), 1)
            metadata = self.filterable.slice(int(position), 1)
            rows.append({**metadata.to_pylist()[0], **entry.to_pylist()[0]})
        return rows

    def captions(self, positions: np.ndarray) -> Iterator[list[str]]:
        """The captions of each of these rows."""
        for position, number in zip(positions, self._batch_numbers(positions), strict=True):
            yield self._batches[number].table["captions"][int(position - self._starts[number])].as_py() or []

    def living_tables(self) -> Iterator[Iterator[pa.Table]]:
        """For each part that has any, tables of its rows that are not deleted, to write them again."""
        start = 0
        for part in self.parts.values():
            is_alive = self.is_alive[start : start + part.num_rows]
            start += part.num_rows
            if is_alive.any():
                yield _alive(part, is_alive)

    def _batch_numbers(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, positions, side="right") - 1


def _alive(part: Part, is_alive: np.ndarray) -> Iterator[pa.Table]:
    start = 0
    for table in part.tables():
        yield table.filter(pa.array(is_alive[start : start + len(table)]))
        start += len(table)


def unify_metadata(present: pa.Schema, new: pa.Schema) -> pa.Schema:
    """The columns of both. Raises `ValueError` for a column of metadata that holds another kind of values in one."""
    fields = {field.name: field for field in present}
    for field in new:
        if field.name not in fields:
            fields[field.name] = field
        elif field.name not in FIXED_COLUMNS:
            both = fields[field.name], field
            if not any(pa.types.is_null(one.type) for one in both):
                present, new = (kind_of_type(one.type) for one in both)
                if present != new:
                    raise mixed_kinds(field.name, present, new)
            (fields[field.name],) = pa.unify_schemas([pa.schema([one]) for one in both], promote_options="permissive")
    return pa.schema(list(fields.values()))


def write_deleted(folder: Path, name: str, positions: np.ndarray) -> tuple[int, int]:
    """Write the positions of all deleted rows; returns what the manifest lists of the file."""
    return _write_column(folder, name, "position", pa.array(positions))


def write_removed(folder: Path, name: str, row_ids: np.ndarray) -> tuple[int, int]:
    """Write the ids of all entries that were ever deleted; returns what the manifest lists of the file."""
    return _write_column(folder, name, "row_id", pa.array(row_ids).cast(pa.string()))


def _write_column(folder: Path, name: str, column: str, values: pa.Array) -> tuple[int, int]:
    with atomic_write(folder / name) as partial:
        pq.write_table(pa.table({column: values}), partial)
    return describe_file(folder / name)


def describe_for_datasets(folder: Path, manifest: Manifest) -> None:
    """Write the two files by which `datasets.load_from_disk` opens the parts; an index does not read them."""
    names = [files_of(part)[0] for part, _ in manifest.parts]
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.blake2b("/".join(names).encode(), digest_size=8).hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"features": fixed_features(manifest.info["dim"]).to_dict()}
    for name, content in zip(DATASETS_FILES, (state, info), strict=True):
        with atomic_write(folder / name) as partial:
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
