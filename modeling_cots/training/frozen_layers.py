"""Frozen layers of an encoder: they run once a step, for the online encoder and for its momentum copy.

Layers that never train are the same in both. The online encoder's run, in evaluation mode and without a gradient, and
their outputs of the unmasked pass are replayed in the momentum encoder, which goes on from there.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

ALL, NONE = "all", "none"


def check_freeze(name: str, freeze: str) -> None:
    """Raise `ValueError` for what is neither `all`, `none` nor a number of layers."""
    if freeze not in (ALL, NONE) and not (freeze.isdecimal() and int(freeze) > 0):
        raise ValueError(f"{name} must be `all`, `none` or a number of layers from below, got {freeze!r}.")


class FrozenLayers:
    """
    The frozen part of one encoder.

    Args:
        encoder: The online encoder; its frozen weights lose their gradient.
        freeze: `all`, or the number of layers from below that are frozen, with the embeddings and all else that runs
            before the other layers.
        kind: "vision" or "text", for messages.

    Raises `ValueError` for more layers than the encoder has, and for an encoder whose layers cannot be told apart.
    """

    def __init__(self, encoder: PreTrainedModel, freeze: str, kind: str):
        self.encoder, self.kind = encoder, kind
        self.replayed, self.skipped = [""], []  # names of modules; "" is the encoder itself
        self.num_layers = self.num_frozen = _count_layers(encoder)
        self.is_whole = freeze == ALL
        self._modules: list[nn.Module] = list(encoder.modules())
        self._outer: list[nn.Module] = []  # that hold frozen modules and others
        if not self.is_whole:
            self._choose_layers(int(freeze))
        for module in {*self._modules, *self._outer}:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self._outputs: dict[str, object] = {}
        self._is_recording = False
        for name in self.replayed:
            encoder.get_submodule(name).register_forward_hook(self._recorder(name))

    def _choose_layers(self, num_frozen: int) -> None:
        name, layers = _find_layers(self.encoder, self.kind)
        if num_frozen > len(layers):
            raise ValueError(
                f"freeze_{self.kind}={num_frozen}, and the {self.kind} encoder has {len(layers)} layers: give a "
                "smaller number, or `all`."
            )
        self.num_frozen = num_frozen
        names = [f"{name}.{number}" for number in range(num_frozen)]
        self.skipped, self.replayed = names[:-1], names[-1:]
        if isinstance(getattr(self.encoder, "embeddings", None), nn.Module):
            self.replayed = ["embeddings", *self.replayed]
        # What runs after these layers: the other layers, and what the encoder registers behind them, as a last norm.
        children = dict(self.encoder.named_children())
        later = list(children)[list(children).index(name.partition(".")[0]) + 1 :]
        running = [*layers[num_frozen:], *(children[child] for child in later)]
        trained = {id(module) for each in running for module in each.modules()}
        self._outer = [
            module
            for prefix, module in self.encoder.named_modules()
            if not prefix or f"{name}.".startswith(f"{prefix}.")
        ]
        trained |= {id(module) for module in self._outer}
        self._modules = [module for module in self._modules if id(module) not in trained]

    def describe(self) -> str:
        """What is frozen, in words."""
        if self.is_whole:
            return f"the {self.kind} encoder whole"
        return f"of the {self.kind} encoder the embeddings and the lower {self.num_frozen} of {self.num_layers} layers"

    def eval_(self) -> None:
        """Put the frozen modules into evaluation mode, whatever mode the others are in."""
        for module in self._modules:
            module.training = False

    def _recorder(self, name: str) -> Callable:
        def record(module, args, output):
            if not self._is_recording:
                return output
            # Activation checkpointing makes embeddings require a gradient; that of frozen layers reaches nothing.
            output = detached(output)
            self._outputs.setdefault(name, output)  # the unmasked pass comes first
            return output

        return record

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, frozen layers pass no gradient, and their outputs of the online encoder's first pass are kept."""
        self._outputs.clear()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    @contextmanager
    def replay(self, encoder: nn.Module) -> Iterator[None]:
        """
        Inside, the frozen layers of `encoder`, the momentum copy, give the first rows of what was recorded.

        What is recorded is replayed once; without anything recorded the layers run.
        """
        with ExitStack() as stack:
            if not self._outputs:
                yield
                return
            for name in self.replayed:
                stack.enter_context(replaced(encoder.get_submodule(name), Replay(self._outputs[name])))
            gives_tuple = isinstance(self._outputs[self.replayed[-1]], tuple)
            for name in self.skipped:
                stack.enter_context(replaced(encoder.get_submodule(name), _Identity(gives_tuple)))
            try:
                yield
            finally:
                self._outputs.clear()


