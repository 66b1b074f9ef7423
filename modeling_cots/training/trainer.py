"""`COTSTrainer`: collaborative two-stream pre-training (Lu et al., CVPR 2022) on transformers' training loop.

The loss is in `objective.py`. Here is what surrounds it: the momentum encoders and the paired queues, which are built
from the loaded model, saved beside every checkpoint and restored exactly; when they move; schedule, logs, evaluation,
checkpoints, the refusal of a step, and the Hub.
"""

import os
from dataclasses import replace
from functools import partial
from operator import itemgetter

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard, run_as_future
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, get_wsd_schedule
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import HubStrategy, PredictionOutput, has_length
from transformers.utils import logging

from ..data.feature_writing import FeatureDataset
from ..data.pixel_normalization import PixelNormalizer
from ..data.streaming.dataset import PairStream
from ..evaluation.embedding import ExampleRetrievals, PairEmbeddings, embed_pairs, find_examples, measure_retrieval
from ..evaluation.retrieval_metrics import COCO_NUM_FOLDS
from ..hub_export import cots_model_of, export_repository, mark_generated
from ..hub_push import full_repo_id
from ..method.image_tokenizer import ImageTokenizer
from ..method.momentum import MomentumState
from ..modeling_cots_pretraining import COTSForPreTraining
from .adapters import (
    ADAPTER_WEIGHTS_NAME,
    check_adapters,
    export_adapters,
    has_adapters,
    load_adapters_,
    pretraining_model_of,
    save_adapters,
)
from .arguments import ADAM, COTSTrainingArguments
from .cached_features import MeasuredFeatures, choose_features, with_cached_features
from .copied_passes import CopiedPasses, depends_on_batch
from .filter_log import FilterLog
from .finite_check import FiniteCheck, NonFiniteLossError, StepSnapshot, UnreadableDataError
from .frozen_layers import NONE, FrozenEncoders
from .layer_compiling import compile_layers
from .learning_watch import is_recall_chance, loss_warnings, recall_warning
from .log import TrainingLog
from .master_weights import BFLOAT16, OPTIMIZERS, to_bfloat16_
from .objective import COTSObjective
from .processes import (
    ProcessGroup,
    check_not_split_elsewhere,
    destroy_process_group,
    mark_repeated_samples,
    set_timeout,
    share_weights_,
    use_float16_on_cpu,
)
from .publishing import build_card, keep_edited_card, prepare_push, push_in_background, repository_name
from .queue_freshness import QueueFreshness
from .recomputed_activations import recompute_activations_
from .recovery import RunCheckpoints, check_loaded_weights, save_arguments
from .setup import (
    build_training_collator,
    check_batches,
    check_encoder_learning_rate,
    check_measurable,
    check_model,
    check_parts,
    check_searched,
    check_setup,
    choose_image_tokens,
    encoder_parameters,
    first_item,
    freeze_unused_parameters,
    search_measure,
)
from .sharded_state import has_sharded_state, load_sharded_state, remove_sharded_state, save_sharded_state
from .sharding import Sharding, check_shardable, full_tensor, load_whole_
from .short_captions import run_by_length
from .standardization import fit_standardization_, needs_fitting
from .stream_loading import StreamPlace, build_stream_loader, stream_counts

logger = logging.get_logger(__name__)

EARLY_NUM_IMAGES, EARLY_MIN_STEPS = 200, 100


class LoopEvents(TrainerCallback):
    """Answers events of the training loop with the functions that are given, such as `on_step_begin=...`."""

    def __init__(self, **functions):
        self.__dict__.update(functions)


