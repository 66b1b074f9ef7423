"""Several processes that train one model: what they have to share, how they are launched, and how they end."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed.distributed_c10d as c10d
import torch.distributed.nn.functional
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

SHARED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # that fresh weights may have


@dataclass
class ProcessGroup:
    """
    What the objective needs of the processes and of their precision; the default is one process in float32.

    Args:
        index: Number of this process.
        count: Number of processes.
        gather: (B, ...) of every process -> (count * B, ...), in the order of the processes.
        gather_with_gradient: The same, and the gradients of all processes flow back to what each has given.
        sum: A tensor of every process -> their sum.
        autocast: Opens the context in which the encoders run.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    gather_with_gradient: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @classmethod
    def of(cls, accelerator: Accelerator) -> "ProcessGroup":
        """The processes of an accelerator."""
        return cls(
            index=accelerator.process_index,
            count=accelerator.num_processes,
            gather=accelerator.gather,
            gather_with_gradient=_gather_with_gradient if accelerator.num_processes > 1 else lambda tensor: tensor,
            sum=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
            autocast=accelerator.autocast,
        )


def _gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(torch.distributed.nn.functional.all_gather(tensor))


@torch.no_grad()
def share_weights_(model: nn.Module, args: TrainingArguments) -> None:
    """
    Give every process the weights of the first: fresh ones differ where a user has set no seed.

    What is quantized is left: it has been loaded, and so is the same in all.
    """
    if args.world_size == 1:
        return
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dtype not in SHARED_DTYPES or type(tensor.data) is not torch.Tensor:
            continue
        shared = tensor.data.to(args.device).contiguous()
        torch.distributed.broadcast(shared, src=0)
        tensor.data.copy_(shared)


def check_launch(args: TrainingArguments) -> None:
    """Raise `ValueError` for processes that do not see each other, and for one process that sees several GPUs."""
    num_launched = int(os.environ.get("WORLD_SIZE", 1))
    if num_launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{num_launched} processes were launched and each takes itself for the only one, so that all would train "
            "alone and write to the same folder: without GPUs add --use_cpu."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs: start one for each, `torchrun --nproc_per_node {args.n_gpu} ...`."
        )


def check_not_split_elsewhere(is_split: bool) -> None:
    """Raise `ValueError` for a launch of accelerate that splits the model: it would leave out the momentum copy."""
    if is_split:
        raise ValueError(
            "FSDP and DeepSpeed of accelerate do not know of the momentum copy: launch without them, and set "
            "shard_model to split the model and its copy among the processes."
        )


def set_timeout(args: TrainingArguments) -> None:
    """
    Hold several processes on CPUs to `ddp_timeout`.

    The Trainer passes the timeout only to processes with GPUs; others would wait 30 minutes for one that hangs.
    """
    if args.world_size > 1 and args.device.type == "cpu":
        set_group_timeout = getattr(torch.distributed, "set_timeout", None) or c10d._set_pg_timeout  # its older name
        set_group_timeout(args.ddp_timeout_delta, torch.distributed.group.WORLD)


def use_float16_on_cpu(accelerator: Accelerator) -> None:
    """Train in float16 where `fp16` was asked for on a CPU: accelerate would silently train in float32."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")


def mark_repeated_samples(batch: dict[str, torch.Tensor], num_real: int, process_index: int) -> None:
    """
    Take the samples out of an epoch's last batch that only make the batches of all processes equally long.

    accelerate repeats samples from the beginning of the epoch. With the pair id -1 and not `valid` they enter no loss,
    no queue and no count, so that a short last batch equals that of one process.

    Args:
        batch: Of this process; changed in place.
        num_real: Samples of the global batch that are no repetition; 0 means all.
        process_index: Of this process.
    """
    if num_real == 0:
        return
    first_repeated = max(0, num_real - process_index * len(batch["valid"]))
    batch["valid"][first_repeated:] = False
    batch["pair_ids"][first_repeated:] = -1


def destroy_process_group(accelerator: Accelerator) -> None:
    """
    Leave the other processes, so that this one can end; nothing else may refer to the process group any more.

    The threads of gloo let go of a tensor some time after its result is there. Where that happens while the
    interpreter shuts down, the process is aborted ("terminate called without an active exception") after all of its
    work is done, and the launch fails (https://github.com/pytorch/pytorch/pull/179291). They are waited for when the
    last reference to the process group goes (tests/training/test_distributed.py).
    """
    accelerator.free_memory()
    accelerator.end_training()
