"""Weights in bfloat16 that are trained in float32: the optimizer keeps a float32 copy of each, its master weight.

A step of a small learning rate vanishes in the eight bits of bfloat16, so it is taken on the master weights, of which
the model's are rounded copies. Without the casts of autocast, activations take less memory. torch has this only for
sharded models (`MixedPrecisionPolicy` of FSDP2).
"""

import copy
from typing import Any

import torch
from torch import nn

FLOAT32, BFLOAT16 = "float32", "bfloat16"
MASTER = "master"


def check_param_dtype(args) -> None:
    """Raise `ValueError` for a `param_dtype` that is none, and beside what it was never tried with."""
    if args.param_dtype not in (FLOAT32, BFLOAT16):
        raise ValueError(f"param_dtype must be {FLOAT32} or {BFLOAT16}, got {args.param_dtype!r}.")
    if args.param_dtype == FLOAT32:
        return
    if args.optim not in OPTIMIZERS:
        raise ValueError(
            f"param_dtype=bfloat16 needs one of the optimizers {', '.join(OPTIMIZERS)}, got optim={args.optim}."
        )
    if args.gradient_accumulation_steps > 1:
        raise ValueError(
            "param_dtype=bfloat16 would add up gradients in bfloat16: set gradient_accumulation_steps to 1."
        )
    if args.world_size > 1:
        raise ValueError("param_dtype=bfloat16 trains in one process: leave it out, or set bf16 for several.")
    others = {
        "bf16": args.bf16,
        "fp16": args.fp16,
        "compile_layers": args.compile_layers,
        "torch_compile": args.torch_compile,
        "freeze_vision": args.freeze_vision != "none",
        "freeze_text": args.freeze_text != "none",
        "encoder_learning_rate": args.encoder_learning_rate is not None,
    }
    for name, is_set in others.items():
        if is_set:
            raise ValueError(f"param_dtype=bfloat16 was never tried beside {name}: leave one of them out.")


@torch.no_grad()
def to_bfloat16_(model: nn.Module) -> None:
    """Make weights and buffers bfloat16 in place, but for buffers that are not saved, such as rotary frequencies."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16)


class MasterWeights(torch.optim.Optimizer):
    """
    An optimizer of float32 copies of its parameters, which are written back in the parameters' own type.

    Args:
        params: Parameters or groups of them, as of any optimizer.
        options: Of the optimizer that a subclass names.
    """

    inner_class: type[torch.optim.Optimizer]

    def __init__(self, params, **options):
        super().__init__(params, options)
        groups = [{**group, "params": [_master_of(each) for each in group["params"]]} for group in self.param_groups]
        self.inner = self.inner_class(groups, **options)
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):  # with its defaults
            group.update({name: value for name, value in own.items() if name != "params"})

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every parameter with its master weight."""
        return [
            pair
            for group, own in zip(self.param_groups, self.inner.param_groups, strict=True)
            for pair in zip(group["params"], own["params"], strict=True)
        ]

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the master weights; parameters without a gradient stay."""
        assert closure is None, "the Trainer passes none"
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})  # schedules change the rate
        pairs = [(weight, master) for weight, master in self._pairs() if weight.grad is not None]
        for weight, master in pairs:
            master.grad = weight.grad.float()
        self.inner.step()
        for weight, master in pairs:
            weight.copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer of the master weights, with each of them as `master` in its state."""
        state = self.inner.state_dict()
        parts = dict(state["state"])
        for index, (_, master) in enumerate(self._pairs()):
            parts[index] = {**parts.get(index, {}), MASTER: master.detach()}
        groups = [
            {**group, "params": saved["params"]}
            for group, saved in zip(self.param_groups, state["param_groups"], strict=True)
        ]
        return {"state": parts, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it exactly; the parameters themselves belong to the model's checkpoint."""
        state = {index: dict(values) for index, values in state_dict["state"].items()}
        for index, (_, master) in enumerate(self._pairs()):
            if MASTER not in state.get(index, {}):
                raise ValueError(
                    "The optimizer's state has no float32 master weights: resume with the param_dtype that the "
                    "checkpoint was made with, or start a new run with it as its model."
                )
            master.copy_(state[index].pop(MASTER))
        state = {index: values for index, values in state.items() if values}
        self.inner.load_state_dict({**state_dict, "state": state})
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(copy.deepcopy({name: value for name, value in saved.items() if name != "params"}))


def _master_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float().clone()


class MasterAdamW(MasterWeights):
    """torch's AdamW on master weights."""

    inner_class = torch.optim.AdamW


class MasterAdam(MasterWeights):
    """torch's Adam on master weights."""

    inner_class = torch.optim.Adam


# By the names of `optim`, as far as they were tried.
OPTIMIZERS = {"adamw_torch": MasterAdamW, "adamw_torch_fused": MasterAdamW, "adam": MasterAdam}
