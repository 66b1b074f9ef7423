"""`recompute_activations_`: of each layer what is cheap is computed again in the backward pass, what is dear is kept.

Kept are the results of matrix products and of attention, which take nearly all of the time. Normalization, activation
functions, dropout, sums and casts are computed again from them (selective activation recomputation, Korthikanti et
al., 2022). Gradients are the same bit for bit. `gradient_checkpointing` keeps less and computes whole layers again.
"""

import inspect
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry
from transformers import TrainingArguments

from .layer_compiling import encoder_layers

# Whether hooks on saved tensors see what is kept, as they must for it to be counted; torch 2.6 keeps it unseen.
IS_SEEN = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
# What torch counts FLOP for, and the CPU's fused attention, for which it counts none (scripts/cost.py).
DEAR = {*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


def check_recompute(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that do not go together with computing activations again."""
    if not args.recompute_activations:
        return
    checkpointing = "activation_checkpointing", "gradient_checkpointing"  # the new name is not in all of 5.x
    if any(getattr(args, name, None) for name in checkpointing):
        raise ValueError(
            "recompute_activations and gradient_checkpointing are two ways to save the same memory: leave one out."
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile chooses by itself what it computes again: leave recompute_activations out, or take "
            "compile_layers."
        )


def recompute_activations_(model: nn.Module) -> None:
    """
    Let the layers of all encoders of `model` keep the results of products and attention, and compute the rest again.

    Takes effect in training mode, where gradients are computed. Raises `ValueError` for a model without such layers.
    """
    layers = encoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers of transformers' encoders to compute again.")
    run = partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _choose),
        **({"respect_saved_tensors_hooks": True} if IS_SEEN else {}),
    )
    inside = {inner for layer in layers for inner in layer.modules() if inner is not layer}
    for layer in layers:
        if layer in inside:  # of a layer that is computed again as a whole
            continue
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, run


def _choose(context, op, *args, **kwargs) -> CheckpointPolicy:
    """What becomes of the result of one operation."""
    is_kept = getattr(op, "overloadpacket", op) in DEAR and not _draws(op, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _draws(op, args: tuple, kwargs: dict) -> bool:
    """
    Whether an operation is attention with dropout.

    The second time all random numbers of a layer are drawn again, from the state of the first time. Whatever was kept
    would draw none, and all later ones would be others.
    """
    for position, argument in enumerate(getattr(getattr(op, "_schema", None), "arguments", ())):
        if argument.name == "dropout_p":
            return (args[position] if position < len(args) else kwargs.get("dropout_p", 0.0)) > 0
    return False
