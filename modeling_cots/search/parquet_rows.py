"""Takes parquet files of entries, which `cots-search embed` has written, into an index of any kind; embeds nothing.

The files have the columns of an index, and in their metadata the model that made them: an index of another model
refuses them. Ids are made of the names once more, as those of an index are.
"""

import glob
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..data.skip_report import and_more
from ..data.streaming.names import display_name, is_url
from .embedding import MAX_REPORTED, row_ids_of
from .index import FORMAT, count_of, notes_before
from .rows import FIXED_COLUMNS, join_tables, unify_metadata

INFO_KEY = b"cots.index"
ROWS_AT_ONCE = 8_192  # read, and given to the index, at a time


class EmbeddingFile(NamedTuple):
    """A parquet file of entries: the file system that it is in, its path there, its rows, and its metadata."""

    filesystem: fsspec.AbstractFileSystem
    path: str
    num_rows: int
    info: dict


def open_files(names: list[str]) -> list[EmbeddingFile]:
    """
    The files that names mean, in order: files, globs, folders of .parquet files, and addresses of each.

    Raises `ValueError` where there is none, and for a file that cannot be read or is none of `cots-search embed`.
    """
    found = [each for name in names for each in _find(name)]
    if not found:
        raise ValueError(f"There is no parquet file in {and_more([*map(display_name, names)], MAX_REPORTED)}.")
    return [_open(*each) for each in tqdm(dict.fromkeys(found), desc="Opening", unit="file", leave=False)]


def _find(name: str) -> list[tuple[fsspec.AbstractFileSystem, str]]:
    try:
        files, path = fsspec.core.url_to_fs(name if is_url(name) else os.path.expanduser(name))
        if glob.has_magic(path):
            paths = sorted(files.glob(path))
        elif files.isdir(path):
            paths = sorted(each for each in files.ls(path, detail=False) if each.endswith(".parquet"))
        else:
            paths = [path]
    except Exception as error:  # each protocol has its own
        raise ValueError(f"{display_name(name)} cannot be looked up: {type(error).__name__}: {error}") from error
    return [(files, each) for each in paths]


def _open(files: fsspec.AbstractFileSystem, path: str) -> EmbeddingFile:
    try:
        with files.open(path) as stream, pq.ParquetFile(stream) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except FileNotFoundError:
        raise ValueError(f"There is no file {path!r}.") from None
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path!r} cannot be read: repeat the `cots-search embed` that was writing it. ({error})"
        ) from error
    try:
        info = json.loads((schema.metadata or {})[INFO_KEY])
    except (KeyError, ValueError):
        info = None
    if info is None or not {*FIXED_COLUMNS} <= {*schema.names}:
        raise ValueError(f"{path!r} was not written by `cots-search embed`: it does not say which model made it.")
    if info.get("format") != FORMAT:
        raise ValueError(
            f"{path!r} was written by another version of modeling_cots (its format is {info.get('format')}, and "
            f"{FORMAT} here): embed the images again."
        )
    if schema.field("embedding").type != pa.list_(pa.float32(), info["dim"]):
        raise ValueError(f"{path!r} is damaged: its embeddings are no lists of {info['dim']} numbers.")
    return EmbeddingFile(files, path, num_rows, info)


def read_info(files: list[EmbeddingFile]) -> dict:
    """What the files say of their model. Raises `ValueError` unless they say the same."""
    first, info = files[0], files[0].info
    for file in files:
        if file.info["model_identity"] != info["model_identity"]:
            raise ValueError(
                f"{first.path!r} and {file.path!r} were made with two models ({info['model']!r} and "
                f"{file.info['model']!r}): load those of one into each index."
            )
    return info


def check_same_model(name: str, stored: dict, files: list[EmbeddingFile]) -> None:
    """
    Raise `ValueError` where the files are of another model than an index.

    Args:
        name: The index, for the message.
        stored: What the index says of its model.
        files: All of one model.
    """
    info = files[0].info
    if (stored["model_identity"], stored.get("format")) != (info["model_identity"], info["format"]):
        raise ValueError(
            f"The index {name!r} was made with the model {stored['model']!r} ({stored['model_identity'][:12]}), and "
            f"{files[0].path!r} with {info['model']!r} ({info['model_identity'][:12]}): their embeddings cannot be "
            "compared. Load them into another index."
        )


