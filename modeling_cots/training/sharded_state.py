"""Optimizer, momentum copy and queues of a split model on disk: every process writes its own parts.

By torch's distributed checkpoint, in safetensors files that any number of processes reads again, a single one and one
that splits nothing included. Numbers of the optimizer's parameter groups are in a JSON file beside them.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from ..method.momentum import MomentumState
from .sharding import check_torch

STATE_FOLDER = "training_state"
GROUPS_NAME = "parameter_groups.json"
OPTIMIZER, MOMENTUM = "optimizer.", "momentum."  # what the names of tensors begin with


def has_sharded_state(checkpoint: str) -> bool:
    """Whether a checkpoint is of a run that splits its model."""
    return os.path.isdir(os.path.join(checkpoint, STATE_FOLDER))


def remove_sharded_state(checkpoint: str) -> None:
    """Remove what a run that splits its model has left in a checkpoint folder that is written anew."""
    shutil.rmtree(os.path.join(checkpoint, STATE_FOLDER), ignore_errors=True)


def save_sharded_state(checkpoint: str, model: nn.Module, optimizer, momentum_state: MomentumState) -> None:
    """
    Write the state of training into a checkpoint folder; every process must call this.

    Raises `OSError` on every process where one of them cannot write.
    """
    folder = os.path.join(checkpoint, STATE_FOLDER)
    is_alone = not torch.distributed.is_initialized()
    is_first = is_alone or torch.distributed.get_rank() == 0
    if is_first:  # what is left of an earlier save, perhaps by more processes, would be read as part of this one
        remove_sharded_state(checkpoint)
    if not is_alone:
        torch.distributed.barrier()
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"{MOMENTUM}{name}": tensor for name, tensor in momentum_state.state_dict().items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{OPTIMIZER}{names[parameter]}.{kind}": value for kind, value in state.items()}
    with _plain_errors():
        writer = dcp.HuggingFaceStorageWriter(folder, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    if is_first:
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        with open(os.path.join(folder, GROUPS_NAME), "w", encoding="utf-8") as file:
            json.dump(groups, file, indent=1)


def load_sharded_state(checkpoint: str, model: nn.Module, optimizer, momentum_state: MomentumState) -> None:
    """
    Restore what `save_sharded_state` wrote, into models that are split in any way or not at all.

    Every process must call this. Raises `ValueError` where it is of another model, queue or optimizer.
    """
    folder = os.path.join(checkpoint, STATE_FOLDER)
    if not os.path.isdir(folder):
        raise ValueError(
            f"{checkpoint} has no {STATE_FOLDER}, as it is of a run that did not split its model: resume it without "
            "shard_model, or start a new run with it as the model."
        )
    check_torch()
    reader = dcp.HuggingFaceStorageReader(folder)
    saved = reader.read_metadata().state_dict_metadata
    momentum = _momentum_targets(momentum_state, _below(MOMENTUM, saved), folder)
    state = _optimizer_targets(model, _below(OPTIMIZER, saved), folder)
    targets = {f"{MOMENTUM}{name}": tensor for name, tensor in momentum.items()}
    for name, kinds in state.items():
        targets |= {f"{OPTIMIZER}{name}.{kind}": tensor for kind, tensor in kinds.items()}
    with _plain_errors():
        dcp.load(targets, storage_reader=reader)
    momentum_state.take({name: targets[f"{MOMENTUM}{name}"] for name in momentum}, folder)
    with open(os.path.join(folder, GROUPS_NAME), encoding="utf-8") as file:
        _set_optimizer(optimizer, model, state, json.load(file))


def _below(prefix: str, saved: dict) -> dict:
    return {name.removeprefix(prefix): found for name, found in saved.items() if name.startswith(prefix)}


def _momentum_targets(momentum_state: MomentumState, saved: dict, folder: str) -> dict[str, torch.Tensor]:
    """Where to read the tensors of the momentum state: into its own ones, so far as it has them."""
    own, targets = momentum_state.state_dict(), {}
    momentum_state.check_queue_size(saved["queue.scores"].size[0], folder)
    for name, found in saved.items():
        target = own.get(name)
        if target is None:  # a frozen weight, which a model that is not split shares with its copy
            target = torch.empty(found.size, dtype=found.properties.dtype)
        if target.shape != found.size:
            raise ValueError(
                f"{folder} was saved with another model than this one: its {name} has the shape {tuple(found.size)}, "
                f"and this one {tuple(target.shape)}."
            )
        targets[name] = target
    return targets


def _optimizer_targets(model: nn.Module, saved: dict, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """Where to read the state of the optimizer, by the names of weights and of their states."""
    weights, targets = dict(model.named_parameters()), {}
    for name, found in saved.items():
        weight_name, _, kind = name.rpartition(".")
        weight = weights.get(weight_name)
        if weight is None or (found.size and found.size != weight.shape):
            raise ValueError(f"{folder} was saved with another model than this one, which has no such {weight_name}.")
        is_single = not found.size  # the number of steps
        target = torch.empty((), dtype=found.properties.dtype) if is_single else torch.empty_like(weight.detach())
        targets.setdefault(weight_name, {})[kind] = target
    return targets


def _set_optimizer(optimizer, model: nn.Module, state: dict[str, dict], groups: list[dict]) -> None:
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"The checkpoint has {len(groups)} groups of weights with an own learning rate or decay, and this run "
            f"{len(optimizer.param_groups)}: resume with the arguments of the run that saved it."
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    own = optimizer.state_dict()
    for group, saved in zip(own["param_groups"], groups, strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    own["state"] = {number: state[name] for number, name in enumerate(order) if name in state}
    optimizer.load_state_dict(own)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error of the first process that failed in the block, in place of torch's, which is no `Exception`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is meant
            yield
    except dcp.CheckpointException as error:
        number = min(error.failures)
        raise error.failures[number][0] from None
