"""The objective of COTS (Lu et al., CVPR 2022) on one page: from a batch of pixels and tokens to a loss.

The formulas are in `method/`: `losses.py`, `feature_queue.py`, `filtering.py`, `momentum.py`, `image_tokenizer.py`.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..method.feature_queue import PairQueue
from ..method.filtering import filter_threshold, keep_above, mixture_threshold
from ..method.fresh_keys import key_drift, mean_drift, pass_gradient
from ..method.global_batch import GlobalBatch
from ..method.image_tokenizer import ImageTokenizer
from ..method.losses import (
    EXCLUDED_LOGIT,
    chance_loss,
    excluded_candidates,
    masked_token_loss,
    momentum_contrastive_loss,
    queue_logits,
    task_kl_loss,
)
from ..modeling_cots import COTSModel
from ..modeling_cots_pretraining import COTSForPreTraining, COTSForPreTrainingOutput
from .arguments import COTSTrainingArguments
from .copied_passes import CopiedPasses
from .frozen_layers import FrozenEncoders
from .processes import ProcessGroup


@dataclass
class ObjectiveOutput:
    """
    The loss of one batch of this process, and what is logged, checked and queued because of it.

    Args:
        loss: (), the weighted sum.
        losses: Every term by the name it is logged under, unweighted: (), in float32.
        logits: Of the B local pairs, image to text and text to image, (B, 1 + C) each; the pair itself in column 0.
        batch: The pairs of all processes.
        chance_loss: (), what the two contrastive losses would sum to if all distributions were uniform.
        local: Rows of `batch` that are this process's own.
        key_drift: (), how much lower logits are with queued keys than with fresh ones, in nats; NaN without any.
        scores: (G,) momentum similarity scores.
        keep_mask: (G,) bool, pairs that could be read and that the filter kept.
        filter_threshold: (), -inf while the filter is idle.
        model_output: What the model returned.
    """

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]
    logits: tuple[torch.Tensor, torch.Tensor]
    chance_loss: torch.Tensor
    batch: GlobalBatch
    local: slice
    key_drift: torch.Tensor
    scores: torch.Tensor
    keep_mask: torch.Tensor
    filter_threshold: torch.Tensor
    model_output: COTSForPreTrainingOutput


class COTSObjective:
    """
    L = w_mcl L_MCL + w_kl L_KL + w_cmvm L_CMVM + w_cmlm L_CMLM of one batch.

    A call changes nothing. After it, `push` writes the batch into the queues and notes the keys' drift. The momentum
    encoders move once per optimizer step, of which several batches may be part, and so after the optimizer, in
    `COTSTrainer`.

    Args:
        model ([`COTSForPreTraining`]): The online model, not wrapped for several processes.
        momentum_model ([`COTSModel`]): The momentum encoders' model.
        queue ([`PairQueue`]): The paired queues.
        image_tokenizer ([`ImageTokenizer`], *optional*): For batches that bring no image tokens along.
        args ([`COTSTrainingArguments`]): Loss weights, filter, candidates.
        processes ([`ProcessGroup`]): Gathers and sums over the processes.
        frozen ([`FrozenEncoders`]): Layers of the online model that never train.
        copied ([`CopiedPasses`]): Passes of the momentum encoders that equal the online ones.
    """

    def __init__(
        self,
        model: COTSForPreTraining,
        momentum_model: COTSModel,
        queue: PairQueue,
        image_tokenizer: ImageTokenizer | None,
        args: COTSTrainingArguments,
        processes: ProcessGroup,
        frozen: FrozenEncoders,
        copied: CopiedPasses,
    ):
        self.config = model.config
        self.momentum_model, self.queue = momentum_model, queue
        self.image_tokenizer = image_tokenizer
        self.args = args
        self.processes = processes
        self.frozen, self.copied = frozen, copied

    def __call__(self, model, inputs: dict[str, torch.Tensor], step: int) -> ObjectiveOutput:
        """
        Args:
            model: The online model as training runs it, wrapped or not.
            inputs: A batch of [`COTSDataCollator`] or [`COTSVideoDataCollator`], B pairs on the device.
            step: Optimizer steps taken before this one; the weight of the KL loss warms up by it.
        """
        # Encode. Image tokens come first: the dVAE's activations then do not add to those that the model keeps.
        inputs = self.with_image_tokens(inputs)
        with self.frozen.record(), self.copied.record():
            output = model(**self.model_inputs(inputs))
        momentum_image_embeds, momentum_text_embeds = self.momentum_encode(inputs)
        batch, local = self.gather(momentum_image_embeds, momentum_text_embeds, inputs)

        # Filter the global batch. Gradients are averaged over the processes: a sum over the local pairs divided by
        # this number is their share of the mean over all kept pairs.
        scores = batch.scores
        keep_mask, threshold = self.filter(scores, batch.valid)
        num_kept = keep_mask.sum() / self.processes.count
        keep_local = keep_mask[local]

        # Instance level (MCL) and task level (KL): both consume the same logits. Then the token level (CMVM, CMLM).
        logits, drift = self.contrast(output.image_embeds, output.text_embeds, batch, local)
        losses = self.contrastive_losses(*logits, keep_local, num_kept)
        losses.update(self.token_losses(output, inputs, keep_local))
        loss = (
            self.args.mcl_weight * (losses["loss_i2t"] + losses["loss_t2i"])
            + self.kl_weight(step) * losses["loss_kl"]
            + self.args.cmvm_weight * losses.get("loss_cmvm", 0.0)
            + self.args.cmlm_weight * losses.get("loss_cmlm", 0.0)
        )
        return ObjectiveOutput(
            loss=loss,
            losses=losses,
            logits=logits,
            chance_loss=chance_loss(logits[0]),
            batch=batch,
            local=local,
            key_drift=drift,
            scores=scores,
            keep_mask=keep_mask,
            filter_threshold=threshold,
            model_output=output,
        )

    def with_image_tokens(self, inputs: dict) -> dict:
        """A batch with masked patches gets `image_tokens` (B, patches), cached or computed from raw pixels."""
        if "bool_masked_pos" not in inputs or "image_tokens" in inputs:
            return inputs
        assert self.image_tokenizer is not None, "checked when the trainer was made"
        pixels = inputs.get("raw_pixels", inputs["pixel_values"])
        return {**inputs, "image_tokens": self.image_tokenizer(pixels, self.config.patch_size)}

    def model_inputs(self, inputs: dict) -> dict:
        """What the model encodes; masked passes only for the losses that are switched on."""
        names = [
            "input_ids",
            "pixel_values",
            "pixel_values_videos",
            "attention_mask",
            "image_features",
            "text_features",
        ]
        model_inputs = {name: inputs[name] for name in names if name in inputs}
        if self.args.cmvm_weight > 0:
            model_inputs["bool_masked_pos"] = inputs["bool_masked_pos"]
        if self.args.cmlm_weight > 0:
            model_inputs["masked_input_ids"] = inputs["masked_input_ids"]
            model_inputs["masked_token_pos"] = inputs["text_targets"] != -100
        return model_inputs

    @torch.no_grad()
    def momentum_encode(self, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Momentum embeddings g^v and g^l of the local pairs, (B, d) each, without what is known already."""
        model = self.momentum_model
        with self.processes.autocast(), self.frozen.replay(model), self.copied.replay(model):
            if "image_features" in inputs:
                image_embeds = model.embed_image_features(inputs["image_features"])
            elif "pixel_values_videos" in inputs:
                image_embeds = model.encode_video(inputs["pixel_values_videos"])
            else:
                image_embeds = model.encode_image(inputs["pixel_values"])
            if "text_features" in inputs:
                text_embeds = model.embed_text_features(inputs["text_features"])
            else:
                text_embeds = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
        return image_embeds, text_embeds

    def gather(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, inputs: dict) -> tuple[GlobalBatch, slice]:
        """The pairs of all processes, and which are this one's; every process has the same number B."""
        size, gather = len(inputs["valid"]), self.processes.gather
        caption_ids = inputs.get("caption_ids")  # a custom collator may not know which captions are equal
        batch = GlobalBatch(
            image_embeds=gather(image_embeds),
            text_embeds=gather(text_embeds),
            pair_ids=gather(inputs["pair_ids"]),
            caption_ids=gather(torch.full_like(inputs["pair_ids"], -1) if caption_ids is None else caption_ids),
            valid=gather(inputs["valid"]),
        )
        return batch, slice(self.processes.index * size, (self.processes.index + 1) * size)

    def filter(self, scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adaptive momentum filter: the pairs (G,) that enter the losses of this step, and the threshold ()."""
        if not (self.args.adaptive_filter and self.queue.is_full):
            threshold = torch.full((), -math.inf, device=scores.device)
        elif self.args.filter_rule == "mixture":
            threshold = mixture_threshold(self.queue.scores, self.queue.unpaired_scores)
        else:
            threshold = filter_threshold(self.queue.scores, self.args.filter_num_std)
        return keep_above(scores, threshold) & valid, threshold

    def contrast(
        self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, batch: GlobalBatch, local: slice
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """
        Logits of the B local pairs, (B, 1 + C) each, image to text first, and the drift of the keys, ().

        Class j is the same pair in both: column 0 the pair itself, then the queue, then the batch.
        """
        candidates, temperature = self.queue.candidates(), self.config.temperature
        if self.args.batch_candidates:
            batch = self.with_gradient(batch, image_embeds, text_embeds)
            candidates = candidates.joined_with(batch)
        pairs = batch[local]
        excluded = excluded_candidates(pairs, candidates, self.args.mask_equal_captions)
        logits_i2t = queue_logits(image_embeds, pairs.text_embeds, candidates.text_embeds, excluded, temperature)
        logits_t2i = queue_logits(text_embeds, pairs.image_embeds, candidates.image_embeds, excluded, temperature)
        if not self.args.batch_candidates:
            return (logits_i2t, logits_t2i), torch.full_like(logits_i2t[0, 0], math.nan)
        is_stale = ~self.queue.fresh_keys.is_fresh(self.queue.age)
        is_negative = ~excluded & pairs.valid.unsqueeze(1)
        drift = self.drift((logits_i2t, logits_t2i), is_negative, batch.valid.sum())
        return (_leave_out(logits_i2t, is_stale), _leave_out(logits_t2i, is_stale)), drift

    def with_gradient(self, batch: GlobalBatch, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> GlobalBatch:
        """The batch whose keys pass a gradient as far as the queue is not fresh (`fresh_keys.py`)."""
        weight = 1 - self.queue.fresh_keys.share(self.queue.size)
        gather = self.processes.gather_with_gradient
        return replace(
            batch,
            image_embeds=pass_gradient(batch.image_embeds, gather(image_embeds), weight),
            text_embeds=pass_gradient(batch.text_embeds, gather(text_embeds), weight),
        )

    def momentum(self) -> float:
        """m of the next update: that of the arguments, times the share of fresh keys where that is measured."""
        share = float(self.queue.fresh_keys.share(self.queue.size)) if self.args.batch_candidates else 1.0
        return self.args.momentum * share

    @torch.no_grad()
    def drift(
        self, logits: tuple[torch.Tensor, torch.Tensor], is_negative: torch.Tensor, batch_size: torch.Tensor
    ) -> torch.Tensor:
        """
        The larger mean drift of both directions over the global batch (`fresh_keys.py`), (); NaN without any.

        Args:
            logits: Of the B local pairs with all candidates, (B, 1 + N_Q + G) each.
            is_negative: (B, N_Q + G) bool; of a pair that could not be read, nothing is.
            batch_size: (), readable pairs of the global batch.
        """
        size = self.queue.size
        measured = is_negative[:, :size] & self.queue.fresh_keys.is_measured(self.queue.age, batch_size)
        of_direction = []
        for each in logits:
            sums = key_drift(each[:, 1 : 1 + size], each[:, 1 + size :], measured, is_negative[:, size:])
            of_direction.append(mean_drift(self.processes.sum(sums)))
        return torch.stack(of_direction).amax()

    def contrastive_losses(
        self,
        logits_i2t: torch.Tensor,
        logits_t2i: torch.Tensor,
        keep_mask: torch.Tensor,
        num_kept: torch.Tensor | float,
    ) -> dict[str, torch.Tensor]:
        """L_I2T, L_T2I and L_KL, which with weight 0 is computed without gradient, to be logged."""
        losses = {
            "loss_i2t": momentum_contrastive_loss(logits_i2t, keep_mask, num_kept),
            "loss_t2i": momentum_contrastive_loss(logits_t2i, keep_mask, num_kept),
        }
        with torch.set_grad_enabled(self.args.kl_weight > 0 and torch.is_grad_enabled()):
            losses["loss_kl"] = task_kl_loss(logits_i2t, logits_t2i, keep_mask, num_kept)
        return losses

    def kl_weight(self, step: int) -> float:
        """The weight of L_KL, which grows linearly from 0 over `kl_warmup_steps`."""
        return self.args.kl_weight * min(1.0, (step + 1) / max(1, self.args.kl_warmup_steps))

    def token_losses(self, output: COTSForPreTrainingOutput, inputs: dict, keep_mask: torch.Tensor) -> dict:
        """L_CMVM and L_CMLM: means over the masked tokens of all kept pairs of the global batch."""
        losses = {}
        if self.args.cmvm_weight > 0:
            masked, targets = inputs["bool_masked_pos"].bool(), inputs["image_tokens"]
            losses["loss_cmvm"] = self._masked_loss(output.image_token_logits, targets, masked, keep_mask)
        if self.args.cmlm_weight > 0:
            masked, targets = inputs["text_targets"] != -100, inputs["text_targets"]
            losses["loss_cmlm"] = self._masked_loss(output.text_token_logits, targets, masked, keep_mask)
        return losses

    def _masked_loss(self, logits, targets, masked, keep_mask) -> torch.Tensor:
        positions = masked.flatten().nonzero().squeeze(1)  # once: a mask as index makes the host wait for the device
        keep_tokens = keep_mask.unsqueeze(1).expand_as(masked).flatten()[positions]
        num_tokens = self.processes.sum(keep_tokens.sum()) / self.processes.count
        return masked_token_loss(logits, targets.flatten()[positions], keep_tokens, num_tokens)

    def push(self, result: ObjectiveOutput) -> None:
        """All readable pairs of the global batch enter the queues, the filtered ones too."""
        rows = result.batch.valid.nonzero().squeeze(1)
        pairs, scores = result.batch[rows], result.scores[rows]
        self.queue.push(pairs.image_embeds, pairs.text_embeds, scores, pairs.pair_ids, pairs.caption_ids)
        self.queue.fresh_keys.update_(result.key_drift, self.args.key_drift_limit, len(rows), self.queue.size)


def _leave_out(logits: torch.Tensor, is_stale: torch.Tensor) -> torch.Tensor:
    """Logits (B, 1 + C) where those queued keys (N_Q,) do not count."""
    first, last = 1, 1 + len(is_stale)
    queued = logits[:, first:last].masked_fill(is_stale, EXCLUDED_LOGIT)
    return torch.cat([logits[:, :first], queued, logits[:, last:]], dim=1)
