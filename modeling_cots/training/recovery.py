"""`Recovery`: how a run that was stopped goes on, and what is left in order when one has to stop.

A checkpoint counts once it is whole on every process (`checkpoints.py`). Beside what the Trainer saves it holds the
averages since the last line of logs. A step that the guard refuses (`training_guards.py`) is undone and saved.
"""

import os
import time

import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .checkpoints import check_checkpoint, choose_checkpoint, rotate_checkpoints, seal_checkpoint, unseal_checkpoint
from .filter_log import FilterLog
from .step_guard import NonFiniteLossError, StepGuard, StepSnapshot, UnreadableDataError

logger = logging.get_logger(__name__)


class Recovery:
    """
    Args:
        trainer (`COTSTrainer`): Whose run it is; its queue exists already.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.guard = StepGuard(trainer.args.max_skipped_fraction)
        self.snapshot = StepSnapshot(trainer.queue, trainer.args.device)
        self.filter_log = None
        if trainer.args.filter_log is not None:
            self.filter_log = FilterLog(trainer.args.filter_log, trainer.args.process_index)
        self._checkpoint: str | None = None
        self._saved_step: int | None = None

    # ------------------------------------------------------------------------------------------- checkpoints

    def choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        """See `choose_checkpoint` in `checkpoints.py`; process 0 looks, and all agree."""
        args = self.trainer.args
        found = [None, None, None]
        if self.trainer.is_world_process_zero():
            try:
                found[0] = choose_checkpoint(wanted, args.output_dir)
                if found[0] is not None:
                    found[1] = check_checkpoint(found[0])["num_processes"]
            except ValueError as error:
                found[2] = str(error)
        if args.world_size > 1:
            broadcast_object_list(found)
        self._checkpoint, num_processes, error = found
        if error is not None:
            raise ValueError(error)
        if wanted is not None and wanted is not False and self.trainer.is_world_process_zero():
            logger.warning(
                f"Going on from {found[0]}." if found[0] else f"No checkpoint in {args.output_dir}: a new run."
            )
        if num_processes not in (None, args.world_size):
            logger.warning(
                f"{self._checkpoint} was saved by {num_processes} processes, and now there are {args.world_size}: the "
                "run goes on, but its random numbers, and with other batches the order of the data, are not those "
                "that it would have had."
            )
        return self._checkpoint

    def save(self, output_dir: str, save_checkpoint) -> None:
        """Have `save_checkpoint()` fill the folder of this step, and make it whole; only then older ones go."""
        args, step = self.trainer.args, self.trainer.state.global_step
        folder = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self.filter_log is not None:
            self.filter_log.write()
        if args.should_save:
            unseal_checkpoint(folder)
        limit, args.save_total_limit = args.save_total_limit, None  # the Trainer would rotate before this one is whole
        try:
            save_checkpoint()
        finally:
            args.save_total_limit = limit
        self.trainer.accelerator.wait_for_everyone()
        if args.should_save:
            torch.save(args, os.path.join(folder, TRAINING_ARGS_NAME))  # again, with the limit
            seal_checkpoint(folder, args.world_size)
            rotate_checkpoints(output_dir, limit, self.trainer.state.best_model_checkpoint)
        self._saved_step = step

    def check_loaded(self, load_result) -> None:
        """Raise `ValueError` where weights were left as they are; tied ones are saved once, under their other name."""
        missing = [name for name in load_result.missing_keys if name not in self.trainer.model._tied_weights_keys]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint is of another model: it lacks {missing}, and this model has no "
                f"{load_result.unexpected_keys}."
            )

    def save_averages(self, folder: str) -> None:
        """Write what this process has averaged since the last line of logs."""
        state = self._averages()
        safetensors.torch.save_file(state, self._averages_file(folder))

    def _averages(self) -> dict[str, torch.Tensor]:
        state = self.trainer.training_log.state_dict()
        return {**state, "loss": self.trainer._tr_loss.clone()}

    def _load_averages(self, folder: str) -> None:
        path = self._averages_file(folder)
        if not os.path.isfile(path):  # of a process that was not there when the checkpoint was saved
            return
        state = {name: value.to(self.trainer.args.device) for name, value in safetensors.torch.load_file(path).items()}
        self._put_back_averages(state)
        # What the Trainer reports for this call of `train` are the steps of this call.
        self.trainer._total_loss_scalar -= float(state["loss"])
        logged = [entry["step"] for entry in self.trainer.state.log_history if "loss" in entry]
        self.trainer._globalstep_last_logged = logged[-1] if logged else 0

    def _put_back_averages(self, state: dict[str, torch.Tensor]) -> None:
        self.trainer._tr_loss = state["loss"]
        self.trainer.training_log.load_state_dict(state)

    def _averages_file(self, folder: str) -> str:
        return os.path.join(folder, f"averages_{self.trainer.args.process_index}.safetensors")

    # ------------------------------------------------------------------------------------------- moments of a run

    def begin_training(self) -> None:
        step = self.trainer.state.global_step
        self._saved_step = None
        self.trainer.collapse_watch.restore(self.trainer.state.log_history, self.trainer.queue.size)
        if self._checkpoint is not None:
            self._load_averages(self._checkpoint)
            self._saved_step = step
        if self.filter_log is not None:
            attempt = [time.time_ns()]
            if self.trainer.args.world_size > 1:
                broadcast_object_list(attempt)
            self.filter_log.start(attempt[0], step)

    def begin_epoch(self) -> None:
        self.snapshot.take_generators()

    def begin_step(self) -> None:
        # The first step of an epoch begins before its data loader, which draws a random number too.
        if not float(self.trainer.state.epoch or 0).is_integer():
            self.snapshot.take_generators()
        self.snapshot.take(averages=self._averages(), flos=self.trainer.current_flos)
        self.guard.begin_step()

    def note_filtered(self, filtered, scores, threshold, batch: dict) -> None:
        """One batch of this process goes into the filter log, where there is one; see `FilterLog.add`."""
        if self.filter_log is not None and self.trainer.model.training:
            self.filter_log.add(self.trainer.state.global_step + 1, filtered, scores, threshold, batch)

    def end_training(self) -> None:
        """Also where it ends in an error."""
        if self.filter_log is not None:
            self.filter_log.write()

    def check_step(self, grad_norm) -> None:
        """Raise for a step that must not be taken, with the state before it saved."""
        trainer = self.trainer
        step = trainer.state.global_step + 1
        may_overflow = trainer.accelerator.scaler is not None
        try:
            self.guard.check(trainer.accelerator, step, None if may_overflow else grad_norm)
        except (NonFiniteLossError, UnreadableDataError) as error:
            self._undo_step(step)
            if self._saved_step != step - 1:
                trainer._save_checkpoint(trainer.model, None)
            raise type(error)(f"{error} The run is saved as it was after step {step - 1}.") from None

    def _undo_step(self, step: int) -> None:
        extras = self.snapshot.put_back()
        self._put_back_averages(extras["averages"])
        self.trainer.current_flos = extras["flos"]
        if self.filter_log is not None:
            self.filter_log.discard_step(step)
