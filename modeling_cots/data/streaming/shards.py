"""Finds the shards of a stream and reads their rows: .tar and .parquet itself, other Hub formats by `datasets`."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import datasets
import fsspec
import pyarrow.parquet as pq
from aiohttp import ClientTimeout

from ..files import find_files, unopened_repository
from ..revisions import refuse_version
from ..rows import wanted_columns
from ..skip_report import StreamReport
from .names import display_name, expand_braces, expand_urls, is_url
from .tar import MAX_MEMBER_BYTES, read_samples

HUB = "hf://"
ROWS_AT_ONCE = 16
SILENCE = 60  # seconds to wait for a web server that sends nothing


class FileShards:
    """
    Shards of which each is one file, on this machine or at any address that fsspec knows.

    Args:
        names: Paths and addresses, either all of .tar files (WebDataset) or all of .parquet files.
        columns: Columns or extensions to read. All others are skipped.
    """

    def __init__(self, names: list[str], columns: set[str]):
        self._names, self._columns = names, columns

    def __len__(self) -> int:
        return len(self._names)

    def name(self, shard: int) -> str:
        """The name of a shard in reports."""
        return display_name(self._names[shard])

    def read(self, shard: int, report: StreamReport) -> Iterator[tuple[str, dict]]:
        """The key and row of each sample in a shard, in its order. Refused files in a .tar go to the report."""
        read_rows = _read_tar if self.name(shard).endswith(".tar") else _read_parquet
        with _open(self._names[shard]) as stream:
            yield from read_rows(
                stream, self._columns, lambda name, reason: report.add_sample(f"{self.name(shard)}/{name}", reason)
            )


class RowShards:
    """
    Shards of any other format that `datasets` streams. Each has its own iterator, so that a bad one ends only itself.

    Args:
        rows: A streaming data set that decodes nothing.
        files: Names of its files, for reports.
        repository: Address of the Hub repository whose files rows may name as their images; `None`: no file at all.
    """

    def __init__(self, rows: datasets.IterableDataset, files: list[str], repository: str | None):
        self._rows = rows
        self._repository = repository
        is_one_each = len(files) == rows.num_shards
        self._names = files if is_one_each else [f"shard {shard}" for shard in range(rows.num_shards)]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, shard: int) -> str:
        """The name of a shard in reports."""
        return display_name(self._names[shard])

    def read(self, shard: int, report: StreamReport) -> Iterator[tuple[str, dict]]:
        """The number and the content of each row in a shard, in its order."""
        for number, row in enumerate(self._rows.shard(num_shards=len(self), index=shard)):
            for column, value in row.items():
                if self._is_beside(value):
                    row[column] = {**value, "bytes": _read_bounded(value["path"])}
            yield str(number), row

    def _is_beside(self, value) -> bool:
        """Whether the image is a file of the same repository; no other file of a machine or a server is ever read."""
        if self._repository is None or not isinstance(value, dict) or value.get("bytes") is not None:
            return False
        path = value.get("path")
        if not isinstance(path, str) or ".." in path.split("/"):
            return False
        return path.rpartition("::")[2].startswith(self._repository)


def open_shards(
    dataset: str,
    split: str,
    image_column: str | None,
    caption_column: str | None,
    dataset_config: str | None = None,
    revision: str | None = None,
) -> FileShards | RowShards:
    """
    Find the shards of a split, see `open_stream`.

    Raises `ValueError` for data that does not exist or cannot be streamed. Single files of a list in braces may be
    missing.
    """
    columns = wanted_columns(image_column, caption_column)
    names = _find_names(dataset, split)
    if names is None:
        return _open_repository(dataset, split, columns, dataset_config, revision)
    refuse_version(display_name(dataset), dataset_config, revision)
    suffixes = {Path(display_name(name)).suffix for name in names}
    if suffixes not in ({".tar"}, {".parquet"}):
        raise ValueError(
            f"A stream is made of .tar or of .parquet files; {display_name(dataset)} has "
            f"{', '.join(sorted(suffixes))}. Other files of this machine are opened without streaming."
        )
    return FileShards(names, columns)


def _find_names(dataset: str, split: str) -> list[str] | None:
    """The paths or addresses of the shards; `None` for a repository."""
    if is_url(dataset):
        return expand_urls(dataset)
    files = []
    for name in expand_braces(dataset) if "{" in dataset else [dataset]:
        found = [Path(name)] if "{" in dataset and "*" not in name else find_files(name, split)
        if found is None:
            return None
        files += found
    return [os.path.abspath(file.expanduser()) for file in files]


def _open_repository(
    dataset: str, split: str, columns: set[str], dataset_config: str | None, revision: str | None
) -> FileShards | RowShards:
    """The shards of a repository: a Hub id, or a folder with a data set card."""
    if os.path.isdir(dataset):
        refuse_version(dataset, revision=revision)
    try:
        builder = datasets.load_dataset_builder(dataset, dataset_config, revision=revision)
    except Exception as error:  # not found, gated, offline, several configurations, ...
        raise unopened_repository(dataset, dataset_config, revision, error) from error
    files = {str(name): list(map(str, found)) for name, found in (builder.config.data_files or {}).items()}
    if split not in files:
        raise ValueError(f"{dataset!r} has no split {split!r}; it has {', '.join(sorted(files)) or 'none'}.")
    if builder.name in ("webdataset", "parquet"):
        return FileShards(files[split], columns)
    try:
        rows = builder.as_streaming_dataset(split).decode(False)
    except Exception as error:  # each builder has its own
        raise ValueError(f"{dataset!r} cannot be streamed: {type(error).__name__}: {error}") from error
    return RowShards(rows, files[split], None if os.path.isdir(dataset) else f"{HUB}datasets/{dataset}@")


def _read_tar(
    stream: BinaryIO, columns: set[str], refuse: Callable[[str, str], None]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for sample, refused in read_samples(stream, {column.lower() for column in columns}):
        for member in refused:
            refuse(member.name, f"it is {member.refusal}")
        if sample:
            yield sample["__key__"], sample  # type: ignore[misc]


def _read_parquet(stream: BinaryIO, columns: set[str], refuse) -> Iterator[tuple[str, dict]]:
    file = pq.ParquetFile(stream)
    there = [name for name in file.schema_arrow.names if name in columns]
    number = 0
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=there):
        for row in batch.to_pylist():
            yield str(number), row
            number += 1


def _open(name: str) -> AbstractContextManager[BinaryIO]:
    if not is_url(name):
        return open(name, "rb")
    options = {}
    if name.startswith(("http://", "https://")):
        # By default a request must be over in five minutes, and a shard that is read in one go is one request.
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}
        if not display_name(name).endswith(".parquet"):
            options["block_size"] = 0  # in one go: many a server knows no ranges, and fails after the first block
    return fsspec.open(name, "rb", **options)


def _read_bounded(name: str) -> bytes | None:
    with _open(name) as file:
        content = file.read(MAX_MEMBER_BYTES + 1)
    return content if len(content) <= MAX_MEMBER_BYTES else None
