"""Turns the files of a split into one memory-mapped table with the same few columns, whatever their format.

`datasets` keeps the table in its cache, as it does with what it converts itself. Our own reader fills it (formats.py):
the builders of `datasets` take the type of every column from its first rows, and fail at the first cell of another.
"""

import datetime
import decimal
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers.utils import logging

from .formats import Rows, read_folder, read_rows
from .messages import printable
from .rows import IMAGE_TOKENS, TOKEN_SOURCE, BadRowError, Columns, cached_tokens, read_captions, read_media
from .skip_report import and_more

logger = logging.get_logger(__name__)

READER = 1  # raise it when the same files give another table, so that tables in caches are not used any more
MAX_NAMES = 5  # of rows with one problem, in a warning
MAX_PROBLEMS = 20  # that are told apart
SCALARS = str | int | float | datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | None
FEATURES = datasets.Features(
    {
        "bytes": datasets.Value("large_binary"),
        "path": datasets.Value("binary"),  # as the file system has it, which need not be UTF-8
        "captions": datasets.List(datasets.Value("string")),
        IMAGE_TOKENS: datasets.List(datasets.List(datasets.Value("uint16"))),
        TOKEN_SOURCE: datasets.Value("string"),
        "others": datasets.Value("string"),  # the other columns, as JSON: their types are of no concern here
        "are_text": datasets.Value("bool"),  # whether these are texts that may mean numbers, as in csv files
        "place": datasets.Value("string"),  # file and key, where there is a problem
        "problem": datasets.Value("string"),
    }
)


def load_table(files: list[Path], columns: Columns) -> datasets.Dataset:
    """
    The rows of some files: the media's bytes or path, captions, cached tokens, other values, and what is odd.

    A row that cannot be used stays, with nothing in it but its problem; so do files, or ends of files, that cannot be
    read: one row names each.

    Args:
        files: Files of the formats of formats.py, or folders of samples.
        columns: Where images or videos and captions are.
    """
    paths = tuple(os.path.abspath(file) for file in files)
    what = json.dumps([READER, columns, [_stamps(path) for path in paths]])
    fingerprint = hashlib.blake2b(what.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    return table_of(_rows_of_files, {"paths": paths, "columns": columns}, fingerprint)


def table_of(rows, arguments: dict, fingerprint: str) -> datasets.Dataset:
    """The table of what `rows(**arguments)` yields, from the cache if one of the same fingerprint is there."""
    try:
        return datasets.Dataset.from_generator(
            rows, FEATURES, gen_kwargs=arguments, fingerprint=fingerprint, writer_batch_size=100, split="train"
        )
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # datasets' words for no rows
            raise
        return datasets.Dataset.from_dict({name: [] for name in FEATURES}, FEATURES)


def table_of_paths(paths: list[str], captions: list[list[str]]) -> datasets.Dataset:
    """The table of R files with their captions, as an annotation file lists them."""
    nothing = {name: [None] * len(paths) for name in FEATURES}
    return datasets.Dataset.from_dict(
        nothing | {"path": [os.fsencode(path) for path in paths], "captions": captions}, FEATURES
    )


def slice_bounds(split: str, num_rows: int) -> tuple[int, int]:
    """
    First row and end of a slice such as "train[10%:20%]", as `datasets` understands it; without a slice all rows.

    Raises `ValueError` for what is no slice.
    """
    name, bracket, _ = split.partition("[")
    if not bracket:
        return 0, num_rows
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: num_rows})
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"{split!r} is no slice of a split, such as '{name}[:100]': {error}") from error
    return part.from_, part.to


def report_problems(table: datasets.Dataset, dataset: str) -> None:
    """Warn of the rows with a problem: how many there are, and for each problem the first rows that have it."""
    by_problem: dict[str, list[str]] = {}
    num_rows = 0
    for place, problem in _problems(table):
        num_rows += 1
        by_problem.setdefault(problem, []).append(place)
    if num_rows:
        told = [
            f"{problem}: {and_more(by_problem[problem], MAX_NAMES)}" for problem in list(by_problem)[:MAX_PROBLEMS]
        ]
        if len(by_problem) > MAX_PROBLEMS:
            told.append(f"and {len(by_problem) - MAX_PROBLEMS} other problems")
        report = f"{num_rows} of {len(table)} rows of {dataset} were left out, or in part. {'. '.join(told)}."
        logger.warning(printable(report))


