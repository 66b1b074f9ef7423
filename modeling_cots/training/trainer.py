"""`COTSTrainer`: collaborative two-stream pre-training (Lu et al., CVPR 2022) on transformers' training loop.

`compute_loss` reads like the method: encode, momentum-encode, gather, filter, four losses, push. The momentum
copy and the paired queues live here and not in the model: they are built from the loaded model, saved beside every
checkpoint and restored exactly. The formulas are in `losses.py`, `filtering.py`, `feature_queue.py`, `momentum.py`.
"""

import os

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from ..data.pixel_normalization import PixelNormalizer
from ..data.streaming.dataset import StreamingPairs
from ..evaluation.embedding import embed_pairs, find_examples, measure_retrieval
from ..method.filtering import adaptive_momentum_filter
from ..method.image_tokenizer import ImageTokenizer
from ..method.losses import (
    excluded_candidates,
    masked_token_loss,
    momentum_contrastive_loss,
    queue_logits,
    task_kl_loss,
)
from ..method.momentum import MomentumState
from ..modeling_cots_pretraining import COTSForPreTraining
from .arguments import COTSTrainingArguments
from .layer_compiling import compile_layers
from .log import CollapseWatch, TrainingLog
from .publishing import build_card, export_trained, push_trained, push_while_training
from .recovery import Recovery
from .setup import (
    build_training_collator,
    check_setup,
    freeze_unused_parameters,
    leave_launch,
    mark_repeated_samples,
    settle_image_tokens,
    settle_launch,
    use_float16_on_cpu,
    with_image_tokens,
)
from .stream_loading import build_stream_loader, stream_counts
from .training_callback import MethodCallback
from .training_schedule import schedule_of

logger = logging.get_logger(__name__)


