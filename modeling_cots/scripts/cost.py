"""What training costs before anything is trained: parameters, floating-point operations and memory of a configuration.

Nothing is computed and no memory is taken: the training step is run on fake tensors, which have shapes and no
contents, so the counts are those of the real modules, whatever the encoders are. Counted: the unmasked and the
masked pass of both encoders forward and backward, the momentum encoders, the image tokenizer, the heads on the masked
positions, and the contrast against the queues. Frozen layers run once and without a gradient, and those of cached
features not at all. Not counted: decoding images, the optimizer's arithmetic (a share of about 1 / batch size),
communication, and what attention kernels compute again in the backward pass. A multiply-add is 2 FLOP. Of videos a
pair is all frames of one video and a caption.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig
from transformers.initialization import no_init_weights

from ..configuration_cots import COTSConfig
from ..method.feature_queue import PairQueue
from ..method.global_batch import GlobalBatch
from ..method.image_tokenizer import PIXELS_PER_TOKEN
from ..method.losses import masked_token_loss
from ..modeling_cots_pretraining import COTSForPreTraining
from ..training.arguments import COTSTrainingArguments
from ..training.copied_passes import CopiedPasses
from ..training.frozen_layers import FrozenEncoders
from ..training.layer_compiling import encoder_layers
from ..training.master_weights import BFLOAT16, to_bfloat16_
from ..training.objective import COTSObjective
from ..training.processes import ProcessGroup
from ..training.recomputed_activations import IS_SEEN, recompute_activations_

# float32 weights, gradients and Adam's two moments, and the momentum copy; with autocast also a cast of each weight.
# bfloat16 weights and gradients with float32 master weights take as much.
BYTES_PER_PARAMETER = 4 + 4 + 8
BYTES_PER_FROZEN_PARAMETER = 4
BYTES_PER_MOMENTUM_PARAMETER = 4
BYTES_PER_CAST_PARAMETER = 2
MEASURED_BATCH_SIZES = 2, 4  # memory is linear in the batch: a line through two points


def _attention_flop(query: torch.Size, key: torch.Size, value: torch.Size, *args, **kwargs) -> int:
    """Two matrix products for each head: scores, and their use."""
    batch_size, num_heads, num_queries, width = query
    return 2 * batch_size * num_heads * num_queries * key[-2] * (width + value[-1])


def _attention_backward_flop(gradient: torch.Size, query, key, value, *args, **kwargs) -> int:
    return 2 * _attention_flop(query, key, value)


# The CPU's fused attention, which fake tensors run; torch 2.14 counts nothing for it (tests/scripts/test_cost.py).
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


@dataclass
class TrainingCost:
    """
    The cost of one optimizer step, by the pair.

    Args:
        num_parameters (`dict[str, int]`): By part: encoders, projections, heads.
        num_trained_parameters (`int`): Those that are not frozen.
        flop_per_pair (`dict[str, float]`): Forward and backward, by part; see `total_flop`.
        fixed_bytes (`int`): Device memory whatever the batch: weights, gradients, optimizer, momentum copy, queues.
        bytes_per_pair (`int`): Device memory of what the backward pass needs of one pair.
    """

    num_parameters: dict[str, int]
    num_trained_parameters: int
    flop_per_pair: dict[str, float]
    fixed_bytes: int
    bytes_per_pair: int

    @property
    def total_flop(self) -> float:
        """FLOP of one pair."""
        return sum(self.flop_per_pair.values())

    def pairs_per_second(self, flop_per_second: float) -> float:
        """Pairs a second of a device that reaches `flop_per_second`."""
        return flop_per_second / self.total_flop

    def largest_batch(self, device_bytes: int) -> int:
        """Pairs of one device of `device_bytes` of memory; 0 where not even the weights fit."""
        return max(0, (device_bytes - self.fixed_bytes) // self.bytes_per_pair)


def estimate_training_cost(
    config: COTSConfig,
    args: COTSTrainingArguments,
    *,
    text_length: int = 32,
    num_frames: int | None = None,
    image_tokenizer_hidden_size: int | None = 256,
    num_devices: int = 1,
) -> TrainingCost:
    """
    Estimate the cost of training a model of `config` with `args`.

    Args:
        config ([`COTSConfig`]): The architecture.
        args ([`COTSTrainingArguments`]): Says which losses are on, the mask ratios, the queue and the precision.
        text_length (`int`, defaults to 32): Tokens of a caption, padding included.
        num_frames (`int`, *optional*): Frames of a video; without it pairs are of images.
        image_tokenizer_hidden_size (`int`, *optional*, defaults to 256): Width of the dVAE; 256 is DALL-E's. `None`:
            the data bring their image tokens along.
        num_devices (`int`, defaults to 1): Among which `shard_model` splits what is fixed.

    Raises `ValueError` for a text length without room for the two special tokens and a word, for videos of no frame,
    for videos with the masked losses, which are of images, and for recomputed activations with an older torch.
    """
    if args.recompute_activations and not IS_SEEN:
        raise ValueError(
            "What recompute_activations keeps can be counted with torch 2.14, not with "
            f"{torch.__version__}: leave it out."
        )
    if text_length < 3:
        raise ValueError(f"text_length must be at least 3 ([CLS], a word, [SEP]), got {text_length}.")
    if num_frames is not None:
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
        if args.cmvm_weight > 0 or args.cmlm_weight > 0:
            raise ValueError("Videos train without masked losses: set cmvm_weight and cmlm_weight to 0.")
    with FakeTensorMode(), no_init_weights():
        model = COTSForPreTraining(config).train()
        model.tie_weights()  # which transformers does after initializing, and that was left out
        if args.param_dtype == BFLOAT16:
            to_bfloat16_(model)
        step = _FakeStep(model, args, text_length, num_frames)
        per_pair = step.bytes_per_pair()
        flop_per_pair = step.count_flop(image_tokenizer_hidden_size)
        parameters = _count_parameters(step.model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        gathered = _gathered_parameters(model)
    total = sum(parameters.values())
    momentum = total - parameters["heads"]
    queue = args.queue_size * (2 * config.projection_dim + 1) * 4 + args.queue_size * 8
    fixed = trained * BYTES_PER_PARAMETER + (total - trained) * BYTES_PER_FROZEN_PARAMETER
    fixed += momentum * BYTES_PER_MOMENTUM_PARAMETER
    is_half = args.bf16 or args.fp16
    if args.shard_model:
        fixed = fixed * args.shard_replicas // num_devices
        fixed += gathered * (BYTES_PER_CAST_PARAMETER if is_half else BYTES_PER_FROZEN_PARAMETER)
    elif is_half:
        fixed += total * BYTES_PER_CAST_PARAMETER
    fixed += queue
    return TrainingCost(parameters, trained, flop_per_pair, fixed, per_pair)


def _gathered_parameters(model: COTSForPreTraining) -> int:
    """Weights and gradients that a device has whole at once: those outside the layers, and of two layers."""
    layers = encoder_layers(model)
    sizes = sorted(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    return 2 * (outside + sum(sizes[-2:]))


def _count_parameters(model: COTSForPreTraining) -> dict[str, int]:
    cots = model.cots
    parts = {
        "text encoder": [cots.text_model],
        "vision encoder": [cots.vision_model],
        "projections": [cots.text_projection, cots.vision_projection],
        "heads": [model],
    }
    seen, counts = set(), {}
    for name, modules in parts.items():
        new = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in seen}
        seen.update(new)
        counts[name] = sum(new.values())
    return counts


class _FakeStep:
    """The pieces of one training step, on fake tensors; used under `FakeTensorMode`."""

    def __init__(
        self, model: COTSForPreTraining, args: COTSTrainingArguments, text_length: int, num_frames: int | None
    ):
        self.model, self.args, self.text_length, self.num_frames = model, args, text_length, num_frames
        queue = PairQueue(args.queue_size, model.config.projection_dim)
        # Momentum encoders are counted apart, by the online model, which is as large.
        self.frozen = FrozenEncoders(model.cots, args.freeze_vision, args.freeze_text)
        self.frozen.eval_()
        copied = CopiedPasses(model.cots, lambda: False, self.frozen)  # later in training none are
        self.objective = COTSObjective(model, model.cots, queue, None, args, ProcessGroup(), self.frozen, copied)
        self._images: dict[int, torch.Tensor] = {}
        height, width = model.config.image_size
        patch_height, patch_width = model.config.patch_size
        self.image_size = height, width
        self.grid = height // patch_height, width // patch_width
        self.masked_patches = max(1, round(args.image_mask_ratio * self.grid[0] * self.grid[1]))
        self.masked_words = max(1, round(args.text_mask_ratio * (text_length - 2)))

    def autocast(self):
        if not (self.args.bf16 or self.args.fp16):
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def images(self, batch_size: int) -> torch.Tensor:
        if batch_size not in self._images:  # the unmasked and the masked pass see the same tensor, kept once
            self._images[batch_size] = torch.zeros(batch_size, 3, *self.image_size)
        return self._images[batch_size]

    def texts(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, self.text_length, dtype=torch.long)

    # Each of these returns something to go backward from. No attention mask: what it holds costs nothing.

    def is_cached(self, kind: str) -> bool:
        """Whether the global features of the "vision" or "text" encoder are computed before training."""
        return self.args.feature_cache is not None and self.frozen.is_whole(kind)

    def vision_feature(self, batch_size: int) -> torch.Tensor:
        if self.is_cached("vision"):
            return torch.zeros(batch_size, self.model.config.image_feature_size)
        return self.model.cots.run_vision_model(self.images(batch_size)).pooler_output

    def text_feature(self, batch_size: int) -> torch.Tensor:
        if self.is_cached("text"):
            return torch.zeros(batch_size, self.model.config.text_config.hidden_size)
        return self.model.cots.run_text_model(self.texts(batch_size)).pooler_output

    def embed_images(self, batch_size: int) -> torch.Tensor:
        if self.num_frames is None:
            return self.model.cots.embed_image_features(self.vision_feature(batch_size))
        return self.model.cots.encode_video(self.images(batch_size * self.num_frames).unflatten(0, (batch_size, -1)))

    def embed_texts(self, batch_size: int) -> torch.Tensor:
        return self.model.cots.embed_text_features(self.text_feature(batch_size))

    def masked_images(self, batch_size: int) -> torch.Tensor:
        return self.model.cots.run_vision_model(self.images(batch_size)).last_hidden_state

    def masked_texts(self, batch_size: int) -> torch.Tensor:
        return self.model.cots.run_text_model(self.texts(batch_size)).last_hidden_state

    def contrast(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """L_MCL and L_KL, as the objective of training computes them."""
        size, keys = len(image_embeds), torch.zeros_like(image_embeds)
        keep_mask = torch.ones(size, dtype=torch.bool)
        numbers = torch.zeros(size, dtype=torch.long)
        batch = GlobalBatch(keys, keys, numbers, numbers, keep_mask)
        logits, _ = self.objective.contrast(image_embeds, text_embeds, batch, slice(0, size))
        return torch.stack([*self.objective.contrastive_losses(*logits, keep_mask, float(size)).values()]).sum()

    def predict(self, head: Callable, mixer: Callable, tokens: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Loss of the masked `tokens` (B, M, H), each conditioned on the other encoder's `feature` (B, H')."""
        logits = head((tokens + mixer(feature).unsqueeze(1)).flatten(0, 1))
        targets = torch.zeros(len(logits), dtype=torch.long)
        return masked_token_loss(logits, targets, torch.ones_like(targets, dtype=torch.bool), float(len(logits)))

    def predict_patches(self, patches: torch.Tensor, text_feature: torch.Tensor) -> torch.Tensor:
        masked = patches[:, -self.masked_patches :]
        return self.predict(self.model.cmvm_head, self.model.text_to_image, masked, text_feature)

    def predict_words(self, words: torch.Tensor, image_feature: torch.Tensor) -> torch.Tensor:
        masked = words[:, -self.masked_words :]
        return self.predict(self.model.cmlm_head, self.model.image_to_text, masked, image_feature)

    def count_flop(self, image_tokenizer_hidden_size: int | None) -> dict[str, float]:
        """FLOP of one pair by part; parts whose loss has weight 0 are absent."""
        args, batch_size, config = self.args, 2, self.model.config
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size

        def leaf(*shape: int, kind: str | None = None) -> torch.Tensor:
            dtype = torch.bfloat16 if args.param_dtype == BFLOAT16 else torch.float32
            return torch.zeros(batch_size, *shape, dtype=dtype, requires_grad=not self.frozen.is_whole(kind))

        def patches() -> torch.Tensor:
            return leaf(self.masked_patches, vision_size, kind="vision")

        def words() -> torch.Tensor:
            return leaf(self.masked_words, text_size, kind="text")

        parts = {
            "contrast and KL": lambda: self.contrast(leaf(config.projection_dim), leaf(config.projection_dim)),
        }
        if args.cmvm_weight > 0:
            parts["vision, masked"] = lambda: self.masked_images(batch_size)
            parts["patch head"] = lambda: self.predict_patches(patches(), leaf(text_size, kind="text"))
        if args.cmlm_weight > 0:
            parts["text, masked"] = lambda: self.masked_texts(batch_size)
            parts["word head"] = lambda: self.predict_words(words(), leaf(config.image_feature_size, kind="vision"))
        with self.frozen.record():
            counts = {
                "vision, unmasked": _count(lambda: self.embed_images(batch_size), backward=True),
                "text, unmasked": _count(lambda: self.embed_texts(batch_size), backward=True),
            }
        counts |= {name: _count(part, backward=True) for name, part in parts.items()}
        with torch.no_grad(), self.frozen.replay(self.model.cots):
            counts["vision, momentum"] = _count(lambda: self.embed_images(batch_size))
            counts["text, momentum"] = _count(lambda: self.embed_texts(batch_size))
            if args.cmvm_weight > 0 and image_tokenizer_hidden_size is not None:
                codebook = FlavaImageCodebook(
                    FlavaImageCodebookConfig(
                        hidden_size=image_tokenizer_hidden_size, vocab_size=config.image_vocab_size
                    )
                )
                pooled = torch.zeros(batch_size, 3, *(PIXELS_PER_TOKEN * side for side in self.grid))
                counts["image tokenizer"] = _count(lambda: codebook.get_codebook_indices(pooled))
        return {name: count / batch_size for name, count in counts.items()}

    def bytes_per_pair(self) -> int:
        """Bytes that autograd keeps of one pair between forward and backward pass.

        Where activations are computed again: that, and those of the one vision layer which is just now.
        """
        args = self.args
        if not (args.gradient_checkpointing or args.recompute_activations):
            return self._per_pair(self.losses)
        images = 1 if self.num_frames is None else self.num_frames
        num_trained = self.frozen.num_trained_vision_layers(self.model.config.vision_config.num_hidden_layers)
        again = self._per_pair(self.masked_images)
        if args.recompute_activations:
            recompute_activations_(self.model)
            again -= self._per_pair(self.masked_images)
        else:
            self.model.gradient_checkpointing_enable()
        return images * again // max(1, num_trained) + self._per_pair(self.losses)

    def _per_pair(self, run: Callable[[int], object]) -> int:
        few, many = MEASURED_BATCH_SIZES
        return (self.activation_bytes(run, many) - self.activation_bytes(run, few)) // (many - few)

    def activation_bytes(self, run: Callable[[int], object], batch_size: int) -> int:
        """Bytes that autograd keeps of `run(batch_size)`, weights excluded."""
        with self.autocast():
            return kept_bytes(lambda: run(batch_size), self.model)

    def losses(self, batch_size: int) -> list[torch.Tensor]:
        """Every loss that is switched on, from one run of everything the trained model does for a batch."""
        cots = self.model.cots
        if self.num_frames is not None:
            return [self.contrast(self.embed_images(batch_size), self.embed_texts(batch_size))]
        vision, text = self.vision_feature(batch_size), self.text_feature(batch_size)
        losses = [self.contrast(cots.embed_image_features(vision), cots.embed_text_features(text))]
        if self.args.cmvm_weight > 0:
            losses.append(self.predict_patches(self.masked_images(batch_size), text))
        if self.args.cmlm_weight > 0:
            losses.append(self.predict_words(self.masked_texts(batch_size), vision))
        return losses


def flop_counter() -> FlopCounterMode:
    """A context whose `get_total_flops()` counts what runs in it, the CPU's fused attention as well."""
    return FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)


def kept_bytes(run: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps between the forward pass `run` and its backward pass, weights of `model` excluded."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later one gets the same number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(storage.nbytes() for number, storage in kept.items() if number not in weights)


def _count(part: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """FLOP of `part`, and with `backward` of the backward pass from its sum."""
    with flop_counter() as counter:
        result = part()
        if backward and result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops()