class COTSTrainer(Trainer):
    """
    Trains a [`COTSForPreTraining`] with the four losses of COTS; everything else is `transformers.Trainer`.

    Args:
        model ([`COTSForPreTraining`], *optional*):
            The model, already loaded; with adapters of peft too, wrapped by `get_peft_model` or made by `add_adapter`.
        args ([`COTSTrainingArguments`]): Training arguments.
        train_dataset: Items as `open_pairs` and `ScenesDataset` give them, one item an image; or those of
            `open_videos`, whose embeddings take the place of the images' in losses, queues and momentum copy; or a
            stream of `open_stream`, split among processes and repeated until `max_steps`.
        eval_dataset: Likewise; all captions of an image are its texts.
        processing_class ([`COTSProcessor`]): Image processor and tokenizer; saved with every checkpoint.
        image_tokenizer ([`ImageTokenizer`], *optional*):
            Gives the visual tokens that masked vision modeling predicts. Required unless `cmvm_weight` is 0 or
            `train_dataset` brings them along (`examples/tokenize_images.py`); then it is only checked against those.
        max_text_length (`int`, defaults to 64): Captions are cut to so many tokens.
        eval_protocol (`str`, *optional*): One of `PROTOCOLS`, by which `eval_dataset` is measured.
        data_collator (*optional*): Replaces [`COTSDataCollator`] in training.
        model_init (*optional*): A function that makes the model, in place of `model`: every call of `train` begins
            with a new one, and `hyperparameter_search` needs it. It may take the trial as its argument.

    Raises `ValueError` at construction for a model, tokenizer or launch mode that the method cannot work with.
    """

    # The losses are means over the batch: the Trainer divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: COTSForPreTraining | None = None,
        args: COTSTrainingArguments | None = None,
        *,
        image_tokenizer: ImageTokenizer | None = None,
        max_text_length: int = 64,
        eval_protocol: str | None = None,
        data_collator=None,
        processing_class=None,
        model_init=None,
        **kwargs,
    ):
        check_setup(args, processing_class)
        assert args is not None  # `check_setup` refuses it
        check_parts(args, {**kwargs, "model_init": model_init})
        if (model is None) == (model_init is None):
            raise ValueError("COTSTrainer needs a model, or model_init, which makes one: give one of the two.")
        self.args: COTSTrainingArguments = args
        self.processing_class, self.train_dataset = processing_class, kwargs.get("train_dataset")
        self.max_text_length = max_text_length
        self.eval_protocol = eval_protocol
        self.example_retrievals: ExampleRetrievals | None = None  # of the last evaluation, to be shown
        self._given_image_tokenizer, self._given_collator = image_tokenizer, data_collator
        if model is not None:
            self._check_model(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            processing_class=processing_class,
            model_init=model_init,
            **kwargs,
        )
        check_not_split_elsewhere(self.is_fsdp_enabled or self.is_deepspeed_enabled)
        set_timeout(args)
        self.pixel_normalizer = PixelNormalizer(processing_class).to(args.device)
        self._build_method()
        self._warned_of: set[str] = set()
        self.recall_is_chance: bool | None = None  # of the last evaluation; None where that cannot be told
        self.stream_loader = None
        self.stream_place: StreamPlace | None = None  # within `train`
        self.filter_log = None if args.filter_log is None else FilterLog(args.filter_log, args.process_index)
        self.checkpoints = RunCheckpoints(args, self.accelerator)
        self._scale_before_step: float | None = None
        self._first_step_of_epoch = 0
        self._answer_events()

    def _check_model(self, model: COTSForPreTraining) -> None:
        """Raise `ValueError` for a model that cannot be trained; find where its image tokens come from."""
        check_model(model, self.processing_class)
        self._token_source, self.image_tokenizer = choose_image_tokens(
            self.train_dataset,
            pretraining_model_of(model),
            self.args,
            self._given_image_tokenizer,
            has_own_collator=self._given_collator is not None,
        )

    def _build_method(self) -> None:
        """What belongs to one model and the arguments as they are: its collator, momentum copy, queues and losses."""
        args, model = self.args, pretraining_model_of(self.model)
        share_weights_(self.model, args)  # before anything is made of them, as the momentum copy is
        self._find_features(model)
        if self._given_collator is None:
            self.data_collator = build_training_collator(
                self.train_dataset,
                model.config,
                args,
                self.processing_class,
                self.max_text_length,
                self._token_source,
                self.features,
            )
        freeze_unused_parameters(model, args)
        self.frozen = FrozenEncoders(model.cots, args.freeze_vision, args.freeze_text)
        check_encoder_learning_rate(model, args)
        self._tell_what_is_frozen()
        self._fit_standardization()
        check_adapters(self.model)
        if args.param_dtype == BFLOAT16:
            if has_adapters(self.model):
                raise ValueError("param_dtype=bfloat16 was never tried beside adapters: leave one of them out.")
            to_bfloat16_(model)
        self.sharding = self._prepare_sharding()
        self.momentum_state = MomentumState(model.cots, args.queue_size).to(args.device)
        self.queue = self.momentum_state.queue
        if self.image_tokenizer is not None:
            self.image_tokenizer.to(args.device)
        if args.compile_layers:
            compile_layers(model)
            compile_layers(self.momentum_state.encoder)
        if args.recompute_activations:
            recompute_activations_(model)
        self.encoders_by_length = self._encoders_by_length()
        self.copied_passes = CopiedPasses(model.cots, self._has_copy, self.frozen)
        if self.sharding is not None:
            self.momentum_state.encoder.separate_all_(model.cots)
            self.sharding.shard_(model, self.momentum_state.encoder.model)
            # Prepared here, as the Trainer's own call would add data parallelism to it.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        self.cots_objective = COTSObjective(
            model,
            self.momentum_state.encoder.model,
            self.queue,
            self.image_tokenizer,
            args,
            self._process_group(),
            self.frozen,
            self.copied_passes,
        )
        self.training_log = TrainingLog()
        self.queue_freshness = QueueFreshness(self.cots_objective)
        self.finite_check = FiniteCheck(args.max_skipped_fraction)
        self.step_snapshot = StepSnapshot(self.queue, args.device)

    def _process_group(self) -> ProcessGroup:
        """Momentum encoders, whose weights are float32, run in bfloat16 beside a model whose weights are."""
        processes = ProcessGroup.of(self.accelerator)
        if self.args.param_dtype == BFLOAT16:
            processes = replace(processes, autocast=partial(torch.autocast, self.args.device.type, torch.bfloat16))
        return processes

    def _encoders_by_length(self) -> list[torch.nn.Module]:
        """Text encoders that run in groups: on a CPU, where no part of them has to see the whole batch at once."""
        args = self.args
        others = args.freeze_text != NONE, args.shard_model, args.torch_compile, args.neftune_noise_alpha
        if args.device.type != "cpu" or any(others):
            return []
        models = pretraining_model_of(self.model).cots, self.momentum_state.encoder.model
        return [model.text_model for model in models if not depends_on_batch(model.text_model)]

    def _has_copy(self) -> bool:
        """Whether the momentum copy is the online model now; hooks that look at it would split a compiled model."""
        is_plain = not self.args.torch_compile and self.sharding is None
        return self.momentum_state.encoder.is_copy and is_plain

    def _prepare_sharding(self) -> Sharding | None:
        """With `shard_model`: what will split the weights; they are still whole."""
        if not self.args.shard_model:
            return None
        if self.features:
            raise ValueError(
                "Encoders whose features are cached do not run, so there is nothing to split: leave shard_model out."
            )
        check_shardable(self.model)
        return Sharding(self.args)

    def _whole_model(self, *, everywhere: bool = False) -> COTSForPreTraining | None:
        """
        The model with all of its weights; every process must call this.

        One that is split is put together on the processes that save, on their CPUs, and the others get `None`; or
        `everywhere`, on their devices.
        """
        if self.sharding is None:
            return self.model
        device = self.args.device if everywhere else "cpu"
        return self.sharding.gather(self.model, keep=everywhere or self.args.should_save, device=device)

    def _find_features(self, model: COTSForPreTraining) -> None:
        """Cached features of encoders that are frozen whole: in `feature_cache`, or columns of the data already."""
        args, has_own_collator = self.args, self._given_collator is not None
        if args.feature_cache is not None and has_own_collator:
            raise ValueError("A custom data_collator knows of no cached features: leave it out, or feature_cache.")
        parts = model.cots, args, self.processing_class, self.max_text_length
        self.train_dataset, self.eval_dataset = with_cached_features(*parts, self.train_dataset, self.eval_dataset)
        is_looked_at = not has_own_collator and not isinstance(self.train_dataset, PairStream)
        self.features = choose_features(first_item(self.train_dataset) if is_looked_at else {}, *parts)
        self.measured_features = MeasuredFeatures(*parts)

    def call_model_init(self, trial=None) -> COTSForPreTraining:
        model = super().call_model_init(trial)
        self._check_model(model)
        return model

    def _hp_search_setup(self, trial) -> None:
        """At the start of every `train`: what `model_init` made is another model, and a trial has other arguments."""
        if trial is not None:
            check_searched(trial if isinstance(trial, dict) else self.hp_space(trial))
        super()._hp_search_setup(trial)
        if self.model_init is None:  # what was frozen when the trainer was made may train now
            self.momentum_state.encoder.separate_(pretraining_model_of(self.model).cots)
            return
        self.args.check()
        self._check_model(self.model)
        self._build_method()

    def hyperparameter_search(
        self, hp_space=None, compute_objective=None, n_trials: int = 20, direction=None, **options
    ):
        """
        As the base class does, on models of `model_init`; the names of a search space are those of the arguments.

        Without `compute_objective`, trials are compared by `metric_for_best_model`, or by the sum of recalls, and the
        direction follows from it. Trials run one after another, as they share this trainer. Raises `ValueError`
        without `model_init` or `eval_dataset`, for another direction, and for names and values that no run could use.
        """
        if self.model_init is None:
            raise ValueError(
                "A search makes a new model in every trial: give COTSTrainer model_init in place of model."
            )
        if self.eval_dataset is None:
            raise ValueError("COTSTrainer needs an eval_dataset to compare trials by.")
        if options.get("n_jobs", 1) != 1:
            raise ValueError(f"The trials of one trainer run one after another: leave n_jobs={options['n_jobs']} out.")
        if compute_objective is None:
            measure, best = search_measure(self.args, self.eval_dataset)
            if direction not in (None, best):
                raise ValueError(f"{measure} is to be {best}d: leave direction={direction} out.")
            direction, compute_objective = best, itemgetter(measure)
        return super().hyperparameter_search(
            hp_space, compute_objective, n_trials, "minimize" if direction is None else direction, **options
        )

    def _tell_what_is_frozen(self) -> None:
        frozen = self.frozen.describe()
        if frozen is not None and self.is_world_process_zero():
            parameters = list(self.model.parameters())
            num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            total = sum(parameter.numel() for parameter in parameters)
            logger.warning(f"Frozen: {frozen}. {num_trained:,} of {total:,} weights train.")

    def _fit_standardization(self) -> None:
        """Of a new model, before it is copied; every process does the same, and a resumed run loads what it was."""
        cots = pretraining_model_of(self.model).cots
        if self.train_dataset is not None and needs_fitting(cots):
            fit_standardization_(
                cots,
                self.train_dataset,
                self.processing_class,
                batch_size=self.args.eval_batch_size,
                max_text_length=self.max_text_length,
                num_workers=self.args.dataloader_num_workers,
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
                features=self.features,
            )

    def _answer_events(self) -> None:
        self.add_callback(
            LoopEvents(
                on_train_begin=self._begin_training,
                on_epoch_begin=self._begin_epoch,
                on_epoch_end=self._end_epoch,
                on_step_begin=self._begin_step,
                on_step_end=self._evaluate_early,
                on_pre_optimizer_step=self._note_scale,
                on_optimizer_step=self._update_momentum_encoders,
            )
        )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        use_float16_on_cpu(self.accelerator)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train as `transformers.Trainer` does.

        Args:
            resume_from_checkpoint: A checkpoint folder; "latest" for the newest whole checkpoint of `output_dir`, or a
                new run where there is none; `True` likewise, but there must be one.

        Raises `ValueError` for a folder that is no whole checkpoint, and while another run trains into `output_dir`.
        """
        with self.checkpoints.lock():
            is_stream = isinstance(self.train_dataset, PairStream)
            checkpoint = self.checkpoints.choose(resume_from_checkpoint, of_stream=is_stream)
            self._find_stream_place(checkpoint)
            try:
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
            except KeyboardInterrupt:
                if self.is_world_process_zero():
                    logger.warning(
                        f"Training was stopped after step {self.state.global_step}. {self.checkpoints.how_to_go_on()}"
                    )
                raise
            finally:
                if self.filter_log is not None:
                    self.filter_log.write()

    def _find_stream_place(self, checkpoint: str | None) -> None:
        self.stream_place = None
        if isinstance(self.train_dataset, PairStream):
            self.stream_place = StreamPlace(self.train_dataset, self.args)
            if checkpoint is not None and not self.args.ignore_data_skip:
                self.stream_place.load(checkpoint)

    def end(self) -> None:
        """
        Destroy the process group. Every process calls it last: afterwards the trainer cannot train, evaluate or save.

        One of several processes that ends without this call may be aborted on its way out.
        """
        self.model_wrapped = self.model  # the wrapped model holds the process group
        if self.sharding is not None:
            self.sharding.release_processes(self.model)
        destroy_process_group(self.accelerator)

    def get_train_dataloader(self):
        """Batches of this process; those of a stream never end."""
        if not isinstance(self.train_dataset, PairStream):
            if has_length(self.train_dataset) and len(self.train_dataset) == 0:
                raise ValueError("There are no images to make a batch of: the training data is empty.")
            loader = super().get_train_dataloader()
            check_batches(loader, self.train_dataset, self.args)
            return loader
        self.stream_loader = build_stream_loader(self.train_dataset, self.args, self.data_collator)
        return self.stream_loader

    # ------------------------------------------------------------------------------------------- one training step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: the Trainer would take one step more
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.stream_place is not None:
            self.stream_place.add(batches)
        if self.args.world_size > 1 and batches and self.accelerator.gradient_state.end_of_dataloader:
            global_batch_size = len(batches[-1]["valid"]) * self.args.world_size
            if has_length(self.train_dataset) and not self.args.dataloader_drop_last:
                num_real = len(self.train_dataset) % global_batch_size
            else:
                num_real = max(0, self.accelerator.gradient_state.remainder)
            mark_repeated_samples(batches[-1], num_real, self.args.process_index)
        return batches, num_items

    def _prepare_inputs(self, inputs: dict) -> dict:
        return self.pixel_normalizer(super()._prepare_inputs(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch, by [`COTSObjective`]; in training its pairs are checked, logged and queued."""
        if model.training:
            self.frozen.eval_()
        with run_by_length(self.encoders_by_length):
            result = self.cots_objective(model, inputs, self.state.global_step)
        self.training_log.add(result, self.queue)
        if model.training:
            self.finite_check.add(result.losses, result.logits, inputs)
            if self.filter_log is not None:
                self.filter_log.add(self.state.global_step + 1, result, inputs)
            self.queue_freshness.add(inputs, result)
            self.cots_objective.push(result)
        return (result.loss, result.model_output) if return_outputs else result.loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = full_tensor(super()._get_grad_norm(model, grad_norm))
        self.check_step(grad_norm)
        return grad_norm

    def check_step(self, grad_norm: torch.Tensor | float | None) -> None:
        """
        Between the backward passes of a step and the optimizer: refuse a step that must not be taken.

        Raises [`NonFiniteLossError`] or [`UnreadableDataError`], on every process, with the state before it saved.
        """
        step = self.state.global_step + 1
        may_overflow = self.accelerator.scaler is not None
        try:
            self.finite_check.check(self.accelerator, step, None if may_overflow else grad_norm)
        except (NonFiniteLossError, UnreadableDataError) as error:
            self._undo_step(step)
            if self.checkpoints.saved_step != step - 1:
                self._save_checkpoint(self.model, None)
            raise type(error)(f"{error} The run is saved as it was after step {step - 1}.") from None

    def _undo_step(self, step: int) -> None:
        extras = self.step_snapshot.put_back()
        self._load_averages(extras["averages"])
        self.current_flos = extras["flos"]
        if self.stream_place is not None:
            self.stream_place.undo()
        if self.filter_log is not None:
            self.filter_log.discard_step(step)

    # ------------------------------------------------------------------------------------------- events of the loop

    def _begin_training(self, args, state, control, **kwargs) -> None:
        if self.stream_place is not None and not args.ignore_data_skip:
            # So many batches the Trainer reads and throws away; these are empty, and cost nothing.
            self.stream_place.go_on(self.stream_loader, state.global_step * args.gradient_accumulation_steps)
        self.checkpoints.saved_step = None
        self._warned_of = set()
        self.momentum_state.encoder.check_copy_(pretraining_model_of(self.model).cots)
        if self.checkpoints.resumed_from is not None:
            self._resume_averages()
            self.checkpoints.saved_step = state.global_step
        if self.filter_log is not None:
            restart = [self.filter_log.next_restart()]
            if args.world_size > 1:
                broadcast_object_list(restart)
            self.filter_log.start(restart[0], state.global_step)

    def _begin_epoch(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        # The Trainer's own call does not reach the sampler where a process of several skips batches to resume.
        train_dataloader.set_epoch(int(state.epoch or 0))
        if hasattr(self.train_dataset, "set_epoch"):  # nor does accelerate's reach the data set in every launch mode
            self.train_dataset.set_epoch(int(state.epoch or 0))
        self.step_snapshot.take_generators()
        self._first_step_of_epoch = state.global_step

    def _end_epoch(self, args, state, control, **kwargs) -> None:
        """Raises `ValueError` where data end too early: the Trainer would begin again, or end without a step."""
        if state.global_step == 0:
            raise ValueError("No step was taken: the training data gave no batch.")
        is_done = state.global_step >= state.max_steps
        if state.global_step == self._first_step_of_epoch and not is_done and not has_length(self.train_dataset):
            raise ValueError(
                f"The stream ended before the batch after step {state.global_step}, so the run cannot go on where it "
                "stopped: a custom iterable data set is resumed within its first pass alone. One of `open_stream` "
                "has no end."
            )

    def _begin_step(self, args, state, control, **kwargs) -> None:
        # The first step of an epoch begins before its data loader, which draws a random number too.
        if not float(state.epoch or 0).is_integer():
            self.step_snapshot.take_generators()
        self.step_snapshot.take(averages=self._averages(), flos=self.current_flos)
        self.finite_check.begin_step()

    def _note_scale(self, args, state, control, **kwargs) -> None:
        scaler = self.accelerator.scaler
        self._scale_before_step = None if scaler is None else scaler.get_scale()

    def _update_momentum_encoders(self, args, state, control, **kwargs) -> None:
        """Once per optimizer step, after it: theta_m <- m * theta_m + (1 - m) * theta."""
        # A fused optimizer is called for a step with an overflow too and skips it within, which accelerate does not
        # see: momentum copy and schedule would go on alone (tests/training/test_numerics.py). A fallen scale tells.
        if self._scale_before_step is not None and self.accelerator.scaler.get_scale() < self._scale_before_step:
            self.optimizer._is_overflow = True
        if self.sharding is not None:
            self.sharding.end_momentum_passes()
        if not self.accelerator.optimizer_step_was_skipped:
            self.momentum_state.encoder.update_(pretraining_model_of(self.model).cots, self.cots_objective.momentum())

    # ------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what happened since the last log to the Trainer's own line of training logs."""
        if "loss" in logs:
            # The history survives a resumed run, so the count goes on where it stopped.
            counts = [entry["skipped_images"] for entry in self.state.log_history if "skipped_images" in entry]
            method_logs = self.training_log.drain(self.accelerator, skipped_before=counts[-1] if counts else 0)
            if (freshness := self.queue_freshness.drain(self.accelerator)) is not None:
                method_logs["queue_freshness"] = freshness
            logs = {**logs, **method_logs, **stream_counts(self.stream_loader, self.accelerator)}
            self._warn_of_losses({**logs, "step": self.state.global_step})
        super().log(logs, start_time)

    def _warn_of_losses(self, line: dict[str, float]) -> None:
        """Each kind of warning is given once in a call of `train`."""
        lines = [entry for entry in [*self.state.log_history, line] if "chance_loss" in entry]
        for kind, warning in loss_warnings(lines, self.state.max_steps).items():
            if kind not in self._warned_of:
                self._warned_of.add(kind)
                logger.warning(warning)

    def _averages(self) -> dict[str, torch.Tensor]:
        """Copies of what this process has summed up since the last line of logs, the Trainer's own loss included."""
        own = {**self.training_log.state_dict(), **self.queue_freshness.state_dict()}
        return {**own, "loss": self._tr_loss.clone()}

    def _load_averages(self, averages: dict[str, torch.Tensor]) -> None:
        self._tr_loss = averages["loss"]
        self.training_log.load_state_dict(averages)
        self.queue_freshness.load_state_dict(averages)

    def _resume_averages(self) -> None:
        averages = self.checkpoints.load_averages()
        if averages is None:
            return
        self._load_averages(averages)
        # What the Trainer reports for this call of `train` are the steps of this call.
        self._total_loss_scalar -= float(averages["loss"])
        logged = [entry["step"] for entry in self.state.log_history if "loss" in entry]
        self._globalstep_last_logged = logged[-1] if logged else 0

    # ------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Retrieval in both directions over the whole evaluation set; see `retrieval_metrics.py` for the measures.

        Of several in `eval_dataset`, a name takes one. Raises `ValueError` for what is no data set of pairs.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict) and dataset in self.eval_dataset:
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise ValueError("COTSTrainer needs an eval_dataset to evaluate.")
        if isinstance(dataset, dict):
            results = {}
            for name, part in dataset.items():
                results.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return results
        embeds = self._embed(dataset)
        metrics = self._measure(embeds, self.eval_protocol)
        self._warn_of_recall(metrics, embeds)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.example_retrievals = find_examples(embeds)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_early(self, args, state, control, **kwargs) -> None:
        """After a tenth of a run, on a few held-out pairs: a run that does not learn should say so before its end."""
        dataset = self.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()), None)
        if dataset is None or state.max_steps < EARLY_MIN_STEPS or state.global_step != state.max_steps // 10:
            return
        embeds = self._embed(Subset(dataset, range(min(EARLY_NUM_IMAGES, len(dataset)))), progress=False)
        metrics = self._measure(embeds)
        self._warn_of_recall(metrics, embeds, is_early=True)
        self.log({f"early_{name}": value for name, value in metrics.items()})

    def _warn_of_recall(self, metrics: dict[str, float], embeds: PairEmbeddings, *, is_early: bool = False) -> None:
        num_folds = COCO_NUM_FOLDS if self.eval_protocol == "coco-1k" and not is_early else 1
        num_images, num_captions = len(embeds.image_ids) // num_folds, len(embeds.text_ids) // num_folds
        is_chance = is_recall_chance(metrics, num_images, num_captions)
        if not is_early:
            self.recall_is_chance = is_chance
        kind = "early" if is_early else "recall"
        if is_chance and kind not in self._warned_of and self.is_world_process_zero():
            self._warned_of.add(kind)
            lines = [entry for entry in self.state.log_history if "chance_loss" in entry]
            line = lines[-1] if lines else None
            logger.warning(recall_warning(metrics, num_images, line, is_early=is_early))

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """
        The embeddings of a data set, and retrieval measured among them.

        Returns a `PredictionOutput` of arrays: `predictions` are the unit-length embeddings of its N images (N, d) and
        its C captions (C, d), `label_ids` their pair ids (N,) and (C,), equal where they belong together. Images that
        cannot be read are left out, with their captions.
        """
        embeds = self._embed(test_dataset)
        given = self.eval_dataset.dataset if isinstance(self.eval_dataset, FeatureDataset) else self.eval_dataset
        is_own = test_dataset is self.eval_dataset or test_dataset is given
        protocol = self.eval_protocol if is_own else None
        measured = self._measure(embeds, protocol)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(
            predictions=(embeds.image_embeds.numpy(), embeds.text_embeds.numpy()),
            label_ids=(embeds.image_ids.numpy(), embeds.text_ids.numpy()),
            metrics=metrics,
        )

    def _embed(self, dataset, *, progress: bool = True) -> PairEmbeddings:
        """With the cached features that the data set has, where they are those of an encoder that does not train."""
        check_measurable(dataset)
        return embed_pairs(
            pretraining_model_of(self._whole_model(everywhere=True)).cots,
            dataset,
            self.processing_class,
            self.accelerator,
            batch_size=self.args.eval_batch_size,
            max_text_length=self.max_text_length,
            num_workers=self.args.dataloader_num_workers,
            progress=progress and not self.args.disable_tqdm,
            features=self.measured_features.of(first_item(dataset)),
        )

    def _measure(self, embeds: PairEmbeddings, protocol: str | None = None) -> dict[str, float]:
        return measure_retrieval(embeds, protocol, self.accelerator, progress=not self.args.disable_tqdm)

    # ------------------------------------------------------------------------------------------- schedule and state

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As the base class; `adam` is torch's Adam, with the arguments of AdamW; see `master_weights.py`, too."""
        if args.optim == ADAM:
            betas = (args.adam_beta1, args.adam_beta2)
            chosen = torch.optim.Adam, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        else:
            chosen = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return (OPTIMIZERS[args.optim], chosen[1]) if args.param_dtype == BFLOAT16 else chosen

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the base class; with `encoder_learning_rate`, the encoders' weights of each group are in another one."""
        is_new, rate = self.optimizer is None, self.args.encoder_learning_rate
        optimizer = super().create_optimizer(model)
        if not is_new or rate is None:
            return optimizer
        of_encoders = {id(parameter) for parameter in encoder_parameters(self.model)}
        for group in list(optimizer.param_groups):
            parameters = group["params"]
            group["params"] = [parameter for parameter in parameters if id(parameter) not in of_encoders]
            moved = [parameter for parameter in parameters if id(parameter) in of_encoders]
            if moved:
                optimizer.add_param_group({**group, "params": moved, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """
        With `lr_hold_epochs`: warm-up, a constant learning rate for that long, then linear decay to zero.

        The paper: "5e-5 for the first epochs, then linear decay over the rest".
        """
        if self.args.lr_hold_epochs == 0 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        num_warmup_steps = self.args.get_warmup_steps(num_training_steps)
        hold_share = self.args.lr_hold_epochs / self._num_epochs(num_training_steps)
        decay_from = min(max(num_warmup_steps, round(hold_share * num_training_steps)), num_training_steps)
        self.lr_scheduler = get_wsd_schedule(
            self.optimizer if optimizer is None else optimizer,
            num_warmup_steps=num_warmup_steps,
            num_stable_steps=max(0, decay_from - num_warmup_steps),
            num_decay_steps=num_training_steps - decay_from,
            decay_type="linear",
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _num_epochs(self, num_training_steps: int) -> float:
        """Epochs of the run; of a stream, all steps together stand for `num_train_epochs`."""
        args = self.args
        if args.max_steps <= 0 or isinstance(self.train_dataset, PairStream):
            return args.num_train_epochs
        steps_per_epoch = -(-len(self.get_train_dataloader()) // args.gradient_accumulation_steps)
        return num_training_steps / max(1, steps_per_epoch)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self._whole_model()
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        self._save_weights(model, output_dir, state_dict)
        self.processing_class.save_pretrained(output_dir)
        save_arguments(self.args, output_dir)

    def _save_weights(self, model, output_dir: str, state_dict: dict | None) -> None:
        """The model; of one with adapters, these alone."""
        if has_adapters(model):
            save_adapters(model, output_dir)
            return
        # Checkpoints keep the names of the running model: Trainer resumes with `load_state_dict(strict=False)`, to
        # which the legacy names that `save_pretrained` writes by default are unknown, so that the vision encoder would
        # keep its fresh weights with no more than a warning (tests/training/test_resume.py).
        model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)

    def _save_checkpoint(self, model, trial) -> None:
        if self.filter_log is not None:
            self.filter_log.write()
        output_dir = self._get_output_dir(trial)
        with self.checkpoints.write(output_dir, self.state.global_step):
            super()._save_checkpoint(model, trial)
        self.checkpoints.rotate(output_dir, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.checkpoints.save_averages(output_dir, self._averages())
        if self.stream_place is not None:
            self.stream_place.save(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.step_snapshot.take_generators()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.sharding is not None:
            self._issue_warnings_after_load(load_whole_(self.model, resume_from_checkpoint))
            return
        if has_adapters(self.model):
            load_adapters_(self.model, resume_from_checkpoint)
            return
        if os.path.isfile(os.path.join(resume_from_checkpoint, ADAPTER_WEIGHTS_NAME)):
            raise ValueError(
                f"{resume_from_checkpoint} holds adapters, and this model has none: give the model the same adapters."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.sharding is not None:
            self._issue_warnings_after_load(load_whole_(self.model, self.state.best_model_checkpoint))
            return
        if not has_adapters(self.model):
            super()._load_best_model()
            return
        load_adapters_(self.model, self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        check_loaded_weights(load_result, self.model._tied_weights_keys)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is not None:
            save_sharded_state(output_dir, self.model, self.optimizer, self.momentum_state)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
            return
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            remove_sharded_state(output_dir)
            self.momentum_state.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (self.sharding is None and not has_sharded_state(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.momentum_state.load(checkpoint)
            return
        load_sharded_state(checkpoint, self.model, self.optimizer, self.momentum_state)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))

    # ------------------------------------------------------------------------------------------- the Hub

    def export_model(self, output_dir: str) -> None:
        """
        Write a complete Hub repository of the [`COTSModel`], with the card of this run (`hub_export.py`).

        Adapters are merged into the weights; `export_adapters` writes them apart.
        """
        pretraining_model_of(self.model)  # there is none after a search
        model = self._whole_model()
        if self.args.should_save:
            with self.checkpoints.explaining_storage(output_dir):
                keep_edited_card(output_dir)
                self._write_repository(model, output_dir)

    def export_adapters(self, output_dir: str) -> None:
        """
        Write the active adapter as peft does, to be loaded onto a [`COTSModel`] of the same encoders.

        Raises `ValueError` for a model without adapters.
        """
        if not has_adapters(self.model):
            raise ValueError("This model has no adapters to export: export_model writes all of its weights.")
        if self.args.should_save:
            export_adapters(self.model, output_dir)

    def _write_repository(self, model, folder: str) -> None:
        model = cots_model_of(model)
        export_repository(model, self.processing_class, folder, card=mark_generated(self._build_card(model, folder)))

    def _build_card(self, model, folder: str) -> ModelCard:
        return build_card(
            model,
            self.processing_class,
            folder,
            args=self.args,
            state=self.state,
            train_dataset=self.train_dataset,
            eval_dataset=self.eval_dataset,
            eval_protocol=self.eval_protocol,
            model_name=self.hub_model_id,
        )

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **options
    ):
        """
        Push what `export_model` writes to `args.hub_model_id`, or to a repository named as the output folder.

        Returns the `CommitInfo`, without `blocking` a `Future` of it, and `None` on all processes but the first.
        `options` are `tag` and `overwrite_card`; for these, and for what is raised, see `push_folder`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        model = self._whole_model()
        if not self.is_world_process_zero():
            return None
        args = self.args
        token = args.hub_token if token is None else token
        if self.hub_model_id is None:  # else the Trainer has made the repository at its start
            self.hub_model_id = full_repo_id(repository_name(args), token)
        self._finish_current_push()
        push = prepare_push(
            partial(self._write_repository, model),
            self.hub_model_id,
            token=token,
            revision=args.hub_revision if revision is None else revision,
            private=args.hub_private_repo if private is None else private,
            commit_message=commit_message,
            **options,
        )
        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push in the background, unless an earlier push is under way (or `hub_always_push` is set)."""
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        model = self._whole_model()
        if not self.is_world_process_zero():
            return
        earlier = self.push_in_progress
        if earlier is not None and not earlier.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        push = prepare_push(
            partial(self._write_repository, model),
            self.hub_model_id,
            revision=args.hub_revision,
            token=args.hub_token,
            commit_message=f"Training in progress, step {self.state.global_step}",
        )
        self.push_in_progress = push_in_background(push, earlier)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write our card; the Trainer calls this when it pushes, and its own would overwrite ours."""
        model = self._whole_model()
        if self.is_world_process_zero():
            folder = self.args.output_dir
            self._build_card(cots_model_of(model), folder).save(os.path.join(folder, "README.md"))
