"""The audit trail of the adaptive momentum filter: a folder of parquet files with one row for every pair it left out.

Every process writes its own files and none is ever changed. Which pairs are left out is in `filtering.py`.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..data.items import decode_name

COLUMNS = pa.schema(
    [
        ("step", pa.int64()),  # the optimizer step, counted from 1, whose losses the pair did not enter
        ("pair_id", pa.int64()),
        ("name", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("attempt", pa.int64()),  # when this start of the run began; a resumed run begins a new attempt,
        ("attempt_step", pa.int64()),  # after this step
    ]
)
MAX_BATCHES_ON_DEVICE = 32
MAX_ROWS_IN_MEMORY = 100_000


class FilterLog:
    """
    Collects the pairs that the filter leaves out on this process, and writes them when told to.

    Args:
        folder: Where the parquet files go; made if needed. Files that are there stay.
        process_index: Of this process.
    """

    def __init__(self, folder: str | os.PathLike, process_index: int):
        self.folder = Path(folder)
        self.process_index = process_index
        self._batches: list[tuple] = []
        self._rows: list[dict] = []
        self._attempt = self._attempt_step = self._num_files = 0

    def start(self, attempt: int, step: int) -> None:
        """Begin an attempt: `attempt` is larger than those before and equal on all processes, `step` its first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._attempt, self._attempt_step, self._num_files = attempt, step, 0
        self._batches, self._rows = [], []
        if self.process_index == 0:
            self._write_file([])  # so that the attempt is known even if it filters nothing

    def add(self, step: int, filtered: torch.Tensor, scores: torch.Tensor, threshold: torch.Tensor, batch: dict):
        """Note one batch of this process: filtered (B,) bool, scores (B,), the threshold (), and `pair_ids`, `names`
        of the batch. Nothing is copied to the host on most calls."""
        self._batches.append((step, filtered, scores.float(), threshold, batch["pair_ids"], batch.get("names")))
        if len(self._batches) >= MAX_BATCHES_ON_DEVICE:
            self._fetch()
        if len(self._rows) >= MAX_ROWS_IN_MEMORY:
            self.write()

    def discard_step(self, step: int) -> None:
        """Forget one step that has not been written, as it was not taken after all."""
        self._fetch()
        self._rows = [row for row in self._rows if row["step"] != step]

    def write(self) -> None:
        """Write what has been noted since the last call into a new file, which is there whole or not at all."""
        self._fetch()
        if not self._rows:
            return
        self._write_file(self._rows)
        self._rows = []

    def _write_file(self, rows: list[dict]) -> None:
        attempt = {"attempt": self._attempt, "attempt_step": self._attempt_step}
        table = pa.Table.from_pylist([{**row, **attempt} for row in rows], schema=COLUMNS)
        table = table.replace_schema_metadata({name: str(value) for name, value in attempt.items()})
        name = f"{self._attempt}-{self.process_index:05d}-{self._num_files:06d}.parquet"
        unfinished = self.folder / f".{name}.tmp"
        with unfinished.open("wb") as file:
            pq.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / name)
        self._num_files += 1

    def _fetch(self) -> None:
        for step, filtered, scores, threshold, pair_ids, names in self._batches:
            chosen = filtered.nonzero().flatten()
            if len(chosen) == 0:
                continue
            names = [None] * len(chosen) if names is None else [decode_name(name) for name in names[chosen].cpu()]
            columns = zip(pair_ids[chosen].tolist(), names, scores[chosen].tolist(), strict=True)
            row = {"step": step, "threshold": float(threshold)}
            self._rows += [
                {**row, "pair_id": pair_id, "name": name, "score": score} for pair_id, name, score in columns
            ]
        self._batches = []


def read_filter_log(folder: str | os.PathLike) -> pa.Table:
    """
    All rows of a filter log, ordered by step, each filtering once.

    Steps that were taken again, because a run went on from a checkpoint before them, count as they were taken last.
    Columns: step, pair_id, name, score, threshold, attempt, attempt_step. Raises `ValueError` where there is no log.
    """
    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} holds no filter log: there is no .parquet file in it.")
    tables = [pq.read_table(file) for file in files]
    starts = sorted(
        {tuple(int(table.schema.metadata[name]) for name in (b"attempt", b"attempt_step")) for table in tables}
    )
    rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    for attempt, step in sorted((int(attempt), int(step)) for attempt, step in starts):
        taken_again = pc.and_(pc.less(rows["attempt"], attempt), pc.greater(rows["step"], step))
        rows = rows.filter(pc.invert(taken_again))
    return rows.sort_by([("step", "ascending"), ("pair_id", "ascending")])


def count_filtered(folder: str | os.PathLike) -> pa.Table:
    """How often each pair of a filter log was left out: pair_id, name, times, lowest_score; the most often first."""
    counts = read_filter_log(folder).group_by(["pair_id", "name"]).aggregate([("step", "count"), ("score", "min")])
    counts = counts.rename_columns({"step_count": "times", "score_min": "lowest_score"})
    return counts.select(["pair_id", "name", "times", "lowest_score"]).sort_by(
        [("times", "descending"), ("lowest_score", "ascending")]
    )
