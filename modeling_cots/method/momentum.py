"""`MomentumEncoder`: the frozen slow copy of both encoders (COTS, CVPR 2022, instance level; as in MoCo)."""

import copy
import os
import weakref

import safetensors.torch
import torch
from torch import nn

from .feature_queue import PairQueue

MOMENTUM_STATE_NAME = "momentum_state.safetensors"
# What states saved by 0.1 lack; without it no two captions count as equal, and no key as fresh.
NEW_IN_0_2 = {"encoder._extra_state", "queue.caption_ids", "queue.fresh_keys.drift", "queue.fresh_keys.num_fresh"}


class MomentumEncoder(nn.Module):
    """
    A copy of `model` whose weights follow it slowly: theta_m <- m * theta_m + (1 - m) * theta.

    The copy never gets a gradient and always runs in evaluation mode, so that an embedding that waits in the queue
    does not carry the noise of one dropout mask. It is kept in float32: a step of 1 - m = 0.01 vanishes in bfloat16.

    What does not train is not copied, as it would never differ: frozen weights in float32, and quantized ones, are
    shared with the online model and take neither memory nor room in a checkpoint.

    Args:
        model (`nn.Module`): The online model; it is copied, not kept.

    Attributes:
        is_copy (`bool`): Whether all weights are those of the online model: at the start, and after an update with
            momentum 0.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        named = list(model.named_parameters(remove_duplicate=False))
        self._shared = {name for name, parameter in named if _never_moves(parameter)}
        memo = {id(parameter): parameter for name, parameter in named if name in self._shared}
        self.model = copy.deepcopy(model, memo).float().requires_grad_(False).eval()
        self._paired_with: weakref.ref | None = None
        self._pairs: _Pairs | None = None
        self.is_copy = True
        self.check_copy_(model)

    def train(self, mode: bool = True) -> "MomentumEncoder":
        return super().train(False)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_paired_with": None, "_pairs": None}  # a copy has its own tensors

    def state_dict(self, *args, **kwargs) -> dict:
        """Without the weights that it shares with the online model."""
        state = super().state_dict(*args, **kwargs)
        for name in self.shared_names(kwargs.get("prefix", "")):
            state.pop(name, None)
        return state

    def shared_names(self, prefix: str = "") -> set[str]:
        """Names of the weights that it shares with the online model."""
        return {f"{prefix}model.{name}" for name in self._shared}

    @torch.no_grad()
    def separate_(self, model: nn.Module) -> None:
        """Copy the shared weights that train by now; to be called before they move."""
        online = dict(model.named_parameters(remove_duplicate=False))
        self._copy_({name: online[name] for name in self._shared if online[name].requires_grad})

    @torch.no_grad()
    def separate_all_(self, model: nn.Module) -> None:
        """Copy all shared weights, for a copy whose tensors are to be split apart from those of the model."""
        online = dict(model.named_parameters(remove_duplicate=False))
        self._copy_({name: online[name] for name in self._shared})

    def _copy_(self, weights: dict[str, nn.Parameter]) -> None:
        copies = {id(each): nn.Parameter(each.float().clone(), requires_grad=False) for each in weights.values()}
        for name, weight in weights.items():
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, copies[id(weight)])
        self._shared -= weights.keys()
        self._paired_with = None

    @torch.no_grad()
    def update_(self, model: nn.Module, momentum: float) -> None:
        """
        Move towards `model`, in place and in float32; buffers are copied. Of models that are split alike among
        processes each moves its own parts.

        The tensors of the two are paired at the first call with a model, as walking over all modules takes longer than
        moving them does on a GPU. Raises `ValueError` for a momentum outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"The momentum must be between 0 and 1, got {momentum}.")
        parameters, online_parameters = self._pairs_with(model).parameters()
        if parameters:  # `float` copies nothing that is float32 already
            own, online = ([_own_part(each) for each in tensors] for tensors in (parameters, online_parameters))
            torch._foreach_lerp_(own, [part.float() for part in online], 1 - momentum)
        for buffer, online_buffer in self._pairs_with(model).buffers():
            buffer.copy_(online_buffer)
        self.is_copy = momentum == 0 and all(parameter.dtype == torch.float32 for parameter in online_parameters)

    @torch.no_grad()
    def check_copy_(self, model: nn.Module) -> None:
        """Take `is_copy` back where weights of `model` differ: they may have been loaded since."""
        pairs = self._pairs_with(model)
        together = [*zip(*pairs.parameters(), strict=True), *pairs.buffers()]
        self.is_copy = self.is_copy and all(
            mine.dtype == other.dtype and torch.equal(_own_part(mine), _own_part(other)) for mine, other in together
        )

    def _pairs_with(self, model: nn.Module) -> "_Pairs":
        if self._pairs is None or self._paired_with is None or self._paired_with() is not model:
            self._pairs, self._paired_with = _Pairs(self.model, model), weakref.ref(model)
        return self._pairs

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.is_copy)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.is_copy = bool(state)


