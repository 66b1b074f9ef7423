"""The checkpoints of one run: chosen alike by all processes, committed when they are whole, with averages beside.

What makes a folder a whole checkpoint is in `checkpoints.py`; which step is refused, in `finite_check.py`.
"""

import copy
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .arguments import COTSTrainingArguments
from .checkpoints import (
    begin_checkpoint,
    check_checkpoint,
    choose_checkpoint,
    commit_checkpoint,
    latest_checkpoint,
    rotate_checkpoints,
    run_of,
    set_aside,
    unfinished_run,
)

logger = logging.get_logger(__name__)

LOCK_NAME = "training.lock"


class CheckpointError(OSError):
    """A checkpoint could not be written; the message says why, and where the run can go on."""


class RunCheckpoints:
    """
    Args:
        args: Of the run; `output_dir` holds its checkpoints.
        accelerator: Its processes meet at every checkpoint.

    Attributes:
        resumed_from: The folder that `choose` found, if any.
        run_id: Of this run: that of the checkpoint that it goes on from, or a new one.
        saved_step: The step of the checkpoint that was written or loaded last in this call of `train`, or `None`.
    """

    def __init__(self, args: COTSTrainingArguments, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self._lock = FileLock(os.path.join(args.output_dir, LOCK_NAME))
        self.resumed_from: str | None = None
        self.run_id = uuid.uuid4().hex
        self.saved_step: int | None = None
        self._was_of_others = False  # whether another number of processes has saved what the run goes on from

    @contextmanager
    def lock(self) -> Iterator[None]:
        """
        Let no other run train into `output_dir` during the block; all processes of one launch are one run.

        The operating system holds the lock for process 0 and takes it back when that process ends, however it ends:
        a file that stays behind is in nobody's way. Raises `ValueError`, on every process, where another run has it.
        """
        errors: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                self._acquire_lock()
            except ValueError as error:
                errors = [str(error)]
        if self.args.world_size > 1:
            broadcast_object_list(errors)
        if errors[0] is not None:
            raise ValueError(errors[0])
        try:
            yield
        finally:
            if self._lock.is_locked:
                with suppress(OSError):  # some systems keep a file that is open
                    os.unlink(self._lock.lock_file)
            self._lock.release()

    def _acquire_lock(self) -> None:
        folder = self.args.output_dir
        try:
            os.makedirs(folder, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another run is training into {folder}: wait for its end, or choose another output_dir."
            ) from None
        except OSError as error:
            raise ValueError(f"Nothing can be written to output_dir={folder}: {error.strerror or error}.") from error

    def _keep_lock(self) -> None:
        """A folder that was removed during the run is made anew, with its lock."""
        if self._lock.is_locked and not os.path.exists(self._lock.lock_file):
            logger.warning(f"{self.args.output_dir} was removed during the run, and is made anew.")
            self._lock.release()
            self._acquire_lock()

    def choose(self, wanted: str | bool | None, *, of_stream: bool = False) -> str | None:
        """
        What to resume from, as `choose_checkpoint` finds it; process 0 looks, and all processes agree.

        Checkpoints of other runs in `output_dir` are moved aside.

        Args:
            wanted: See `choose_checkpoint`.
            of_stream: Whether the run trains on a stream: `StreamPlace` says what another number of processes means.

        Raises `ValueError`, on every process, for a folder that is not a whole checkpoint.
        """
        found, num_processes, error = self._agree(wanted)
        if error is not None:
            raise ValueError(error)
        if wanted is not None and wanted is not False and self.accelerator.is_main_process:
            logger.warning(
                f"Going on from {found}." if found else f"No checkpoint in {self.args.output_dir}: a new run."
            )
        self._was_of_others = num_processes not in (None, self.args.world_size)
        if self._was_of_others and not of_stream:
            logger.warning(
                f"{found} was saved by {num_processes} processes, and now there are {self.args.world_size}: the "
                "run goes on, but its random numbers, and with other batches the order of the data, are not those "
                "that it would have had."
            )
        self.resumed_from = found
        if found is not None:
            self.run_id = run_of(found)
        else:
            stopped = unfinished_run(self.args.output_dir) if wanted == "latest" else None
            self.run_id = stopped or uuid.uuid4().hex
        if self.args.should_save:
            set_aside(self.args.output_dir, self.run_id)
        return found

    def _agree(self, wanted: str | bool | None) -> tuple[str | None, int | None, str | None]:
        """Checkpoint, the number of processes that saved it, and the error, as process 0 found them."""
        found: list[Any] = [None, None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = choose_checkpoint(wanted, self.args.output_dir)
                if found[0] is not None:
                    found[1] = check_checkpoint(found[0])["num_processes"]
            except ValueError as error:
                found[2] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(found)
        return found[0], found[1], found[2]

    @contextmanager
    def write(self, output_dir: str, step: int) -> Iterator[None]:
        """
        The block fills the checkpoint folder of `step`; it is invalid until all processes have left the block.

        Raises [`CheckpointError`] where the folder cannot be written.
        """
        args = self.args
        folder = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        limit, args.save_total_limit = args.save_total_limit, None  # the Trainer would rotate before this one is whole
        try:
            with self.explaining_storage(folder):
                self._keep_lock()
                if args.should_save:
                    begin_checkpoint(folder, self.run_id)
                yield
                args.save_total_limit = limit
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    save_arguments(args, folder)  # again, with the limit
                    commit_checkpoint(folder, args.world_size)
        finally:
            args.save_total_limit = limit
        self.saved_step = step

    @contextmanager
    def explaining_storage(self, folder: str) -> Iterator[None]:
        """Raise [`CheckpointError`] where the block cannot write into a folder: why, and where the run can go on."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _storage_reason(error)
            if reason is None:
                raise
            raise CheckpointError(f"{folder} could not be saved: {reason}. {self.how_to_go_on()}") from error

    def rotate(self, output_dir: str, best: str | None) -> None:
        """Delete the oldest checkpoints of this run beyond `save_total_limit`, but for the `best` one."""
        if self.args.should_save:
            rotate_checkpoints(output_dir, self.args.save_total_limit, best, self.run_id)

    def how_to_go_on(self) -> str:
        """A sentence that says from where a run that has ended too early can be resumed."""
        newest = latest_checkpoint(self.args.output_dir)
        if newest is None:
            return f"There is no whole checkpoint in {self.args.output_dir} to go on from: the run begins anew."
        return f"With resume_from_checkpoint=latest the run goes on from {newest}."

    def save_averages(self, folder: str, averages: dict[str, torch.Tensor]) -> None:
        """Write what this process has averaged since the last line of logs."""
        safetensors.torch.save_file(averages, self._averages_file(folder))

    def load_averages(self) -> dict[str, torch.Tensor] | None:
        """
        What `save_averages` wrote into `resumed_from`.

        `None` for a new run, and with another number of processes: all of them have to go on alike, as what is kept of
        a batch is encoded again by all processes at once.
        """
        path = None if self.resumed_from is None else self._averages_file(self.resumed_from)
        if path is None or self._was_of_others or not os.path.isfile(path):
            return None
        return {name: value.to(self.args.device) for name, value in safetensors.torch.load_file(path).items()}

    def _averages_file(self, folder: str) -> str:
        return os.path.join(folder, f"averages_{self.args.process_index}.safetensors")


def _storage_reason(error: Exception) -> str | None:
    """Why nothing could be written, or `None` for an error of another kind."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, SafetensorError):
        return str(error)
    # torch.save does not pass on what the system said (tests/training/test_recovery.py).
    if any(word in str(error) for word in ("inline_container", "iostream error", "PytorchStreamWriter")):
        return "a file could not be written to its end, as on a full disk"
    return None


def save_arguments(args: COTSTrainingArguments, folder: str) -> None:
    """Write the arguments of a run into a checkpoint, but for the token of the Hub: checkpoints are passed around."""
    shared = copy.copy(args)
    shared.hub_token = None
    torch.save(shared, os.path.join(folder, TRAINING_ARGS_NAME))


def check_loaded_weights(load_result, tied_names) -> None:
    """Raise `ValueError` where weights stayed as they were; tied ones are saved once, under their other name."""
    missing = [name for name in load_result.missing_keys if name not in tied_names]
    if missing or load_result.unexpected_keys:
        raise ValueError(
            f"The checkpoint is of another model: it lacks {missing}, and this model has no "
            f"{load_result.unexpected_keys}."
        )
