"""Reads the rows of one file, whatever its format: .tar, .parquet, .jsonl, .json, .csv, or a folder of samples.

Data sets that are opened whole (tables.py) and streams (streaming/shards.py) read by this alone, so that both give the
same pairs. A cell, line or member that cannot be read costs only its own row. Nothing is unpickled, and of a sample in
a shard only the members that are asked for are read.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from .messages import shown
from .paths import RefusedPathError, open_door
from .rows import BadRowError, Columns, read_json
from .streaming.tar import MAX_MEMBER_BYTES, Member, gather_samples, key_of, read_members

ROWS_AT_ONCE = 16
MAX_CSV_LINES = 100  # of one row, whose cells may hold line breaks
Rows = Iterator[tuple[str, dict | BadRowError]]


def rows_until_broken(rows: Rows, on_break: Callable[[Exception, int], None]) -> Rows:
    """
    The rows of a file that is open, up to its end or to where it breaks.

    Args:
        rows: What reads them. Every protocol and format has errors of its own.
        on_break: Is told the error and how many rows came before it.
    """
    num_read = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except MemoryError:
            raise
        except Exception as error:
            on_break(error, num_read)
            return
        num_read += 1
        yield row


def read_rows(stream: BinaryIO, suffix: str, columns: Columns, with_others: bool = False) -> Rows:
    """
    The key and the row of each sample of a file, in its order, or what is wrong with it in place of the row.

    Args:
        stream: Opened for reading bytes. Only .parquet and .json must be able to seek.
        suffix: ".tar", ".parquet", ".jsonl", ".json" or ".csv".
        columns: Which columns, or members of a sample, to read.
        with_others: Whether to read other columns of texts, numbers and dates, too, where the format has columns.

    Raises whatever the format's library raises where the file itself is damaged: rows before that are sound.
    """
    if suffix not in READERS:
        raise BadRowError(f"its name ends in {suffix!r}, and in none of {', '.join(READERS)}")
    return READERS[suffix](stream, columns, with_others)


def column_names(file: Path, columns: Columns) -> list[str]:
    """The names of a file's columns, for messages; of a shard or of a folder those that its first sample has."""
    try:
        if file.suffix == ".parquet":
            return pq.read_schema(file).names
        if file.is_dir():
            return _names_of_first(read_folder(file, columns))
        with file.open("rb") as stream:
            return _names_of_first(read_rows(stream, file.suffix, columns))
    except Exception:  # damaged: its rows are then reported
        return []


def _names_of_first(rows: Rows) -> list[str]:
    return next(([name for name in row if name != "__key__"] for _, row in rows if isinstance(row, dict)), [])


def read_folder(folder: Path, columns: Columns) -> Rows:
    """The samples of a folder of files, such as img2dataset writes: files of one name up to the first dot are one."""

    def members() -> Iterator[Member]:
        for name in sorted(os.listdir(folder), key=lambda name: (key_of(name)[0], name)):
            if key_of(name)[1] in _fields(columns):
                yield _member_of(folder, name)

    return _to_rows(gather_samples(members()))