def detached(output):
    """An encoder's output, whose tensors pass no gradient."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, output)


def _count_layers(encoder: PreTrainedModel) -> int:
    return encoder.config.num_hidden_layers


def _find_layers(encoder: PreTrainedModel, kind: str) -> tuple[str, nn.ModuleList]:
    for name, module in encoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == _count_layers(encoder):
            return name, module
    raise ValueError(
        f"The layers of this `{encoder.config.model_type}` encoder cannot be told apart: set freeze_{kind} to `all` "
        "or `none`."
    )


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, `module` runs `forward`, and not what it may have been compiled to."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    outer = module.__dict__.get("forward")  # this may be inside of another replacement
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if outer is not None:
            module.forward = outer
        module._compiled_call_impl = compiled


class Replay:
    """Gives what was recorded, for as many rows as it is called with: those after the rows of the calls before."""

    def __init__(self, output):
        self.output, self.start = output, 0

    def __call__(self, *args, **kwargs):
        size = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)).shape[0]
        rows = slice(self.start, self.start + size)
        self.start += size
        return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, torch.Tensor) else leaf, self.output)


class _Identity:
    def __init__(self, gives_tuple: bool):
        self.gives_tuple = gives_tuple

    def __call__(self, hidden_states, *args, **kwargs):
        return (hidden_states,) if self.gives_tuple else hidden_states


class FrozenEncoders:
    """
    The frozen layers of both encoders of a model, none of which may be frozen at all.

    Args:
        model ([`COTSModel`]): The online model.
        freeze_vision, freeze_text: See [`COTSTrainingArguments`].
    """

    def __init__(self, model: nn.Module, freeze_vision: str, freeze_text: str):
        wanted = {"vision": freeze_vision, "text": freeze_text}
        self.parts = {
            kind: FrozenLayers(getattr(model, f"{kind}_model"), freeze, kind)
            for kind, freeze in wanted.items()
            if freeze != NONE
        }

    def describe(self) -> str | None:
        """What is frozen, in words; `None` for nothing."""
        return " and ".join(part.describe() for part in self.parts.values()) or None

    def eval_(self) -> None:
        """Put all frozen layers into evaluation mode."""
        for part in self.parts.values():
            part.eval_()

    def is_whole(self, kind: str | None) -> bool:
        """Whether nothing of the "vision" or "text" encoder trains."""
        return kind in self.parts and self.parts[kind].is_whole

    def num_trained_vision_layers(self, num_layers: int) -> int:
        """Layers of the vision encoder, which has `num_layers`, that train."""
        return num_layers - self.parts["vision"].num_frozen if "vision" in self.parts else num_layers

    @contextmanager
    def record(self) -> Iterator[None]:
        """Inside, the online model runs."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.record())
            yield

    @contextmanager
    def replay(self, momentum_model: nn.Module) -> Iterator[None]:
        """Inside, the momentum model runs on the same batch, for the first time since."""
        with ExitStack() as stack:
            for kind, part in self.parts.items():
                stack.enter_context(part.replay(getattr(momentum_model, f"{kind}_model")))
            yield
