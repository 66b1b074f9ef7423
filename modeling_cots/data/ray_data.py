"""`map_to_parquet`: an actor class of Ray Data turns the parts of a collection into parquet files, each row once.

Ray reads the parts, calls the actors, writes, and keeps the ids of what is written. Its two-phase checkpoint makes the
output whole: a killed actor is started again, and after a killed driver the same call writes what is missing. What is
read is in `ray_parts.py`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it is started: nothing is sent anywhere

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
from pyarrow.fs import FileSelector, FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import Datasource, ReadTask

from .messages import printable
from .skip_report import and_more
from .streaming.names import display_name, is_url

logger = logging.getLogger(__name__)

ID_COLUMN = "row_id"
MAX_REPORTED = 10
# Reading, Ray's filter of what is written already, and writing: each waits for a CPU, for ever where actors have all.
SPARE_CPUS = 3
PENDING = ".pending.parquet"  # of Ray's checkpoint: rows whose file may not be whole

Part = Callable[[], Iterable[pa.Table]]


class _Parts(Datasource):
    """The parts as Ray reads them: one task each."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts

    def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(part, unknown) for part in self._parts]

    def estimate_inmemory_data_size(self) -> None:
        return None


class _LeftOut:
    """An actor that collects the names of what could not be read, with the reasons, from all others."""

    def __init__(self):
        self._reasons: dict[str, str] = {}

    def add(self, skipped: list[tuple[str, str]]) -> None:
        self._reasons.update(skipped)

    def all(self) -> list[tuple[str, str]]:
        return sorted(self._reasons.items())


class _Reporting:
    """
    What an actor calls for each batch, with reports of what it left out.

    Args:
        worker: Makes the worker, in the actor.
        folder: Where the command was started, from which its paths are meant: Ray starts actors elsewhere.
        left_out: The actor that collects the reports.
        metadata: The key and the content of the metadata of all files.
    """

    def __init__(self, worker: Callable[[], Callable], folder: str, left_out, metadata: tuple[bytes, dict]):
        if os.path.isdir(folder):
            os.chdir(folder)
        self._worker, self._left_out = worker(), left_out
        self._metadata = {metadata[0]: json.dumps(metadata[1])}

    def __call__(self, rows: pa.Table) -> pa.Table:
        done, skipped = self._worker(rows)
        if skipped:
            ray.get(self._left_out.add.remote(skipped))
        return done.replace_schema_metadata(self._metadata)


def map_to_parquet(
    parts: Sequence[Part],
    worker: Callable[[], Callable[[pa.Table], tuple[pa.Table, list[tuple[str, str]]]]],
    *,
    output: str,
    checkpoint: str,
    metadata: tuple[bytes, dict],
    num_actors: int,
    gpus_per_actor: float,
    cpus_per_actor: int,
    rows_per_call: int,
) -> tuple[int, int]:
    """
    Write what the workers make of the rows of all parts, and of no row twice.

    Args:
        parts: Each gives tables with the column `row_id`; no id occurs twice.
        worker: Makes a worker, in each actor. It turns a table of at most `rows_per_call` rows into another one, which
            has their `row_id`, and the names of what it left out, each with the reason.
        output: A folder, or an address that fsspec knows, of parquet files. All nodes see it.
        checkpoint: Another one, of the ids that are written.
        metadata: The key and the content of the files' metadata. An output with another content is refused.
        num_actors: Actors, each with its own worker.
        gpus_per_actor, cpus_per_actor: What Ray reserves for one; CPUs only where there are no GPUs.
        rows_per_call: See `worker`.

    Returns how many rows were written, and how many the checkpoint has in all. Raises `ValueError` for an output or a
    checkpoint that do not belong to this call, and for what a worker refuses.
    """
    (output_files, output), (checkpoint_files, checkpoint) = _place_of(output), _place_of(checkpoint)
    key, content = metadata
    _check_places(output_files, output, checkpoint_files, checkpoint, key, content)
    before = _count_rows(checkpoint_files, checkpoint)
    with _running_ray(num_actors, gpus_per_actor, cpus_per_actor):
        left_out: Any = ray.remote(num_cpus=0)(_LeftOut).remote()
        context = DataContext.get_current().copy()
        context.checkpoint_config = CheckpointConfig(
            ID_COLUMN, checkpoint, override_filesystem=checkpoint_files, delete_checkpoint_on_success=False
        )
        # Ray would reserve 1 GiB for its filter, and wait for ever on a small machine.
        context.checkpoint_config.checkpoint_actor_memory_bytes = 0
        context.execution_no_progress_timeout_s = -1  # a call on videos may take more than half an hour
        resources = {"num_gpus": gpus_per_actor} if gpus_per_actor else {"num_cpus": cpus_per_actor}
        with DataContext.current(context), _one_sentence():
            rows = ray.data.read_datasource(_Parts(parts), override_num_blocks=len(parts))
            rows = rows.map_batches(
                _Reporting,
                fn_constructor_args=(worker, os.getcwd(), left_out, metadata),
                batch_size=rows_per_call,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(size=num_actors),
                **resources,
            )
            rows.write_parquet(output, filesystem=output_files)
        _report(ray.get(left_out.all.remote()))
    after = _count_rows(checkpoint_files, checkpoint)
    return after - before, after


