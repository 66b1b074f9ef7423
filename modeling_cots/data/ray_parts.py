"""The parts of a collection for `ray_data.map_to_parquet`, and readers that turn their rows into items in an actor.

A map-style data set is opened in every process: its rows are only names and numbers. Shards at addresses (WebDataset
and parquet, over fsspec) are read once, each as a stream by one task, and nothing of them is kept on a disk.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from .formats import Rows, rows_until_broken
from .messages import printable
from .rows import BadRowError, Columns, image_columns
from .streaming.names import display_name
from .streaming.shards import FileShards, open_shards
from .tables import broken_off, canonical_row

ROWS_PER_PART = 1_024  # a killed actor loses at most one part
SHARD_ROWS, SHARD_BYTES = 256, 64 * 2**20  # of shards in memory at a time
IdsOf = Callable[[list[str]], np.ndarray]


def numbered_parts(names: list[str], ids_of: IdsOf, **columns: list) -> list[partial]:
    """Parts with `row_id`, `name`, `number` and further columns of N items, whose names are different."""
    return [
        partial(
            _numbered_part,
            start,
            names[start : start + ROWS_PER_PART],
            ids_of,
            **{name: values[start : start + ROWS_PER_PART] for name, values in columns.items()},
        )
        for start in range(0, len(names), ROWS_PER_PART)
    ]


def _numbered_part(start: int, names: list[str], ids_of: IdsOf, **columns: list) -> Iterator[pa.Table]:
    numbers = np.arange(start, start + len(names))
    yield pa.table({"row_id": ids_of(names).astype(str), "name": names, "number": numbers, **columns})


class NumberedReader:
    """
    Gives the items of rows of `numbered_parts`, each with its `metadata`.

    Args:
        open_items: Opens the map-style data set, in the process that reads.
    """

    def __init__(self, open_items: Callable[[], Dataset]):
        self._open_items = open_items
        self._dataset: Dataset | None = None

    def __call__(self, rows: pa.Table) -> list[dict]:
        if self._dataset is None:
            self._dataset = self._open_items()
        metadata = getattr(self._dataset, "metadata", lambda number: {})
        return [{**self._dataset[number], "metadata": metadata(number)} for number in rows["number"].to_pylist()]


def shard_parts(
    dataset: str,
    split: str,
    ids_of: IdsOf,
    image_column: str | None = None,
    caption_column: str | None = None,
    dataset_config: str | None = None,
    revision: str | None = None,
) -> list[partial]:
    """
    Parts of shards, one each, with `row_id`, `name`, `bytes`, `captions`, `metadata` and `refused`.

    A name is that of the shard and the key in it; keys that occur again get a number.

    Args:
        dataset: Addresses of WebDataset .tar or .parquet files, with braces and stars, see `open_stream`.
        split: Its name.
        ids_of: Gives the ids of names.
        image_column, caption_column: See `open_pairs`.
        dataset_config, revision: Refused, as addresses have neither.

    Raises `ValueError` for addresses that cannot be looked up, and for two that differ in their query alone.
    """
    if "[" in split:
        raise ValueError(f"Addresses have no length to cut {split!r} from; give the name of the split alone.")
    columns = image_columns(image_column, caption_column)
    shards = open_shards(dataset, split, columns, dataset_config, revision)
    assert isinstance(shards, FileShards)
    names = list(dict.fromkeys(shards.names))
    if len({display_name(name) for name in names}) < len(names):
        raise ValueError(f"Shards of {display_name(dataset)} differ in the query of their address alone: rename them.")
    return [partial(_shard_part, FileShards([name], columns, with_others=True), columns, ids_of) for name in names]


def _shard_part(shards: FileShards, columns: Columns, ids_of: IdsOf) -> Iterator[pa.Table]:
    shard, seen, rows, size = shards.name(0), Counter(), [], 0
    for key, row in _rows_of(shards):
        name = f"{shard}/{printable(key)}" if key else shard
        seen[name] += 1
        known = canonical_row(row, columns, name, partial(shards.read_file, 0))
        content = known["bytes"]
        rows.append(
            {
                "name": name if seen[name] == 1 else f"{name} ({seen[name]})",
                "bytes": content,
                "captions": known["captions"],
                "metadata": known["others"],
                "refused": known["problem"] if content is None else None,
            }
        )
        size += len(content or b"")
        if len(rows) == SHARD_ROWS or size >= SHARD_BYTES:
            yield _shard_table(rows, ids_of)
            rows, size = [], 0
    if rows:
        yield _shard_table(rows, ids_of)


def _rows_of(shards: FileShards) -> Rows:
    """The rows of the only shard; where it breaks, the last one says so under no key."""
    breaks: list[BadRowError] = []  # what follows one is left for another run
    yield from rows_until_broken(
        shards.read(0), lambda error, num_read: breaks.append(BadRowError(broken_off(error, num_read)))
    )
    yield from (("", broken) for broken in breaks)


SHARD_SCHEMA = {
    "name": pa.string(),
    "bytes": pa.large_binary(),
    "captions": pa.list_(pa.string()),
    "metadata": pa.string(),
    "refused": pa.string(),
}


def _shard_table(rows: list[dict], ids_of: IdsOf) -> pa.Table:
    table = pa.Table.from_pylist(rows, pa.schema(SHARD_SCHEMA))
    return table.add_column(0, "row_id", pa.array(ids_of([row["name"] for row in rows]).astype(str)))


def read_shard_rows(rows: pa.Table) -> list[dict]:
    """The items of rows of `shard_parts`, each with its `metadata`."""
    return [
        {
            "image": {"bytes": row["bytes"], "path": None, **({"refused": row["refused"]} if row["refused"] else {})},
            "captions": row["captions"],
            "name": row["name"],
            "metadata": json.loads(row["metadata"] or "{}"),
        }
        for row in rows.to_pylist()
    ]
