"""`MomentumEncoder`: the frozen slow copy of the two streams (COTS, CVPR 2022, instance level; as in MoCo)."""

import copy

import torch
from torch import nn


class MomentumEncoder(nn.Module):
    """
    A copy of `model` whose weights follow it slowly: theta_m <- m * theta_m + (1 - m) * theta.

    The copy never gets a gradient and always runs in evaluation mode, so that an embedding that waits in the queue
    does not carry the noise of one drop-out mask. It is kept in float32: a step of 1 - m = 0.01 vanishes in bfloat16.

    Args:
        model (`nn.Module`): The online model; it is copied, not kept.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MomentumEncoder":
        return super().train(False)

    @torch.no_grad()
    def update_(self, model: nn.Module, momentum: float) -> None:
        """Move towards `model`, in place and in float32; buffers are copied. Raises `ValueError` outside [0, 1]."""
        if not 0 <= momentum <= 1:
            raise ValueError(f"The momentum must be between 0 and 1, got {momentum}.")
        online = dict(model.named_parameters())
        slow = dict(self.model.named_parameters())
        assert online.keys() == slow.keys(), "the momentum copy and the model differ in structure"
        torch._foreach_lerp_(list(slow.values()), [online[name].detach().float() for name in slow], 1 - momentum)
        for buffer, online_buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(online_buffer)


__all__ = ["MomentumEncoder"]
