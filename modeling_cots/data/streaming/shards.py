"""Finds the shards of a stream: files that formats.py reads, and other forms of the Hub by `datasets`."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import datasets
import fsspec
from aiohttp import ClientTimeout

from ..files import FORMATS, find_files
from ..formats import Rows, read_folder, read_rows
from ..messages import shown
from ..paths import RefusedPathError, open_door
from ..repositories import HUB, OUR_BUILDERS, files_of_split, open_builder, readable_files
from ..revisions import refuse_version
from ..rows import BadRowError, Columns
from .names import display_name, expand_braces, expand_urls, is_url
from .tar import MAX_MEMBER_BYTES

SILENCE = 60  # seconds to wait for a web server that sends nothing


class FileShards:
    """
    Shards of which each is one file, on this machine or at any address that fsspec knows, or a folder of samples here.

    Args:
        names: Paths and addresses.
        columns: Columns or extensions to read. All others are skipped.
        with_others: Whether to read other columns of texts, numbers and dates, too, see `read_rows`.
    """

    def __init__(self, names: list[str], columns: Columns, with_others: bool = False):
        self.names, self._columns, self._with_others = names, columns, with_others

    def __len__(self) -> int:
        return len(self.names)

    def name(self, shard: int) -> str:
        """The name of a shard in reports."""
        return display_name(self.names[shard])

    def read(self, shard: int) -> Rows:
        """The key and row of each sample in a shard, in its order, or what is wrong with it in place of the row."""
        name = self.names[shard]
        if not is_url(name) and os.path.isdir(name):
            yield from read_folder(Path(name), self._columns)
            return
        with _open(name) as stream:
            yield from read_rows(stream, Path(display_name(name)).suffix, self._columns, self._with_others)

    def read_file(self, shard: int, path: str) -> bytes:
        """The file that a row of a shard names as its image. Raises [`BadRowError`] unless it is beside the shard."""
        name = self.names[shard]
        if is_url(name):
            raise BadRowError("it has no image inside, only the name of a file, and the shard is not on this machine")
        try:
            return read_bounded(open_door(path, os.path.dirname(name)))
        except (OSError, RefusedPathError) as error:
            raise BadRowError(str(error)) from error


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

    def read(self, shard: int) -> Rows:
        """The number and the content of each row in a shard, in its order."""
        for number, row in enumerate(self._rows.shard(num_shards=len(self), index=shard)):
            yield str(number), row

    def read_file(self, shard: int, path: str) -> bytes:
        """The file that a row names as its image. Raises [`BadRowError`] unless it is one of the same repository."""
        is_beside = self._repository is not None and path.rpartition("::")[2].startswith(self._repository)
        if not is_beside or ".." in path.split("/"):
            raise BadRowError(
                f"it has no image inside, only the name of a file that is not to be read ({shown(path)})"
            )
        try:
            return read_bounded(path)
        except OSError as error:
            raise BadRowError(str(error)) from error


def open_shards(
    dataset: str, split: str, columns: Columns, dataset_config: str | None = None, revision: str | None = None
) -> FileShards | RowShards:
    """
    Find the shards of a split, see `open_stream`.

    Raises `ValueError` for data that does not exist or cannot be streamed. Single files of a list in braces may be
    missing.
    """
    names = _find_names(dataset, split)
    if names is None:
        builder = open_builder(dataset, dataset_config, revision)
        files = files_of_split(builder, dataset, split)
        # Our own reader finds no image beside a table at an address; `datasets` gives the address of each.
        readable = readable_files(builder, files)
        if readable is not None and (builder.name in OUR_BUILDERS or os.path.isdir(dataset)):
            return FileShards(readable, columns)
        return row_shards(builder, dataset, split, files)
    refuse_version(display_name(dataset), dataset_config, revision)
    odd = [name for name in names if not (os.path.isdir(name) or Path(display_name(name)).suffix in FORMATS)]
    if odd:
        raise ValueError(
            f"A stream is made of files that end in {', '.join(FORMATS)}; {display_name(dataset)} has "
            f"{display_name(odd[0])}."
        )
    return FileShards(names, columns)


def row_shards(builder, dataset: str, split: str, files: list[str]) -> RowShards:
    """The shards of a repository in a format that `datasets` alone reads."""
    try:
        rows = builder.as_streaming_dataset(split).decode(False)
    except Exception as error:  # each builder has its own
        raise ValueError(f"{dataset!r} cannot be streamed: {type(error).__name__}: {error}") from error
    return RowShards(rows, files, None if os.path.isdir(dataset) else f"{HUB}datasets/{dataset}@")


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


def read_bounded(name: str) -> bytes:
    """The content of a file, here or at an address. Raises `OSError` for one over 64 MiB."""
    with _open(name) as file:
        content = file.read(MAX_MEMBER_BYTES + 1)
    if len(content) > MAX_MEMBER_BYTES:
        raise OSError(f"{display_name(name)} has more than {MAX_MEMBER_BYTES:,} bytes")
    return content