class _Pairs:
    """
    Where the tensors of two models of the same structure stand, the frozen one's first.

    Places are kept and not tensors: whatever stands there now is moved, after `.to(device)` and `load_state_dict` too.
    A tensor that both share stands still.
    """

    def __init__(self, slow: nn.Module, online: nn.Module):
        self._parameters, self._buffers = (_pair(slow, online, kind) for kind in ("_parameters", "_buffers"))

    def parameters(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        slow = [owner[name] for (owner, name), _ in self._parameters]
        return slow, [owner[name] for _, (owner, name) in self._parameters]

    def buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(slow[name], online[online_name]) for (slow, name), (online, online_name) in self._buffers]


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is split among processes; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _pair(slow: nn.Module, online: nn.Module, kind: str) -> list[tuple[tuple[dict, str], tuple[dict, str]]]:
    places = _places(slow, kind), _places(online, kind)
    names = [[name for _, name in found] for found in places]
    assert names[0] == names[1], "the momentum copy and the model differ in structure"
    pairs = zip(*places, strict=True)
    return [(mine, other) for mine, other in pairs if mine[0][mine[1]] is not other[0][other[1]]]


def _never_moves(parameter: nn.Parameter) -> bool:
    """Whether a weight is frozen, and in a type that the momentum copy can compute with as it is."""
    return not parameter.requires_grad and (parameter.dtype == torch.float32 or not parameter.is_floating_point())


def _places(model: nn.Module, kind: str) -> list[tuple[dict, str]]:
    """The dictionary and the name of every tensor of a model; one that several modules share counts once."""
    seen, places = set(), []
    for module in model.modules():
        owner = getattr(module, kind)
        for name, tensor in owner.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                places.append((owner, name))
    return places


class MomentumState(nn.Module):
    """
    The momentum encoders and the paired queues.

    Args:
        model (`COTSModel`): The online model that the momentum encoders copy.
        queue_size (`int`): N_Q.
    """

    def __init__(self, model: nn.Module, queue_size: int):
        super().__init__()
        self.encoder = MomentumEncoder(model)
        self.queue = PairQueue(queue_size, model.config.projection_dim)

    def save(self, folder: str) -> None:
        """Write `momentum_state.safetensors` into a checkpoint folder."""
        # Not `save_file`, which refuses tensors that share memory: encoders may tie parameters.
        safetensors.torch.save_model(self, os.path.join(folder, MOMENTUM_STATE_NAME))

    def load(self, folder: str) -> None:
        """Restore it. Raises `ValueError` where the file is missing, damaged, or of another model or queue."""
        path = os.path.join(folder, MOMENTUM_STATE_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{folder} has no {MOMENTUM_STATE_NAME}: without the momentum encoders and the queues training would "
                "not go on where it stopped. Resume from a checkpoint of COTSTrainer, or start a new run with this "
                "one as its model."
            )
        self.check_queue_size(_saved_queue_size(path), path)
        self.take(safetensors.torch.load_file(path), path)

    def check_queue_size(self, saved_size: int, path: str) -> None:
        """Raise `ValueError` where `path` holds a queue of another size."""
        if saved_size != self.queue.size:
            raise ValueError(f"{path} holds a queue of {saved_size} pairs, and queue_size is {self.queue.size}.")

    def take(self, saved: dict[str, torch.Tensor], path: str) -> None:
        """Restore what was read from `path`. Raises `ValueError` where it is of another model."""
        try:
            missing, unexpected = self._take(saved, path)
        except RuntimeError as error:
            raise ValueError(f"{path} was saved with another model than this one. {error}") from error
        if missing or unexpected:
            raise ValueError(
                f"{path} was saved with another model than this one, which names {sorted(missing)} otherwise, "
                f"and not {sorted(unexpected)}."
            )

    def _take(self, saved: dict[str, torch.Tensor], path: str) -> tuple[list[str], list[str]]:
        """Load tensors by their names; returns the names that are missing, and those that are not known."""
        shared = self.encoder.shared_names("encoder.")
        weights = dict(self.named_parameters(remove_duplicate=False))
        for name in shared & saved.keys():  # written while they were copied; what is shared belongs to the model
            if not torch.equal(saved.pop(name), weights[name].cpu()):
                raise ValueError(
                    f"{path} is of a run in which {name.removeprefix('encoder.model.')} trained, and it is frozen "
                    "now: let the same weights train, or start a new run with the checkpoint as its model."
                )
        missing, unexpected = self.load_state_dict(saved, strict=False)
        if not missing:
            return missing, unexpected
        own = self.state_dict()
        found = {own[name].data_ptr() for name in saved.keys() & own.keys()}  # tied weights are saved once
        known = NEW_IN_0_2 | shared
        return [name for name in missing if name not in known and own[name].data_ptr() not in found], unexpected


def _saved_queue_size(path: str) -> int:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_slice("queue.scores").get_shape()[0]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or holds no momentum state: {error}.") from error
