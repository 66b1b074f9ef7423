"""`MomentumState`: what COTS training carries beside the model, saved with every checkpoint and restored exactly."""

import os

import safetensors.torch
from torch import nn

from .feature_queue import PairQueue
from .momentum import MomentumEncoder

MOMENTUM_STATE_NAME = "momentum_state.safetensors"


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
        saved_size = _saved_queue_size(path)
        if saved_size != self.queue.size:
            raise ValueError(f"{path} holds a queue of {saved_size} pairs, and queue_size is {self.queue.size}.")
        try:
            safetensors.torch.load_model(self, path)
        except RuntimeError as error:
            raise ValueError(f"{path} was saved with another model than this one. {error}") from error


def _saved_queue_size(path: str) -> int:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_slice("queue.scores").get_shape()[0]
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or holds no momentum state: {error}.") from error


__all__ = ["MOMENTUM_STATE_NAME", "MomentumState"]
