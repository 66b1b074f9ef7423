"""The audit trail of the adaptive momentum filter: a folder of parquet files with one row for every pair it left out.

Every process writes its own files and none is ever changed. Which pairs are left out is in `filtering.py`.
"""

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.atomic_write import atomic_write
from ..data.items import decode_name
from .objective import ObjectiveOutput

COLUMNS = pa.schema(
    [
        ("step", pa.int64()),  # the optimizer step, counted from 1, whose losses the pair did not enter
        ("pair_id", pa.int64()),
        ("name", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("attempt", pa.int64()),  # the number of this start of the run; a resumed run is a new start,
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
        self._restart = self._restart_step = self._num_files = 0

    def next_restart(self) -> int:
        """A number larger than those of all starts that are in the folder, whatever the clock says."""
        names = [re.match(r"(\d+)-\d{5}-", path.name) for path in self.folder.glob("*.parquet")]
        return 1 + max((int(name[1]) for name in names if name is not None), default=0)

    def start(self, restart: int, step: int) -> None:
        """
        Begin the log of one start of the run.

        Args:
            restart: `next_restart` of the first process, on all processes.
            step: The step after which it begins.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._restart, self._restart_step, self._num_files = restart, step, 0
        self._batches, self._rows = [], []
        if self.process_index == 0:
            self._write_file([])  # so that this start is known even if it filters nothing

    def add(self, step: int, result: ObjectiveOutput, inputs: dict) -> None:
        """
        Note the pairs of one batch of this process that the filter left out; mostly nothing is copied to the host.

        Args:
            step: The optimizer step, counted from 1, that the batch is part of.
            result: What the objective returned for it.
            inputs: Has `pair_ids` (B,) and, if known, `names` (B, 120).
        """
        local = result.local
        filtered = (result.batch.valid & ~result.keep_mask)[local]
        scores = result.scores[local].float()
        self._batches.append(
            (step, filtered, scores, result.filter_threshold, inputs["pair_ids"], inputs.get("names"))
        )
        if len(self._batches) >= MAX_BATCHES_ON_DEVICE:
            self._fetch()
        if len(self._rows) >= MAX_ROWS_IN_MEMORY:
            self.write()

    def discard_step(self, step: int) -> None:
        """Forget one step that has not been written, as it was not taken after all."""
        self._fetch()
        self._rows = [row for row in self._rows if row["step"] != step]

    def write(self) -> None:
        """Write what has been noted since the last call into a new file."""
        self._fetch()
        if not self._rows:
            return
        self._write_file(self._rows)
        self._rows = []

    def _write_file(self, rows: list[dict]) -> None:
        restart = {"attempt": self._restart, "attempt_step": self._restart_step}
        table = pa.Table.from_pylist([{**row, **restart} for row in rows], schema=COLUMNS)
        table = table.replace_schema_metadata({name: str(value) for name, value in restart.items()})
        name = f"{self._restart}-{self.process_index:05d}-{self._num_files:06d}.parquet"
        with atomic_write(self.folder / name) as partial:
            pq.write_table(table, partial)
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
    for restart, step in starts:
        taken_again = pc.and_(pc.less(rows["attempt"], restart), pc.greater(rows["step"], step))
        rows = rows.filter(pc.invert(taken_again))
    return rows.sort_by([("step", "ascending"), ("pair_id", "ascending")])


def count_filtered(folder: str | os.PathLike) -> pa.Table:
    """How often each pair of a filter log was left out: pair_id, name, times, lowest_score; the most often first."""
    counts = read_filter_log(folder).group_by(["pair_id", "name"]).aggregate([("step", "count"), ("score", "min")])
    counts = counts.rename_columns({"step_count": "times", "score_min": "lowest_score"})
    return counts.select(["pair_id", "name", "times", "lowest_score"]).sort_by(
        [("times", "descending"), ("lowest_score", "ascending")]
    )