class COTSTrainer(Trainer):
    """
    Trains a [`COTSForPreTraining`] with the four losses of COTS; everything else is `transformers.Trainer`.

    Args:
        model ([`COTSForPreTraining`]): The model, already loaded.
        args ([`COTSTrainingArguments`]): Training arguments.
        train_dataset: Items as `open_pairs` and `ScenesDataset` give them, one item an image; or those of
            `open_videos`, whose embeddings take the place of the images' in losses, queues and momentum copy; or a
            stream of `open_stream`, split among processes and repeated until `max_steps`.
        eval_dataset: Likewise; all captions of an image are its texts.
        processing_class ([`COTSProcessor`]): Image processor and tokenizer; saved with every checkpoint.
        image_tokenizer ([`ImageTokenizer`], *optional*):
            Gives the visual tokens that masked vision modelling predicts. Required unless `cmvm_weight` is 0 or
            `train_dataset` brings them along (`examples/tokenize_images.py`); then it is only checked against those.
        max_text_length (`int`, defaults to 64): Captions are cut to so many tokens.
        eval_protocol (`str`, *optional*): One of `PROTOCOLS`, by which `eval_dataset` is measured.
        data_collator (*optional*): Replaces [`COTSDataCollator`] in training.

    Raises `ValueError` at construction for a model, tokenizer or launch mode that the method cannot work with.
    """

    # The losses are means over the batch: the Trainer divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: COTSForPreTraining,
        args: COTSTrainingArguments,
        *,
        image_tokenizer: ImageTokenizer | None = None,
        max_text_length: int = 64,
        eval_protocol: str | None = None,
        data_collator=None,
        processing_class=None,
        **kwargs,
    ):
        check_setup(model, args, processing_class)
        token_source, image_tokenizer = settle_image_tokens(
            kwargs.get("train_dataset"), model, args, image_tokenizer, has_own_collator=data_collator is not None
        )
        self.max_text_length = max_text_length
        self.eval_protocol = eval_protocol
        self.example_retrievals = None  # of the last evaluation, to be shown
        if data_collator is None:
            data_collator = build_training_collator(
                kwargs.get("train_dataset"), model.config, args, processing_class, max_text_length, token_source
            )
        super().__init__(
            model=model, args=args, data_collator=data_collator, processing_class=processing_class, **kwargs
        )
        settle_launch(self)
        freeze_unused_parameters(model, args)
        self.momentum_state = MomentumState(model.cots, args.queue_size).to(args.device)
        self.queue = self.momentum_state.queue
        self.image_tokenizer = None if image_tokenizer is None else image_tokenizer.to(args.device)
        self.pixel_normalizer = PixelNormalizer(processing_class).to(args.device)
        if args.compile_layers:
            compile_layers(model)
            compile_layers(self.momentum_state.encoder)
        self.training_log = TrainingLog()
        self.collapse_watch = CollapseWatch(args)
        self.stream_loader = None
        self.recovery = Recovery(self)
        self.add_callback(MethodCallback(self))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        use_float16_on_cpu(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train as `transformers.Trainer` does; "latest" goes on from the whole checkpoint of `output_dir` that was
        written last, or begins where there is none. Raises `ValueError` for a checkpoint that is not whole.
        """
        checkpoint = self.recovery.choose_checkpoint(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.recovery.end_training()

    def end(self) -> None:
        """
        The last call of a script, on every process: after it they cannot train, evaluate or save together any more.
        A process of several that ends without it may be aborted on its way out.
        """
        leave_launch(self)

    def get_train_dataloader(self):
        """Batches of this process; of a stream without end."""
        if not isinstance(self.train_dataset, StreamingPairs):
            return super().get_train_dataloader()
        self.stream_loader = build_stream_loader(self.train_dataset, self.args, self.data_collator)
        return self.stream_loader

    # ------------------------------------------------------------------------------------------- one training step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        mark_repeated_samples(self, batches)
        return batches, num_items

    def _prepare_inputs(self, inputs: dict) -> dict:
        return self.pixel_normalizer(super()._prepare_inputs(inputs))

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.recovery.check_step(grad_norm)
        return grad_norm

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of COTS of one batch: w_mcl L_MCL + w_kl L_KL + w_cmvm L_CMVM + w_cmlm L_CMLM."""
        args = self.args
        inputs = with_image_tokens(inputs, self.image_tokenizer, self.model.config.patch_size)
        outputs = model(**self._model_inputs(inputs))
        momentum_image_embeds, momentum_text_embeds = self._momentum_encode(inputs)

        # Everything below is about the global batch: equal shapes are gathered from every process, then filtered.
        everyone = self._gather(
            image_embeds=momentum_image_embeds,
            text_embeds=momentum_text_embeds,
            pair_ids=inputs["pair_ids"],
            valid=inputs["valid"],
        )
        scores = (everyone["image_embeds"] * everyone["text_embeds"]).sum(dim=-1)
        keep, threshold = self._filter(scores, everyone["valid"])
        mine = self._my_rows(len(inputs["valid"]))
        # Processes average their gradients, so a sum over my pairs over this number is the mean over all pairs.
        num_kept = keep.sum() / args.world_size

        logits_i2t, logits_t2i = self._contrast(outputs, everyone, mine)
        losses = {
            "loss_i2t": momentum_contrastive_loss(logits_i2t, keep[mine], num_kept),
            "loss_t2i": momentum_contrastive_loss(logits_t2i, keep[mine], num_kept),
        }
        with torch.set_grad_enabled(args.kl_weight > 0):  # with weight 0 it is logged only
            losses["loss_kl"] = task_kl_loss(logits_i2t, logits_t2i, keep[mine], num_kept)
        losses.update(self._token_losses(outputs, inputs, keep[mine]))
        loss = (
            args.mcl_weight * (losses["loss_i2t"] + losses["loss_t2i"])
            + self._kl_weight() * losses["loss_kl"]
            + args.cmvm_weight * losses.get("loss_cmvm", 0.0)
            + args.cmlm_weight * losses.get("loss_cmlm", 0.0)
        )
        self._record(losses, keep, everyone, scores, threshold, inputs, mine)
        if model.training:
            self.recovery.guard.add(losses, (logits_i2t, logits_t2i), inputs)
            self._push(everyone, scores)
        return (loss, outputs) if return_outputs else loss

    def _model_inputs(self, inputs: dict) -> dict:
        """The part of the batch that the model encodes; masked views only for the losses that are switched on."""
        names = ["input_ids", "pixel_values", "pixel_values_videos", "attention_mask"]
        model_inputs = {name: inputs[name] for name in names if name in inputs}
        if self.args.cmvm_weight > 0:
            model_inputs["bool_masked_pos"] = inputs["bool_masked_pos"]
        if self.args.cmlm_weight > 0:
            model_inputs["masked_input_ids"] = inputs["masked_input_ids"]
            model_inputs["masked_token_pos"] = inputs["text_targets"] != -100
        return model_inputs

    @torch.no_grad()
    def _momentum_encode(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        momentum_model = self.momentum_state.encoder.model
        with self.accelerator.autocast():
            if "pixel_values_videos" in inputs:
                image_embeds = momentum_model.encode_video(inputs["pixel_values_videos"])
            else:
                image_embeds = momentum_model.encode_image(inputs["pixel_values"])
            text_embeds = momentum_model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        return image_embeds, text_embeds

    def _gather(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: self.accelerator.gather(tensor) for name, tensor in tensors.items()}

    def _my_rows(self, batch_size: int) -> slice:
        start = self.args.process_index * batch_size
        return slice(start, start + batch_size)

    def _filter(self, scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adaptive momentum filter: which pairs of the global batch enter the losses of this step."""
        active = self.args.adaptive_filter and self.queue.is_full
        keep, threshold = adaptive_momentum_filter(
            scores, self.queue.scores if active else None, self.args.filter_num_std
        )
        return keep & valid, threshold

    def _contrast(self, outputs, everyone: dict, mine: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of my pairs against the candidates, (B, 1 + candidates) each; class j is the same pair in both."""
        fresh = everyone if self.args.batch_candidates else None
        image_candidates, text_candidates, candidate_ids, filled = self.queue.candidates(fresh)
        excluded = excluded_candidates(everyone["pair_ids"][mine], candidate_ids, filled)
        temperature = self.model.config.temperature
        logits_i2t = queue_logits(
            outputs["image_embeds"], everyone["text_embeds"][mine], text_candidates, excluded, temperature
        )
        logits_t2i = queue_logits(
            outputs["text_embeds"], everyone["image_embeds"][mine], image_candidates, excluded, temperature
        )
        return logits_i2t, logits_t2i

    def _token_losses(self, outputs, inputs: dict, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        """Masked modelling of my kept pairs: means over the masked tokens of all kept pairs of the global batch."""
        losses = {}
        if self.args.cmvm_weight > 0:
            masked, targets = inputs["bool_masked_pos"].bool(), inputs["image_tokens"]
            losses["loss_cmvm"] = self._masked_loss(outputs["image_token_logits"], targets, masked, keep)
        if self.args.cmlm_weight > 0:
            masked = inputs["text_targets"] != -100
            losses["loss_cmlm"] = self._masked_loss(outputs["text_token_logits"], inputs["text_targets"], masked, keep)
        return losses

    def _masked_loss(self, logits, targets, masked, keep) -> torch.Tensor:
        positions = masked.flatten().nonzero().squeeze(1)  # once: a mask as index makes the host wait for the device
        keep_tokens = keep.unsqueeze(1).expand_as(masked).flatten()[positions]
        num_tokens = self.accelerator.reduce(keep_tokens.sum(), reduction="sum") / self.args.world_size
        return masked_token_loss(logits, targets.flatten()[positions], keep_tokens, num_tokens)

    def _kl_weight(self) -> float:
        warmup_share = (self.state.global_step + 1) / max(1, self.args.kl_warmup_steps)
        return self.args.kl_weight * min(1.0, warmup_share)

    def _push(self, everyone: dict, scores: torch.Tensor) -> None:
        """All readable pairs of the global batch enter the queues, the filtered ones too."""
        rows = everyone["valid"].nonzero().squeeze(1)
        self.queue.push(
            everyone["image_embeds"][rows], everyone["text_embeds"][rows], scores[rows], everyone["pair_ids"][rows]
        )

    # ------------------------------------------------------------------------------------------- logging

    def _record(self, losses, keep, everyone, scores, threshold, inputs, mine) -> None:
        valid, is_real = everyone["valid"], everyone["pair_ids"] >= 0
        self.training_log.add_losses(losses)
        self.training_log.add_counts(kept=keep.sum(), readable=valid.sum(), skipped_images=(~valid & is_real).sum())
        self.training_log.set_latest(filter_threshold=threshold, queue_fill=self.queue.fill)
        self.recovery.note_filtered((valid & ~keep)[mine], scores[mine], threshold, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what happened since the last log to the Trainer's own line of training logs."""
        if "loss" in logs:
            # The history survives a resumed run, so the count goes on where it stopped.
            counts = [entry["skipped_images"] for entry in self.state.log_history if "skipped_images" in entry]
            method_logs = self.training_log.drain(self.accelerator, skipped_before=counts[-1] if counts else 0)
            self.collapse_watch.check(method_logs, self.state.global_step, self.queue.size)
            logs = {**logs, **method_logs, **stream_counts(self.stream_loader, self.accelerator)}
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Retrieval in both directions over the whole evaluation set; see `retrieval_metrics.py` for the measures."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("COTSTrainer needs an eval_dataset to evaluate.")
        if isinstance(dataset, dict):
            results = {}
            for name, part in dataset.items():
                results.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return results
        embeds = embed_pairs(
            self.model.cots,
            dataset,
            self.processing_class,
            self.accelerator,
            batch_size=self.args.eval_batch_size,
            max_text_length=self.max_text_length,
            num_workers=self.args.dataloader_num_workers,
            progress=not self.args.disable_tqdm,
        )
        metrics = measure_retrieval(embeds, self.eval_protocol)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.example_retrievals = find_examples(embeds)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------- schedule and state

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """With `lr_hold_epochs`: warm-up, a constant learning rate for that long, then linear decay to zero."""
        if self.args.lr_hold_epochs == 0 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        factor = schedule_of(self, num_training_steps)
        self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        output_dir = self.args.output_dir if output_dir is None else output_dir
        # Checkpoints keep the names of the running model: Trainer resumes with `load_state_dict(strict=False)`, to
        # which the legacy names that `save_pretrained` writes by default are unknown, so that the vision stream would
        # keep its fresh weights with no more than a warning (tests/test_resume.py).
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_original_format=False)
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _save_checkpoint(self, model, trial) -> None:
        self.recovery.save(
            self._get_output_dir(trial), lambda: super(COTSTrainer, self)._save_checkpoint(model, trial)
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.recovery.save_averages(output_dir)

    def _issue_warnings_after_load(self, load_result) -> None:
        self.recovery.check_loaded(load_result)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.recovery.snapshot.take_generators()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.momentum_state.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.momentum_state.load(checkpoint)

    def export_model(self, output_dir: str) -> None:
        """Write a complete Hub repository of the two streams, with the card of this run (`hub_export.py`)."""
        if self.args.should_save:
            export_trained(self, output_dir)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **options
    ):
        """Push what `export_model` writes to `args.hub_model_id`; `options` are `tag` and `overwrite_card`."""
        where = {"token": token, "revision": revision, "private": private}
        return push_trained(self, blocking=blocking, commit_message=commit_message, **where, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        push_while_training(self)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write our card; the Trainer calls this when it pushes, and its own would overwrite ours."""
        if self.is_world_process_zero():
            folder = self.args.output_dir
            build_card(self, self.model.cots, folder).save(os.path.join(folder, "README.md"))
