"""`MethodCallback`: what `COTSTrainer` does at the moments of the training loop."""

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from .stream_loading import skip_trained_batches


class MethodCallback(TrainerCallback):
    """The moments of the training loop at which the method has something to do."""

    def __init__(self, trainer):
        self.trainer = trainer
        self._scale: float | None = None
        self._step_of_epoch = 0

    def on_train_begin(self, args, state, control, **kwargs):
        skip_trained_batches(self.trainer.stream_loader, state.global_step, args)
        self.trainer.recovery.begin_training()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # The Trainer's own call does not reach the sampler where a process of several skips batches to resume.
        train_dataloader.set_epoch(int(state.epoch or 0))
        dataset = self.trainer.train_dataset
        if hasattr(dataset, "set_epoch"):  # accelerate's own call does not reach the data set in every launch mode
            dataset.set_epoch(int(state.epoch or 0))
        self.trainer.recovery.begin_epoch()
        self._step_of_epoch = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        """Raises `ValueError` where a run cannot go on: the Trainer would begin the stream again without a word."""
        if state.global_step == self._step_of_epoch > 0 and not has_length(self.trainer.train_dataset):
            raise ValueError(
                f"The stream ended before the batch after step {state.global_step}, so the run cannot go on where it "
                "stopped: a stream of its own kind is resumed within its first pass alone. One of `open_stream` has "
                "no end."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.recovery.begin_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        scaler = self.trainer.accelerator.scaler
        self._scale = None if scaler is None else scaler.get_scale()

    def on_optimizer_step(self, args, state, control, **kwargs):
        # A fused optimizer is called for a step with an overflow too and skips it within, which accelerate does not
        # see: momentum copy and schedule would go on alone (tests/test_numerics.py). That the scale fell tells it.
        if self._scale is not None and self.trainer.accelerator.scaler.get_scale() < self._scale:
            self.trainer.optimizer._is_overflow = True
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.momentum_state.encoder.update_(self.trainer.model.cots, args.momentum)
