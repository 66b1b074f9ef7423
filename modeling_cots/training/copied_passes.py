"""The pass of a momentum encoder that equals the online one: it is computed once.

While queued keys are stale (`method/fresh_keys.py`) the momentum is 0, and the momentum copy is the online model. Its
pass is then the online unmasked one in evaluation mode. In training mode that is the same function where the pass
drew no random number, as dropout, dropped layers and NEFTune do, and where no layer normalizes by its batch.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .frozen_layers import FrozenEncoders, Replay, detached, replaced

KINDS = "vision", "text"


def depends_on_batch(encoder: nn.Module) -> bool:
    """Whether what an encoder gives for a sample depends on the others."""
    return any(isinstance(module, _BatchNorm) for module in encoder.modules())


class CopiedPass:
    """
    The output of one online encoder's unmasked pass, as long as its momentum copy would compute the same.

    Args:
        encoder: The online encoder.
    """

    def __init__(self, encoder: nn.Module):
        self._depends_on_batch = depends_on_batch(encoder)
        self._is_recording = False
        self._generator: torch.Tensor | None = None
        self._output: object = None
        encoder.register_forward_pre_hook(self._begin)
        encoder.register_forward_hook(self._end)

    def _begin(self, module, args) -> None:
        if self._is_recording:
            self._generator = _generator_state(module)

    def _end(self, module, args, output) -> None:
        if not self._is_recording:
            return
        self._is_recording = False  # the unmasked pass comes first
        if self._generator is not None and torch.equal(self._generator, _generator_state(module)):
            self._output = detached(output)

    @contextmanager
    def record(self, is_copy: bool) -> Iterator[None]:
        """Inside, the online encoder runs; `is_copy` says whether the momentum copy has the same weights."""
        self._output = None
        self._is_recording = is_copy and not self._depends_on_batch
        try:
            yield
        finally:
            self._is_recording = False

    @contextmanager
    def replay(self, encoder: nn.Module) -> Iterator[None]:
        """Inside, `encoder`, the momentum copy, gives what was recorded, once; without anything recorded it runs."""
        if self._output is None:
            yield
            return
        try:
            with replaced(encoder, Replay(self._output)):
                yield
        finally:
            self._output = None


def _generator_state(module: nn.Module) -> torch.Tensor:
    """The state, on the CPU, of the generator that the module's device draws from."""
    device = next(module.parameters()).device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class CopiedPasses:
    """
    The passes of both encoders.

    Args:
        model ([`COTSModel`]): The online model.
        is_copy: Whether the momentum copy has the weights of the online model now.
        frozen ([`FrozenEncoders`]): Encoders that are frozen whole, whose outputs it replays already, are left to it.
    """

    def __init__(self, model: nn.Module, is_copy: Callable[[], bool], frozen: FrozenEncoders):
        self.is_copy = is_copy
        encoders = {f"{kind}_model": kind for kind in KINDS if not frozen.is_whole(kind)}
        self._passes = {name: CopiedPass(getattr(model, name)) for name in encoders}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, the online model runs."""
        is_copy = self.is_copy()
        with ExitStack() as stack:
            for each in self._passes.values():
                stack.enter_context(each.record(is_copy))
            yield

    @contextmanager
    def replay(self, momentum_model: nn.Module) -> Iterator[None]:
        """Inside, the momentum model runs on the same batch, for the first time since."""
        with ExitStack() as stack:
            for name, each in self._passes.items():
                stack.enter_context(each.replay(getattr(momentum_model, name)))
            yield
