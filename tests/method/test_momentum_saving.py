"""Momentum copy and queues on disk: what comes back is what was saved, and nothing else is taken for it."""

from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

from modeling_cots.method.momentum import MOMENTUM_STATE_NAME, NEW_IN_0_2, MomentumState

QUEUE_SIZE = 5


class TwoStreams(nn.Module):
    """As much of a model as the state needs to know: parameters, a buffer and the embedding size."""

    def __init__(self, embed_dim: int = 4, seed: int = 0):
        super().__init__()
        self.config = SimpleNamespace(projection_dim=embed_dim)
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, embed_dim, generator=generator))
        self.register_buffer("position", torch.arange(3))


def push(state: MomentumState, first: int, count: int) -> None:
    numbers = torch.arange(first, first + count)
    embeds = numbers.float().unsqueeze(1).expand(count, 4)
    state.queue.push(embeds, -embeds, numbers.float() / 10, numbers)


@pytest.fixture
def trained() -> MomentumState:
    """A copy that has followed another model half way, and a queue past its first lap."""
    state = MomentumState(TwoStreams(), QUEUE_SIZE)
    state.encoder.update_(TwoStreams(seed=1), 0.5)
    push(state, 0, 7)
    return state


def test_comes_back_exactly_and_goes_on_alike(trained, tmp_path):
    trained.save(str(tmp_path))
    restored = MomentumState(TwoStreams(seed=2), QUEUE_SIZE)
    restored.load(str(tmp_path))
    for state in (trained, restored):
        state.encoder.update_(TwoStreams(seed=3), 0.9)
        push(state, 7, 2)
    expected, got = trained.state_dict(), restored.state_dict()
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)
    assert sorted(restored.queue.pair_ids.tolist()) == [4, 5, 6, 7, 8]


def test_a_partly_filled_queue_stays_partly_filled(tmp_path):
    state = MomentumState(TwoStreams(), QUEUE_SIZE)
    push(state, 0, 2)
    state.save(str(tmp_path))
    restored = MomentumState(TwoStreams(), QUEUE_SIZE)
    push(restored, 0, 20)
    restored.load(str(tmp_path))
    assert restored.queue.filled.tolist() == [True, True, False, False, False]


def test_the_copy_is_still_frozen_after_loading(trained, tmp_path):
    trained.save(str(tmp_path))
    trained.load(str(tmp_path))
    trained.train()
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    assert not any(module.training for module in trained.encoder.modules())


def test_tied_parameters_come_back_tied(tmp_path):
    def tied(seed: int) -> TwoStreams:
        model = TwoStreams(seed=seed)
        model.same_weight = model.weight
        return model

    state = MomentumState(tied(0), QUEUE_SIZE)
    state.encoder.update_(tied(1), 0.5)
    state.save(str(tmp_path))
    restored = MomentumState(tied(2), QUEUE_SIZE)
    restored.load(str(tmp_path))
    assert torch.equal(restored.encoder.model.weight, state.encoder.model.weight)
    restored.encoder.update_(tied(3), 0.9)
    assert torch.equal(restored.encoder.model.same_weight, restored.encoder.model.weight)


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", None])
def test_a_damaged_file_is_an_error(trained, tmp_path, damage):
    trained.save(str(tmp_path))
    path = tmp_path / MOMENTUM_STATE_NAME
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    with pytest.raises(ValueError, match="is damaged"):
        trained.load(str(tmp_path))


def test_a_missing_file_is_an_error(trained, tmp_path):
    with pytest.raises(ValueError, match=f"has no {MOMENTUM_STATE_NAME}"):
        trained.load(str(tmp_path))


def test_a_queue_of_another_size_is_an_error(trained, tmp_path):
    trained.save(str(tmp_path))
    with pytest.raises(ValueError, match="queue of 5 pairs, and queue_size is 6"):
        MomentumState(TwoStreams(), 6).load(str(tmp_path))


def test_a_model_of_another_width_is_an_error(trained, tmp_path):
    trained.save(str(tmp_path))
    with pytest.raises(ValueError, match="(?s)another model.*encoder.model.weight"):
        MomentumState(TwoStreams(embed_dim=8), QUEUE_SIZE).load(str(tmp_path))


def test_a_model_with_a_further_layer_is_an_error(trained, tmp_path):
    deeper = TwoStreams()
    deeper.layer = nn.Linear(4, 4)
    trained.save(str(tmp_path))
    with pytest.raises(ValueError, match="(?s)another model.*encoder.model.layer.weight"):
        MomentumState(deeper, QUEUE_SIZE).load(str(tmp_path))


def test_a_state_that_0_1_saved_is_taken_with_captions_and_freshness_unknown(trained, tmp_path):
    trained.save(str(tmp_path))
    path = tmp_path / MOMENTUM_STATE_NAME
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: value for name, value in tensors.items() if name not in NEW_IN_0_2}, path)
    restored = MomentumState(TwoStreams(seed=2), QUEUE_SIZE)
    restored.load(str(tmp_path))
    assert torch.equal(restored.queue.pair_ids, trained.queue.pair_ids)
    assert (restored.queue.caption_ids == -1).all() and restored.queue.fresh_keys.num_fresh == 0


def test_a_state_with_other_names_is_an_error(trained, tmp_path):
    trained.save(str(tmp_path))
    path = tmp_path / MOMENTUM_STATE_NAME
    tensors = safetensors.torch.load_file(path)
    tensors["encoder.model.bias"] = tensors.pop("encoder.model.weight")
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"another model .*encoder.model.weight.*encoder.model.bias"):
        MomentumState(TwoStreams(), QUEUE_SIZE).load(str(tmp_path))


class FrozenAndTrained(TwoStreams):
    """Half of it trains."""

    def __init__(self, seed: int = 0, frozen: bool = True):
        super().__init__(seed=seed)
        self.base = nn.Linear(2, 2)
        self.base.load_state_dict({"weight": torch.full((2, 2), 7.0 + seed), "bias": torch.zeros(2)})
        self.base.requires_grad_(not frozen)


def test_frozen_weights_are_neither_saved_nor_loaded(tmp_path):
    model = FrozenAndTrained()
    MomentumState(model, QUEUE_SIZE).save(str(tmp_path))
    assert not any("base" in name for name in safetensors.torch.load_file(tmp_path / MOMENTUM_STATE_NAME))
    other = FrozenAndTrained(seed=1)
    restored = MomentumState(other, QUEUE_SIZE)
    restored.load(str(tmp_path))
    assert torch.equal(restored.encoder.model.weight, model.weight) and not torch.equal(other.weight, model.weight)
    assert torch.equal(other.base.weight, torch.full((2, 2), 8.0))


def test_a_state_that_copied_what_is_frozen_now_is_taken_only_where_it_is_equal(tmp_path):
    MomentumState(FrozenAndTrained(frozen=False), QUEUE_SIZE).save(str(tmp_path))
    MomentumState(FrozenAndTrained(), QUEUE_SIZE).load(str(tmp_path))
    model = FrozenAndTrained(seed=1)
    with pytest.raises(ValueError, match="base.* trained, and it is frozen now"):
        MomentumState(model, QUEUE_SIZE).load(str(tmp_path))
    assert torch.equal(model.base.weight, torch.full((2, 2), 8.0))
    MomentumState(FrozenAndTrained(), QUEUE_SIZE).save(str(tmp_path))
    with pytest.raises(ValueError, match="another model"):
        MomentumState(FrozenAndTrained(frozen=False), QUEUE_SIZE).load(str(tmp_path))