def count_captions(table: datasets.Dataset) -> np.ndarray:
    """(R,) number of captions in each row."""
    return pc.list_value_length(table.select_columns(["captions"]).with_format("arrow")[:]["captions"]).to_numpy()


def first_problem(table: datasets.Dataset) -> str:
    """The first problem with its row, as a sentence that begins in lower case; empty without any."""
    return next((f"{place}: {problem}" for place, problem in _problems(table)), "")


def _problems(table: datasets.Dataset) -> Iterator[tuple[str, str]]:
    columns = table.select_columns(["place", "problem"]).with_format("arrow")[:]
    chosen = columns.filter(columns["problem"].is_valid())
    yield from zip(chosen["place"].to_pylist(), chosen["problem"].to_pylist(), strict=True)


def _stamps(path: str) -> list:
    """What changes when a file, or one in a folder of samples, is written anew."""
    files = [os.path.join(path, name) for name in sorted(os.listdir(path))] if os.path.isdir(path) else [path]
    return [
        [file, stat.st_ino, stat.st_size, stat.st_mtime_ns]
        for file in files
        if os.path.exists(file) and (stat := os.stat(file))
    ]


def _rows_of_files(paths: tuple[str, ...], columns: Columns) -> Iterator[dict]:
    for path in paths:
        file, num_read = Path(path), 0
        name = printable(file.name)
        try:
            with _opened(file, columns) as rows:
                for key, row in rows:
                    known = canonical_row(row, columns, f"{name}/{printable(key)}")
                    yield known | {"are_text": file.suffix == ".csv"}
                    num_read += 1
        except (MemoryError, GeneratorExit):
            raise
        except Exception as error:  # each format has its own: pyarrow's, DamagedShardError, OSError, ...
            yield _empty(name, broken_off(error, num_read))


def broken_off(error: Exception, num_read: int) -> str:
    """What to say of a file whose reading an error ended."""
    reason = str(error).rstrip(".") or "no reason given"
    kind = "" if isinstance(error, BadRowError) else f"{type(error).__name__}: "
    beyond = f" beyond its first {num_read} rows" if num_read else ""
    return f"it cannot be read{beyond} ({kind}{reason})"


@contextmanager
def _opened(file: Path, columns: Columns) -> Iterator[Rows]:
    if file.is_dir():
        yield read_folder(file, columns)
    else:
        with file.open("rb") as stream:
            yield read_rows(stream, file.suffix, columns, with_others=True)


def canonical_row(
    row: dict | BadRowError, columns: Columns, place: str, read_file: Callable[[str], bytes] | None = None
) -> dict:
    """
    A row of the table for a row of a file.

    Args:
        row: The row, or what is wrong with it.
        columns: Where its image or video and its captions are.
        place: Its file and key.
        read_file: Reads the file that it names; by default its path is kept.
    """
    if isinstance(row, BadRowError):
        return _empty(place, str(row))
    content = path = None
    problems = []
    captions, note = read_captions(row, columns)
    try:
        media = read_media(row, columns)
        content, path = media["bytes"], media["path"]
        if content is None and read_file is not None:
            content = read_file(path)
        path = None if path is None else _encode(path)
    except BadRowError as error:
        content = path = None
        problems.append(str(error))
    if note is not None:
        problems.append(note)
    try:
        tokens = cached_tokens(row)
    except BadRowError as error:
        tokens = {}
        problems.append(str(error))
    return {
        "bytes": content,
        "path": path,
        "captions": captions,
        IMAGE_TOKENS: tokens.get(IMAGE_TOKENS),
        TOKEN_SOURCE: tokens.get(TOKEN_SOURCE),
        "others": json.dumps(_others(row, columns)),
        "are_text": False,
        "place": place if problems else None,
        "problem": "; ".join(problems) or None,
    }


def _empty(place: str, problem: str) -> dict:
    return {name: None for name in FEATURES} | {"captions": [], "place": place, "problem": printable(problem)}


def _encode(path: str) -> bytes:
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise BadRowError("its path is no name of a file")
    return encoded


def _others(row: dict, columns: Columns) -> dict:
    """The texts, numbers, truth values and dates of a row in columns that nothing else is made of."""
    used = {next((name for name in names if row.get(name) is not None), None) for names in columns[1:]}
    return {
        printable(str(name)): value if value is None or isinstance(value, str | int | float) else str(value)
        for name, value in row.items()
        if name not in used and name not in (IMAGE_TOKENS, TOKEN_SOURCE) and isinstance(value, SCALARS)
    }
