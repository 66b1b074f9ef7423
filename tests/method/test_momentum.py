"""The momentum copy against its closed form, and that it stays out of training."""

import copy

import pytest
import torch
from torch import nn

from modeling_cots.method.momentum import MomentumEncoder


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def move(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_equals_the_closed_form_after_many_updates(model):
    """theta constant: theta_m after n updates is theta + m^n (theta_m - theta)."""
    slow = MomentumEncoder(model)
    start = slow.model[0].weight.clone()
    move(model, 2.0)
    for _ in range(20):
        slow.update_(model, 0.9)
    torch.testing.assert_close(slow.model[0].weight, 2.0 + 0.9**20 * (start - 2.0))


def test_extremes_copy_and_stand_still(model):
    slow = MomentumEncoder(model)
    start = slow.model[0].weight.clone()
    move(model, 2.0)
    slow.update_(model, 1.0)
    torch.testing.assert_close(slow.model[0].weight, start, rtol=0, atol=0)
    slow.update_(model, 0.0)
    torch.testing.assert_close(slow.model[0].weight, model[0].weight, rtol=0, atol=0)


def test_stays_frozen_and_in_evaluation_mode(model):
    slow = MomentumEncoder(model)
    slow.train()
    assert not any(module.training for module in slow.modules())
    assert not any(parameter.requires_grad for parameter in slow.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    slow.update_(model, 0.5)
    assert all(parameter.grad_fn is None for parameter in slow.parameters())


def test_copies_buffers(model):
    slow = MomentumEncoder(model)
    model(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(slow.model[1].running_mean, model[1].running_mean)
    slow.update_(model, 0.99)
    assert torch.equal(slow.model[1].running_mean, model[1].running_mean)
    assert slow.model[1].num_batches_tracked == 1


def test_follows_a_bfloat16_model_in_float32(model):
    """In bfloat16, 1 + 0.01 * (1.5 - 1) rounds back to 1 and the copy would never move."""
    move(model, 1.0)
    slow = MomentumEncoder(model.to(torch.bfloat16))
    move(model, 1.5)
    slow.update_(model, 0.99)
    assert slow.model[0].weight.dtype == torch.float32
    torch.testing.assert_close(slow.model[0].weight, torch.full((3, 4), 1.005))


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_refuses_a_momentum_outside_0_and_1(model, momentum):
    with pytest.raises(ValueError, match="between 0 and 1"):
        MomentumEncoder(model).update_(model, momentum)


def test_equals_a_loop_while_the_model_moves(model):
    """theta_m <- m * theta_m + (1 - m) * theta, one number at a time in float64, theta new at each step."""
    slow = MomentumEncoder(model)
    twin = {name: parameter.double().tolist() for name, parameter in _flat(slow.model).items()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        slow.update_(model, 0.7)
        for name, parameter in _flat(model).items():
            online = parameter.double().tolist()
            twin[name] = [0.7 * old + (1 - 0.7) * new for old, new in zip(twin[name], online, strict=True)]
    for name, parameter in _flat(slow.model).items():
        torch.testing.assert_close(parameter.double(), torch.tensor(twin[name], dtype=torch.float64))


def _flat(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}


def test_tied_weights_move_once(model):
    tied = nn.ModuleList([model, nn.Linear(4, 3)])
    tied[1].weight = model[0].weight
    move(tied, 1.0)
    slow = MomentumEncoder(tied)
    move(tied, 2.0)
    slow.update_(tied, 0.9)
    assert slow.model[1].weight is slow.model[0][0].weight
    torch.testing.assert_close(slow.model[1].weight, torch.full((3, 4), 1.1))


def test_updates_in_place_and_under_autocast(model):
    """A compiled encoder holds on to the tensors themselves: none may be replaced, and none may change its type."""
    slow = MomentumEncoder(model)
    before = [parameter.data_ptr() for parameter in slow.parameters()]
    move(model, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slow.update_(model, 0.5)
    assert [parameter.data_ptr() for parameter in slow.parameters()] == before
    assert all(parameter.dtype == torch.float32 for parameter in slow.parameters())
    assert torch.equal(model[0].weight, torch.full((3, 4), 2.0))


@torch.no_grad()
def test_pairs_once_and_follows_what_moved_since(model):
    """Moved, loaded, replaced: the tensors that stand in the model now are followed, and the pairing stays."""
    slow = MomentumEncoder(model)
    slow.update_(model, 0.5)
    pairs = slow._pairs
    slow.double().float()
    model.double()
    model[0].weight = nn.Parameter(torch.full((3, 4), 2.0))
    model.load_state_dict({name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()})
    slow.update_(model, 0.0)
    assert slow._pairs is pairs
    assert all(torch.equal(parameter, torch.full_like(parameter, 2.0)) for parameter in slow.model.parameters())


def test_a_copy_follows_the_model_and_not_a_copy_of_it(model):
    slow = MomentumEncoder(model)
    slow.update_(model, 0.5)
    twin = copy.deepcopy(slow)
    move(model, 3.0)
    twin.update_(model, 0.0)
    assert torch.equal(twin.model[0].weight, model[0].weight)
    other = copy.deepcopy(model)
    move(other, 4.0)
    twin.update_(other, 0.0)
    assert torch.equal(twin.model[0].weight, other[0].weight)


# What does not train


def test_frozen_weights_are_shared_and_the_rest_is_copied(model):
    model[0].requires_grad_(False)
    slow = MomentumEncoder(model)
    assert slow.model[0].weight is model[0].weight and slow.model[1].weight is not model[1].weight
    before = model[0].weight.clone()
    move(model[1], 2.0)
    slow.update_(model, 0.0)
    assert torch.equal(model[0].weight, before) and torch.equal(slow.model[1].weight, model[1].weight)
    assert not any("model.0." in name for name in slow.state_dict()) and "model.1.weight" in slow.state_dict()
    slow.train()
    assert model.training and model[1].weight.requires_grad


def test_frozen_weights_in_half_precision_are_copied_in_float32(model):
    slow = MomentumEncoder(model.to(torch.bfloat16).requires_grad_(False))
    assert model[0].weight.dtype == torch.bfloat16 and slow.model[0].weight.dtype == torch.float32


def test_weights_that_train_after_all_get_a_copy_of_their_own(model):
    tied = nn.ModuleList([model, nn.Linear(4, 3)])
    tied[1].weight = model[0].weight
    tied.requires_grad_(False)
    slow = MomentumEncoder(tied)
    slow.update_(tied, 0.5)
    model[0].requires_grad_(True)
    slow.separate_(tied)
    assert slow.model[0][0].weight is slow.model[1].weight is not model[0].weight
    assert not slow.model[0][0].weight.requires_grad and slow.model[0][1].weight is model[1].weight
    start = slow.model[0][0].weight.clone()
    move(model[0], 2.0)
    slow.update_(tied, 0.5)
    torch.testing.assert_close(slow.model[1].weight, 0.5 * start + 1.0)
    assert "model.0.0.weight" in slow.state_dict()
