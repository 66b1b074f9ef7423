"""`Sharding`: a model and its momentum copy, split among the processes by torch's `fully_shard` (FSDP2 and HSDP).

Every layer of the encoders is a unit that is gathered when it runs and split again afterwards; what is left of a model
is one more. Weights, gradients, optimizer and momentum copy stay split; the momentum update moves each process's own
parts (`method/momentum.py`). Queues and losses know nothing of it. What a checkpoint holds: `sharded_state.py`.
"""

import copy
import warnings
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.utils import is_torch_greater_or_equal

from .layer_compiling import encoder_layers

MIN_TORCH = "2.14"
# Whose arithmetic is that of single numbers, so that it does not matter how a tensor is split.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adam", "sgd")


def check_shard_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for arguments that do not go together with splitting the model."""
    if not args.shard_model:
        if args.shard_replicas != 1:
            raise ValueError("shard_replicas belongs to shard_model: set shard_model, or leave it out.")
        return
    reasons = {
        "fp16": "gradients of several processes overflow apart: use bf16",
        "torch_compile": "the model is compiled by its layers: use compile_layers",
        "feature_cache": "encoders whose features are cached do not run, so there is nothing to split",
        "save_on_each_node": "a checkpoint is one folder that all machines share",
        "ddp_bucket_cap_mb": "a layer's gradients are sent together",
    }
    for name, reason in reasons.items():
        if getattr(args, name):
            raise ValueError(f"{name} cannot be used with shard_model: {reason}, or leave {name} out.")
    if args.param_dtype != "float32":
        raise ValueError(
            f"param_dtype={args.param_dtype} cannot be used with shard_model: take bf16, which gathers bfloat16."
        )
    if args.optim not in OPTIMIZERS:
        name = getattr(args.optim, "value", args.optim)
        raise ValueError(f"optim={name} cannot be used with shard_model: take one of {', '.join(OPTIMIZERS)}.")


def check_sharding(args: TrainingArguments, parts: dict) -> None:
    """Raise `ValueError` for a launch, or for parts of the trainer, with which the model cannot be split."""
    if not args.shard_model:
        return
    check_shards(args, args.world_size)
    for name in ("model_init", "optimizers", "optimizer_cls_and_kwargs"):
        if parts.get(name) not in (None, (None, None)):
            raise ValueError(
                f"{name} cannot be used with shard_model: the weights that it knows are split afterwards."
            )
    check_torch()


def check_torch() -> None:
    """Raise `ValueError` for a torch that is too old to split models and to read what split ones have saved."""
    if not is_torch_greater_or_equal(MIN_TORCH):
        raise ValueError(f"shard_model needs torch {MIN_TORCH} or later, and this is {torch.__version__}: install it.")


def check_shards(args: TrainingArguments, count: int) -> None:
    """Raise `ValueError` where `count` processes cannot be the groups that the model is to be split in."""
    if not args.shard_model:
        return
    if count == 1:
        raise ValueError(
            "shard_model splits the model among several processes, and there is only one: start them with "
            "`torchrun --nproc_per_node 8 ...`, or leave shard_model out."
        )
    if count % args.shard_replicas or count == args.shard_replicas:
        raise ValueError(
            f"shard_replicas={args.shard_replicas} leaves {count} processes no equal groups of two or more to split "
            "the model in: choose a number that divides the processes into such groups, as that of the machines."
        )


def check_shardable(model: nn.Module) -> None:
    """Raise `ValueError` for a [`COTSForPreTraining`] that cannot be split."""
    if getattr(model, "peft_config", None):
        raise ValueError(
            "Adapters cannot be used with shard_model: they train few weights, which need no splitting. Leave one of "
            "the two out."
        )
    for kind in ("text", "vision"):
        encoder = getattr(model.cots, f"{kind}_model")
        if not encoder_layers(encoder):
            raise ValueError(
                f"This `{encoder.config.model_type}` {kind} encoder has no layers of transformers that shard_model "
                "could split it by: leave shard_model out, or take another encoder."
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is quantized, which cannot be split: load the model without, or leave shard_model out."
            )


class Sharding:
    """
    Splits a model and its momentum copy in place, and puts the model together again where it is needed whole.

    Args:
        args ([`COTSTrainingArguments`]): Device, number of replicas, precision.
    """

    def __init__(self, args: TrainingArguments):
        self.device = args.device
        shape, names = (args.world_size // args.shard_replicas,), ("shard",)
        if args.shard_replicas > 1:
            shape, names = (args.shard_replicas, *shape), ("replicate", *names)
        self.mesh: DeviceMesh = init_device_mesh(args.device.type, shape, mesh_dim_names=names)
        # Gathered in bfloat16, of which autocast would otherwise keep a copy of every layer until the backward pass.
        self.policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )

    def shard_(self, model: nn.Module, momentum_model: nn.Module) -> None:
        """
        Split a [`COTSForPreTraining`], and the [`COTSModel`] of its momentum copy, each into its own parts.

        Whoever holds parameters, as an optimizer does, has to be made afterwards.
        """
        # Halves of a batch are views, in which nobody writes.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        self._skeleton = _without_weights(model)
        for each in (model, momentum_model):
            for layer in reversed(encoder_layers(each)):
                self._split(layer)
            self._split(each)
        for name in ("encode_image", "encode_text"):
            register_fsdp_forward_method(momentum_model, name)
        self.momentum_model = momentum_model

    def _split(self, module: nn.Module) -> None:
        # The outermost module too, which by default stays whole after a forward pass, until the backward pass: the
        # momentum copy never has one.
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True, mp_policy=self.policy)

    def end_momentum_passes(self) -> None:
        """Forget in what order the momentum copy ran, which is noted for a backward pass that never comes."""
        assert isinstance(self.momentum_model, FSDPModule)
        self.momentum_model.reset_iter_state()

    def release_processes(self, model: nn.Module) -> None:
        """
        Let go of the process group, which the parts of a split model refer to; they can do nothing more.

        Its threads end with the last reference to it, and whoever has made the model may keep it for longer
        (`destroy_process_group`; tests/training/test_sharded_runs.py).
        """
        for module in chain(model.modules(), self.momentum_model.modules()):
            if isinstance(module, FSDPModule):
                for group in module._get_fsdp_state()._fsdp_param_groups:
                    vars(group.mesh_info).update(shard_process_group=None, replicate_process_group=None)
        self.mesh._pg_registry.clear()

    @torch.no_grad()
    def gather(self, model: nn.Module, *, keep: bool, device: torch.device | str = "cpu") -> nn.Module | None:
        """
        The model as it would be in a single process; every process must call this.

        Args:
            model: What `shard_` split.
            keep: Whether this process wants it; otherwise it takes part and gets `None`.
            device: Where the weights are put.
        """
        found, state = {}, {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in found:  # tied weights are gathered once
                full = full_tensor(tensor.detach())
                found[id(tensor)] = full.to(device) if keep else None
            state[name] = found[id(tensor)]
        if not keep:
            return None
        whole = copy.deepcopy(self._skeleton)
        whole.load_state_dict(state, assign=True)
        whole.tie_weights()
        return whole.to(device).train(model.training)


def load_whole_(model: nn.Module, folder: str):
    """
    Set a split model to the whole one that a folder holds, each process its own parts.

    Returns what `load_state_dict` does: the names that the file lacks, and those that the model does not know.
    """
    own, split = model.state_dict(), {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                split[name] = _split_like(own.get(name), file.get_tensor(name))
    try:
        return model.load_state_dict(split, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{folder} was saved with another model than this one. {error}") from error


def _split_like(own: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole weight, as its part of `own` is, where that is split."""
    if not isinstance(own, DTensor) or own.shape != weight.shape:
        return weight
    weight = weight.to(own.device, own.dtype)
    return distribute_tensor(weight, own.device_mesh, own.placements, src_data_rank=None)  # every process has it


def full_tensor(tensor):
    """The whole of a tensor that is split among the processes, all of which must call this; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters have shapes and no memory; `fully_shard` makes models that refuse copying."""
    shapes = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, shapes)
