"""`load_rows`: the rows of a split by the name of a data set, whatever form it has."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets

from .files import METADATA_FILES, base_of, find_files
from .formats import column_names
from .repositories import cached_repository, download, files_of_split, open_builder, readable_files
from .revisions import refuse_version
from .rows import Columns
from .streaming.shards import RowShards, row_shards
from .tables import canonical_row, count_captions, first_problem, load_table, report_problems, slice_bounds, table_of


def load_rows(
    dataset: str,
    split: str,
    columns: Columns,
    dataset_config: str | None = None,
    revision: str | None = None,
    *,
    need_captions: bool = True,
) -> tuple[datasets.Dataset, Path | None]:
    """
    Open one split as a table of tables.py, memory-mapped, with images still encoded.

    Args:
        dataset: See `find_files`.
        split: Its name, with a slice if wanted ("train[:1000]").
        columns: Where images or videos and captions are.
        dataset_config: The configuration of a Hub id, or of a folder whose README.md lists configurations.
        revision: Branch, tag or commit of a Hub id.
        need_captions: Whether to refuse data without any caption.

    Returns the table, and the folder that paths in it are relative to: `None` where files lie in several folders.

    Raises `ValueError` where nothing is found, for a split that does not exist, and where no row can be used. Rows
    that cannot be used are reported.
    """
    files = find_files(dataset, split)
    if files is None:
        table, files, root = _load_repository(dataset, base_of(split), columns, dataset_config, revision)
    else:
        refuse_version(dataset, dataset_config, revision)
        table, root = load_table(files, columns), _common_folder(files)
    start, stop = slice_bounds(split, len(table))
    what = f"the split {split!r} of {dataset!r}"
    if start >= stop:
        raise ValueError(f"There is nothing in it: {what} is empty.")
    table = table.select(range(start, stop))
    if not _has_media(table):
        raise ValueError(f"No row of {what} can be used; {_first_problem_or_columns(table, files, columns)}.")
    if need_captions and not count_captions(table).any():
        raise ValueError(
            f"No {columns.kind} of {what} has a caption in {' or '.join(columns.captions)}; "
            f"{_first_problem_or_columns(table, files, columns)}."
        )
    report_problems(table, dataset)
    return table, root


def _first_problem_or_columns(table: datasets.Dataset, files: list[Path], columns: Columns) -> str:
    names = [] if not files else column_names(files[0], columns)
    return first_problem(table) or f"name the column if it is another: there are {', '.join(names) or 'none'}"


def _common_folder(files: list[Path]) -> Path | None:
    """The folder of files, which their paths start from."""
    folders = {file.parent for file in files}
    return folders.pop() if len(folders) == 1 else None


def _has_media(table: datasets.Dataset) -> bool:
    names = table.select_columns(["bytes", "path"]).with_format("arrow")[:]
    return any(names[name].null_count < len(names) for name in names.column_names)


def _load_repository(
    dataset: str, split: str, columns: Columns, dataset_config: str | None, revision: str | None
) -> tuple[datasets.Dataset, list[Path], Path | None]:
    """The table of a Hub data set or of a folder with a card, its files, and the folder that paths start from."""
    folder = Path(dataset).expanduser()
    try:
        builder = open_builder(str(folder) if folder.is_dir() else dataset, dataset_config, revision)
    except ValueError:
        cached = None if folder.is_dir() else cached_repository(dataset, revision)
        if cached is None:
            raise
        folder, builder = cached, open_builder(dataset, dataset_config, cached=cached)
    files = files_of_split(builder, dataset, split)
    readable = readable_files(builder, files)
    if readable is None:
        shards = row_shards(builder, dataset, split, files)
        what = repr((builder.hash, builder.config.name, split, files, columns))
        fingerprint = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
        return table_of(_rows_of_shards, {"shards": (shards,), "columns": columns}, fingerprint), [], None
    if folder.is_dir():
        paths = [Path(file) for file in readable]
    else:
        folder, paths = download(dataset, revision, files)
        kept = set(readable)
        paths = [path for path, file in zip(paths, files, strict=True) if file in kept]
    # As with `datasets`: paths in metadata start from its own folder, those in other files from the repository. Of
    # the Hub nothing else is downloaded.
    is_metadata = any(path.name in METADATA_FILES for path in paths)
    is_here = os.path.isdir(os.path.expanduser(dataset))
    root = _common_folder(paths) if is_metadata else folder if is_here else None
    return load_table(paths, columns), paths, root


def _rows_of_shards(shards: tuple[RowShards], columns: Columns) -> Iterator[dict]:
    (rows,) = shards
    for shard in range(len(rows)):
        name, read_file = os.path.basename(rows.name(shard)), partial(rows.read_file, shard)
        for key, row in rows.read(shard):
            yield canonical_row(row, columns, f"{name}/{key}", read_file)
