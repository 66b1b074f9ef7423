"""Takes entries into a Milvus server by its bulk import: parquet files, which the server reads from its own storage.

The files are written to a folder of that storage, which the server has to know by the same name: the bucket of a
cluster, or a folder of the machine of a standalone server that stores on its disk. Credentials for a bucket are those
of the environment, as the packages of fsspec take them; the server uses its own. A file is one job of the server, is
taken as a whole or not at all, and is removed afterwards.

An import, other than an upsert, does not look for entries with the same id. So whoever imports waits first for the
jobs of a run that was killed, and only then asks what is in the collection.
"""

import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from tqdm.auto import tqdm

from ..data.streaming.names import display_name, is_url
from .milvus_store import ENTITY_FIELDS, METADATA, ImportRefused, MilvusStore, as_entities

BYTES_PER_FILE = 2**28  # of rows in memory; of each file the server makes at least one segment
JOBS_AT_ONCE = 8  # submitted and not ended
SECONDS = 0.5  # between two questions how far a job is


class Job(NamedTuple):
    """A file that the server imports: the number of the job, the file, and its rows."""

    number: int
    path: str
    num_rows: int


class BulkImport:
    """
    Imports entries into a collection of a Milvus server. Two at a time would import the same entries twice.

    Args:
        store: The collection.
        folder: A folder of the server's storage: "s3://bucket/prefix", or a path that is the same on its machine.
        progress: Whether to show bars.

    At first waits for the jobs of an earlier run, and removes its files. Raises `ValueError` for an index that is no
    collection of a server, and for a folder that cannot be written.
    """

    def __init__(self, store, folder: str, progress: bool = True):
        if not isinstance(store, MilvusStore) or store.is_embedded:
            raise ValueError(
                "A bulk import needs a Milvus server (http://host:19530#collection): leave --bulk_import out."
            )
        self._store, self._shown, self._hidden = store, display_name(folder), not progress
        with self._storing():
            self._files, root = fsspec.core.url_to_fs(folder if is_url(folder) else os.path.expanduser(folder))
        # Of several servers that share a bucket each has a folder of its own.
        self._folder = f"{root.rstrip('/')}/cots_import_{store.collection}_{store.address_digest}"
        self._wait_for_earlier()
        with self._storing():
            self._remove_files()
            self._files.makedirs(self._folder, exist_ok=True)

    def add(self, tables: Iterable[pa.Table], num_rows: int) -> None:
        """
        Import entries that the collection lacks; at the end all are found.

        The first table is imported alone. Where the server refuses it, as one that does not read this folder has to, a
        line says so, and all is inserted. After an error what is submitted is waited for; what an interruption
        leaves to the server, the next run waits for.

        Args:
            tables: The entries.
            num_rows: How many there are, for the bar.

        Raises `ValueError` where the server refuses what comes later.
        """
        tables = iter(tables)
        first = next(tables, None)
        if first is None:
            return
        with tqdm(total=num_rows, desc="Importing", unit="image", disable=self._hidden) as bar:
            try:
                failure = self._failure_of(self._start([first]))
            except ImportRefused as refused:
                failure = str(refused)
            if failure is None:
                bar.update(len(first))
                self._import(tables, bar)
                self._store.find_imported()
            else:
                bar.write(f"Inserts instead of a bulk import: the server cannot read {self._shown} ({failure}).")
                for rows in chain([first], tables):
                    self._store.add(rows)
                    bar.update(len(rows))
        with self._storing():
            self._remove_files()

    def _import(self, tables: Iterator[pa.Table], bar: tqdm) -> None:
        """Import the tables, several as one file."""
        jobs: deque[Job] = deque()
        try:
            for of_file in _grouped(tables):
                if len(jobs) == JOBS_AT_ONCE:
                    self._finish(jobs.popleft(), bar)
                jobs.append(self._start(of_file))
            while jobs:
                self._finish(jobs.popleft(), bar)
        except Exception:
            for job in jobs:  # nobody else should meet them
                self._failure_of(job)
            raise

    def _start(self, tables: list[pa.Table]) -> Job:
        """Write a file, and have the server import it."""
        path, schema = f"{self._folder}/{uuid.uuid4().hex}.parquet", _schema()
        for rows in tables:
            self._store.check_metadata(rows)
        with self._storing(), self._files.open(path, "wb") as stream:
            with pq.ParquetWriter(stream, schema) as writer:
                for rows in tables:
                    writer.write_table(_as_imported(rows, schema))
        # In a bucket the server names a file without the bucket, which is its own.
        name = path if isinstance(self._files, LocalFileSystem) else path.partition("/")[2]
        return Job(self._store.start_import(name), path, sum(map(len, tables)))

    def _finish(self, job: Job, bar: tqdm) -> None:
        failure = self._failure_of(job)
        if failure is not None:
            raise ValueError(
                f"The Milvus server has not imported {job.num_rows:,} images ({failure}): repeat the command, which "
                "takes what is missing; without --bulk_import it inserts."
            )
        bar.update(job.num_rows)

    def _failure_of(self, job: Job) -> str | None:
        """Wait until a job has ended, and remove its file; returns why it has failed, if it has."""
        failure = self._wait_for(job.number)
        with self._storing():
            self._files.rm(job.path)
        return failure

    def _wait_for(self, number: int) -> str | None:
        while True:
            has_ended, failure = self._store.import_state(number)
            if has_ended:
                return failure
            time.sleep(SECONDS)

    def _wait_for_earlier(self) -> None:
        """Wait until the server has ended what an earlier run has submitted, and have that found."""
        numbers = self._store.imports()
        for number in tqdm(numbers, desc="Earlier imports", unit="file", leave=False, disable=self._hidden):
            self._wait_for(number)
        if numbers:
            self._store.find_imported()

    def _remove_files(self) -> None:
        if self._files.exists(self._folder):
            self._files.rm(self._folder, recursive=True)

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Raise `ValueError` where the folder cannot be used."""
        try:
            yield
        except ValueError:
            raise
        except Exception as error:  # each protocol has its own
            raise ValueError(
                f"No files for a bulk import can be written to {self._shown}: {type(error).__name__}: {error}"
            ) from error


def _grouped(tables: Iterator[pa.Table]) -> Iterator[list[pa.Table]]:
    """The tables of each file."""
    waiting: list[pa.Table] = []
    for rows in tables:
        waiting.append(rows)
        if sum(each.nbytes for each in waiting) >= BYTES_PER_FILE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _schema() -> pa.Schema:
    """The columns of a file, whatever the metadata are: these are one column of JSON."""
    texts = [pa.field(name, pa.string()) for name in (*ENTITY_FIELDS, METADATA)]
    return pa.schema([*texts, pa.field("embedding", pa.list_(pa.float32()))])


def _as_imported(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    entities = as_entities(rows)
    columns = {name: [entity[name] for entity in entities] for name in ENTITY_FIELDS}
    columns[METADATA] = [
        json.dumps({name: value for name, value in entity.items() if name not in ENTITY_FIELDS}) for entity in entities
    ]
    columns["embedding"] = rows["embedding"].cast(schema.field("embedding").type)
    return pa.table(columns, schema)
