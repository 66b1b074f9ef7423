"""All tensors that a resumed run has to bring back."""

import torch


def state_of(trainer) -> dict[str, torch.Tensor]:
    state = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    state |= {f"momentum.{name}": tensor for name, tensor in trainer.momentum_state.state_dict().items()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return {name: tensor.clone() for name, tensor in state.items()}
