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
        state = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        safetensors.torch.save_file(state, os.path.join(folder, MOMENTUM_STATE_NAME))

    def load(self, folder: str) -> None:
        """Restore it. Raises `ValueError` where the file is missing or does not fit this model and queue."""
        path = os.path.join(folder, MOMENTUM_STATE_NAME)
        if not os.path.isfile(path):
            raise ValueError(
                f"{folder} has no {MOMENTUM_STATE_NAME}: without the momentum encoders and the queues training would "
                "not go on where it stopped. Resume from a checkpoint of COTSTrainer, or start a new run with this "
                "one as its model."
            )
        state = safetensors.torch.load_file(path)
        saved_size = len(state["queue.scores"])
        if saved_size != self.queue.size:
            raise ValueError(f"{path} holds a queue of {saved_size} pairs, and queue_size is {self.queue.size}.")
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} was saved with another model than this one. {error}") from error


__all__ = ["MOMENTUM_STATE_NAME", "MomentumState"]
