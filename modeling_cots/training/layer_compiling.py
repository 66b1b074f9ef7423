"""`compile_layers`: `torch.compile` for the repeated layers of the encoders, one by one.

Not for the model as a whole: that puts a mask on every attention call of transformers, which loses flash attention,
and compiles every layer anew, where equal layers share one program here. What surrounds the layers stays as it is,
masked positions among it, whose shapes depend on the data.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# All layers of all encoders run through one function of transformers, and programs are counted by function: two
# encoders, with and without gradients, of fixed and of any length, are more than torch's 8.
MAX_PROGRAMS = 64


def encoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of all encoders of `model`, outer ones before those that they hold."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module, **compile_options) -> None:
    """
    Compile the layers of all encoders of `model` in place, when they first run.

    Names of weights, saving, activation checkpointing and copies stay as they are; a copy is not compiled. Worth the
    minutes that it takes on a GPU, in training and where many images are embedded.

    Args:
        model (`nn.Module`): A COTS model, or anything made of transformers' encoders, on its device.
        compile_options: Of `torch.compile`, such as `backend`.

    Raises `ValueError` for a model without such layers, and where nothing can be compiled, with torch's own reason.
    """
    layers = encoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers of transformers' encoders to compile.")
    _try_compiler(next(model.parameters()).device, compile_options)
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
    setattr(config, limit, max(MAX_PROGRAMS, getattr(config, limit)))
    for layer in layers:
        layer.compile(**compile_options)


def _try_compiler(device: torch.device, compile_options: dict) -> None:
    """Compile next to nothing: torch would find out about a missing compiler in the middle of the first step."""
    try:
        torch.compile(lambda numbers: numbers + 1, **compile_options)(torch.zeros(2, device=device))
    except Exception as error:  # what is raised depends on the back end and on what it lacks
        reason = f"{type(error).__name__}: {error}".strip()
        raise ValueError(
            f"torch.compile does not work on {device.type} here, so layers cannot be compiled. It needs a C++ "
            f"compiler (and Triton on a GPU): install what is missing, or do without. torch says: {reason}"[:1500]
        ) from error