def load_files(
    store,
    files: list[EmbeddingFile],
    *,
    restore: bool = False,
    bulk_import: str | None = None,
    progress: bool = True,
) -> int:
    """
    Add the entries that an index does not have yet; this also continues a stopped run.

    Args:
        store: The index.
        files: See `open_files`.
        restore: Whether to add also what was deleted from the index, which otherwise stays deleted.
        bulk_import: A folder in the storage of a Milvus server, for its bulk import; see `BulkImport`.
        progress: Whether to show bars.

    Returns how many entries were added. Raises `ValueError` for a column of another kind than in the index, and where
    there is no bulk import.
    """
    importer = None
    if bulk_import is not None:
        from .milvus_import import BulkImport

        importer = BulkImport(store, bulk_import, progress)  # before the index is asked what it has
    row_ids, sources, codes = _look_through(files, progress)
    is_first = np.zeros(len(row_ids), dtype=bool)
    is_first[np.unique(row_ids, return_index=True)[1]] = True
    is_in = store.has(row_ids)
    is_gone = np.zeros_like(is_in) if restore else store.was_deleted(row_ids)
    is_new = is_first & ~is_in & ~is_gone
    runs = {
        source: {
            "images": int((is_first & ~is_gone & (codes == code)).sum()),
            "before": int((is_first & is_in & (codes == code)).sum()),
            "entries": count_of(store, source),
        }
        for code, source in enumerate(sources)
    }
    num_new = int(is_new.sum())
    with store.adding(runs):
        for note in notes_before(int((is_first & is_in).sum()), int((is_first & is_gone).sum()), int(is_first.sum())):
            tqdm.write(note)
        tables = _joined(_new_rows(files, is_new))
        if importer is None:
            _insert(store, tables, num_new, progress)
        else:
            importer.add(tables, num_new)
    return num_new


def _insert(store, tables: Iterator[pa.Table], num_rows: int, progress: bool) -> None:
    with tqdm(total=num_rows, desc="Loading", unit="image", disable=not progress) as bar:
        for rows in tables:
            store.add(rows)
            bar.update(len(rows))


def _look_through(files: list[EmbeddingFile], progress: bool) -> tuple[np.ndarray, list[str], np.ndarray]:
    """The id of every entry, the sources, and the place of every entry's source among these."""
    row_ids, codes, places = [row_ids_of([])], [np.zeros(0, np.int32)], {}
    for file in tqdm(files, desc="Looking through", unit="file", disable=not progress):
        for rows in _read(file, ["name", "source"]):
            row_ids.append(row_ids_of(rows["name"].to_pylist()))
            encoded = rows["source"].combine_chunks().dictionary_encode()
            known = [places.setdefault(source, len(places)) for source in encoded.dictionary.to_pylist()]
            codes.append(np.array(known, np.int32)[encoded.indices.to_numpy()])
    return np.concatenate(row_ids), list(places), np.concatenate(codes)


def _read(file: EmbeddingFile, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a file, in tables. Raises `ValueError` where it cannot be read."""
    try:
        with file.filesystem.open(file.path) as stream, pq.ParquetFile(stream) as opened:
            for batch in opened.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file.path!r} cannot be read, and the others are kept: {error}") from error


def _new_rows(files: list[EmbeddingFile], is_new: np.ndarray) -> Iterator[pa.Table]:
    """The rows that are new, with the ids that an index gives them."""
    start = 0
    for file in files:
        if is_new[start : start + file.num_rows].any():
            for rows in _read(file):
                chosen = rows.filter(pa.array(is_new[start : start + len(rows)]))
                start += len(rows)
                if len(chosen):
                    ids = pa.array(row_ids_of(chosen["name"].to_pylist()).astype(str))
                    yield chosen.set_column(chosen.schema.get_field_index("row_id"), "row_id", ids)
        else:
            start += file.num_rows


def _joined(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables, several as one up to `ROWS_AT_ONCE` rows. Raises `ValueError` for columns of two kinds."""
    waiting: list[pa.Table] = []
    schema = pa.schema([])
    for table in tables:
        if waiting and sum(map(len, waiting)) + len(table) > ROWS_AT_ONCE:
            yield join_tables(waiting)
            waiting = []
        schema = unify_metadata(schema, table.schema)
        waiting.append(table)
    if waiting:
        yield join_tables(waiting)