def read_annotations(file: Path, form: str):
    """
    The content of a JSON file of annotations. Raises `ValueError` for a file that is no JSON.

    Args:
        file: The file.
        form: Whose form it has, for the message: "Karpathy's".
    """
    try:
        return read_json(file.read_bytes().decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{file} is not in {form} form: its brackets are nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{file} is not in {form} form: {type(error).__name__}: {error}") from error


def _member_of(folder: Path, name: str) -> Member:
    try:
        path = Path(open_door(name, folder))
        if path.stat().st_size > MAX_MEMBER_BYTES:
            return Member(name, None, f"of {path.stat().st_size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
        return Member(name, path.read_bytes())
    except (OSError, RefusedPathError) as error:
        return Member(name, None, f"refused: {error}")


def _read_tar(stream: BinaryIO, columns: Columns, with_others: bool) -> Rows:
    fields = _fields(columns)
    return _to_rows(gather_samples(read_members(stream, lambda name: key_of(name)[1] in fields)))


def _fields(columns: Columns) -> set[str]:
    return {name.lower() for name in columns.wanted()}


def _to_rows(samples) -> Rows:
    for sample, refused in samples:
        for member in refused:
            yield member.name, BadRowError(f"it is {member.refusal}")
        if sample:
            yield sample["__key__"], sample


def _read_parquet(stream: BinaryIO, columns: Columns, with_others: bool) -> Rows:
    file = pq.ParquetFile(stream)
    wanted = columns.wanted()
    names = [
        field.name
        for field in file.schema_arrow
        if field.name in wanted or (with_others and not _is_bulky(field.type))
    ]
    if file.metadata.num_rows and not set(names) & set(columns.media):
        there = ", ".join(file.schema_arrow.names)
        raise BadRowError(f"it has no {columns.kind} in one of {', '.join(columns.media)}; there is {there}")
    number = 0
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
        cells = [_values(column) for column in batch.columns]
        for row in zip(*cells, strict=True):
            yield str(number), dict(zip(batch.schema.names, row, strict=True))
            number += 1


def _is_bulky(type: pa.DataType) -> bool:
    return pa.types.is_nested(type) or pa.types.is_binary(type) or pa.types.is_large_binary(type)


def _values(column: pa.Array) -> list:
    """The values of a column, with an error in place of each that Python cannot hold, as texts that are no UTF-8."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar):
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        return BadRowError(f"a value cannot be read ({type(error).__name__})")


def _read_jsonl(stream: BinaryIO, columns: Columns, with_others: bool) -> Rows:
    for number, line in enumerate(_lines(stream)):
        if not line.strip():
            continue
        try:
            if len(line) > MAX_MEMBER_BYTES:
                raise BadRowError(f"its line has more than {MAX_MEMBER_BYTES:,} bytes")
            row = read_json(line.decode("utf-8-sig"))
            yield str(number), row if isinstance(row, dict) else BadRowError(f"it holds {shown(row)} and no object")
        except BadRowError as error:
            yield str(number), error
        except (ValueError, RecursionError) as error:
            yield str(number), BadRowError(f"its line is no JSON ({type(error).__name__})")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one over 64 MiB only its beginning, which is longer than the limit by a byte."""
    while line := stream.readline(MAX_MEMBER_BYTES + 1):
        rest = line
        while len(rest) > MAX_MEMBER_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_MEMBER_BYTES + 1)
        yield line


def _read_json_file(stream: BinaryIO, columns: Columns, with_others: bool) -> Rows:
    """An array of objects, an object of equally long arrays, or JSON lines."""
    content = stream.read()
    try:
        rows = read_json(content.decode("utf-8-sig"))
    except RecursionError:
        raise BadRowError("it is JSON of too many brackets") from None
    except ValueError:
        yield from _read_jsonl(io.BytesIO(content), columns, with_others)
        return
    if isinstance(rows, dict) and rows and all(isinstance(column, list) for column in rows.values()):
        rows = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield str(number), row if isinstance(row, dict) else BadRowError(f"it holds {shown(row)} and no object")


def _read_csv(stream: BinaryIO, columns: Columns, with_others: bool) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_MEMBER_BYTES))  # of the process; it is only ever raised
    # Bytes that are no UTF-8 become halves of surrogate pairs, as in the names of files.
    records = _csv_records(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""))
    header = next(records, None)
    if header is None:
        return
    if isinstance(header, BadRowError):
        raise header
    for separator in (";", "\t", "|") if len(header) == 1 else ():
        if separator in header[0]:
            raise BadRowError(
                f"its columns are separated by {separator!r}: write the file again with commas, for example by "
                f"pandas.read_csv(file, sep={separator!r}).to_csv(file, index=False)"
            )
    for number, cells in enumerate(records):
        if isinstance(cells, BadRowError):
            yield str(number), cells
        elif len(cells) > len(header):
            yield str(number), BadRowError(f"it has {len(cells)} cells for {len(header)} columns: quote commas")
        else:
            yield str(number), {name: _text(name, cell, columns) for name, cell in zip(header, cells, strict=False)}


def _text(name: str, cell: str, columns: Columns) -> str | bytes:
    """A cell that is no UTF-8 as bytes, except a path, as the name of a file may be anything."""
    return cell if name in columns.media or _is_unicode(cell) else cell.encode("utf-8", "surrogateescape")


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _csv_records(lines: Iterator[str]) -> Iterator[list[str] | BadRowError]:
    """
    The rows of a csv file. A row whose quotation marks do not fit costs only its line.

    The standard library's reader would take everything from a mark that is never closed to the end of the file as one
    cell: here a row is tried with ever more lines, up to a hundred, and given up with its first line alone.
    """
    waiting: list[str] = []
    while waiting := waiting or list(islice(lines, 1)):
        if not waiting[0].strip("\r\n"):
            waiting.pop(0)
            continue
        record, used = waiting[0], 1
        while _is_open(cells := _csv_cells(record)) and used < MAX_CSV_LINES and len(record) <= MAX_MEMBER_BYTES:
            if used == len(waiting):
                waiting += islice(lines, 1)
            if used == len(waiting):
                break
            record, used = record + waiting[used], used + 1
        if isinstance(cells, BadRowError):
            first, used = _csv_cells(waiting[0]), 1
            cells = first if _is_open(first) else _csv_cells(waiting[0], strict=False)
        yield cells
        waiting = waiting[used:]


def _is_open(cells: list[str] | BadRowError) -> bool:
    """Whether a quotation mark has not been closed."""
    return isinstance(cells, BadRowError) and "end of data" in str(cells)


def _csv_cells(record: str, strict: bool = True) -> list[str] | BadRowError:
    try:
        return next(csv.reader([record], strict=strict))
    except csv.Error as error:
        return BadRowError(f"its line is no csv ({error})")


READERS: dict[str, Callable[[BinaryIO, Columns, bool], Rows]] = {
    ".parquet": _read_parquet,
    ".tar": _read_tar,
    ".jsonl": _read_jsonl,
    ".json": _read_json_file,
    ".csv": _read_csv,
}