def _place_of(place: str) -> tuple[FileSystem, str]:
    """The file system of a folder or of an address, and its path there."""
    if not is_url(place):
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(place))
    try:
        files, path = fsspec.core.url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{display_name(place)} cannot be written to: {error}") from error
    return PyFileSystem(FSSpecHandler(files)), path


def _check_places(output_files, output: str, checkpoint_files, checkpoint: str, key: bytes, content: dict) -> None:
    """Raise `ValueError` unless output and checkpoint are new, or both of a call with the same content."""
    if output == checkpoint or checkpoint.startswith(output + "/") or output.startswith(checkpoint + "/"):
        raise ValueError(f"--checkpoint must be outside of --output: {checkpoint!r} and {output!r} are not.")
    written, noted = (_parquet_files(*place) for place in ((output_files, output), (checkpoint_files, checkpoint)))
    if written and not noted:
        raise ValueError(
            f"{output!r} has parquet files, and {checkpoint!r} knows of none: name the checkpoint that they were "
            "written with, or a new folder."
        )
    if not written and any(not path.endswith(PENDING) for path in noted):
        raise ValueError(
            f"{checkpoint!r} is of rows that are not in {output!r}: name the output that they were written to, or a "
            "new checkpoint."
        )
    for path in written:
        try:
            stored = json.loads((pq.read_schema(path, filesystem=output_files).metadata or {})[key])
        except (OSError, pa.ArrowException):  # of a killed run, which Ray removes
            continue
        except (KeyError, ValueError):
            stored = None
        if stored != content:
            raise ValueError(
                f"{output!r} was written by another command, or with another model ({path}): name a new folder, and a "
                "new checkpoint."
            )
        return


def _parquet_files(files: FileSystem, place: str) -> list[str]:
    entries = files.get_file_info(FileSelector(place, allow_not_found=True))
    return sorted(entry.path for entry in entries if entry.path.endswith(".parquet"))


def _count_rows(files: FileSystem, place: str) -> int:
    """Rows of the parquet files that a checkpoint has for whole files of the output."""
    paths = [path for path in _parquet_files(files, place) if not path.endswith(PENDING)]
    return pads.dataset(paths, filesystem=files, format="parquet").count_rows() if paths else 0


@contextmanager
def _running_ray(num_actors: int, gpus_per_actor: float, cpus_per_actor: int) -> Iterator[None]:
    """Ray with room for the actors: the one of this process, the cluster of RAY_ADDRESS, or one on this machine alone.

    Raises `ValueError` on this machine without enough GPUs. A cluster may grow: it gets a warning.
    """
    for name in ("ray", "ray.data"):  # their progress bars stay
        logging.getLogger(name).setLevel(logging.WARNING)
    num_cpus, num_gpus = num_actors * cpus_per_actor + SPARE_CPUS, num_actors * gpus_per_actor
    is_there, is_local = ray.is_initialized(), "RAY_ADDRESS" not in os.environ
    if not is_there:
        own: dict[str, Any] = {"address": "local", "num_cpus": max(num_cpus, os.cpu_count() or 1)} if is_local else {}
        ray.init(include_dashboard=False if is_local else None, logging_level=logging.WARNING, **own)
    try:
        has = ray.cluster_resources()
        if has.get("CPU", 0) < num_cpus or has.get("GPU", 0) < num_gpus:
            sentence = (
                f"{num_actors} actors need {num_cpus} CPUs ({SPARE_CPUS} of them to read and to write) and "
                f"{num_gpus:g} GPUs; Ray has {has.get('CPU', 0):g} and {has.get('GPU', 0):g}"
            )
            if is_local and not is_there:
                raise ValueError(f"{sentence}: lower --actors or --gpus_per_actor.")
            logger.warning(f"{sentence}, and waits until there are more.")
        yield
    finally:
        if not is_there:
            ray.shutdown()


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Raise what a worker has refused as the sentence that it was there, without the traceback of Ray."""
    try:
        yield
    except ray.exceptions.RayError as error:
        kind, _, sentence = str(error).strip().splitlines()[-1].partition(": ")  # the last line of the traceback
        if kind.rpartition(".")[2] == "ValueError":
            raise ValueError(sentence) from error
        raise


def _report(left_out: list[tuple[str, str]]) -> None:
    if left_out:
        named = and_more([f"{name} ({reason})" for name, reason in left_out], MAX_REPORTED)
        logger.warning(printable(f"Left out {len(left_out)} files that cannot be read: {named}."))
