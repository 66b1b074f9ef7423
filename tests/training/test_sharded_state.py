"""The state of a split model on disk, read by one process; what several write and read: test_sharded_runs.py."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torch_greater_or_equal

from modeling_cots.training.sharded_state import STATE_FOLDER, load_sharded_state, save_sharded_state
from modeling_cots.training.sharding import MIN_TORCH

pytestmark = pytest.mark.skipif(not is_torch_greater_or_equal(MIN_TORCH), reason=f"needs torch {MIN_TORCH}")


@pytest.fixture
def trained(make_trainer):
    """A trainer after three steps."""
    trainer = make_trainer()
    trainer.train()
    return trainer


@pytest.fixture
def checkpoint(trained, tmp_path) -> str:
    save_sharded_state(str(tmp_path), trained.model, trained.optimizer, trained.momentum_state)
    return str(tmp_path)


def load(checkpoint: str, trainer) -> None:
    load_sharded_state(checkpoint, trainer.model, trainer.optimizer, trainer.momentum_state)


def begin(trainer):
    """As `train` does before it loads anything."""
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    return trainer


def test_restores_optimizer_momentum_copy_and_queues(trained, checkpoint, make_trainer):
    fresh = begin(make_trainer(learning_rate=1e-4))
    load(checkpoint, fresh)
    for name, tensor in trained.momentum_state.state_dict().items():
        assert torch.equal(fresh.momentum_state.state_dict()[name], tensor), name
    assert fresh.queue.num_pushed == trained.queue.num_pushed == 24
    saved, found = (trainer.optimizer.state_dict() for trainer in (trained, fresh))
    assert found["param_groups"] == saved["param_groups"]
    assert found["state"].keys() == saved["state"].keys()
    for number, state in saved["state"].items():
        assert all(torch.equal(found["state"][number][kind], value) for kind, value in state.items())


def test_an_optimizer_without_a_state_keeps_its_numbers(make_trainer, tmp_path):
    trainer = begin(make_trainer(optim="sgd"))
    trainer.optimizer.param_groups[0]["lr"] = 0.125
    save_sharded_state(str(tmp_path), trainer.model, trainer.optimizer, trainer.momentum_state)
    fresh = begin(make_trainer(optim="sgd"))
    load(str(tmp_path), fresh)
    assert fresh.optimizer.param_groups[0]["lr"] == 0.125


def test_refuses_another_queue_model_or_optimizer(checkpoint, make_trainer, tiny_config):
    with pytest.raises(ValueError, match="holds a queue of 20 pairs, and queue_size is 21"):
        load(checkpoint, begin(make_trainer(queue_size=21)))
    with pytest.raises(ValueError, match="has 2 groups of weights .* and this run 4: resume with the arguments"):
        load(checkpoint, begin(make_trainer(encoder_learning_rate=1e-5)))
    tiny_config.projection_dim = 24
    with pytest.raises(ValueError, match="was saved with another model than this one"):
        load(checkpoint, begin(make_trainer(config=tiny_config)))


def test_refuses_a_checkpoint_of_a_run_that_split_nothing(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="has no training_state, .*: resume it without shard_model"):
        load(str(tmp_path), begin(make_trainer()))


def test_a_failure_is_an_error_that_others_can_catch(trained, tmp_path):
    """torch's own is no `Exception`, and no handler of a full disk would see it."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_sharded_state(str(tmp_path / "file"), trained.model, trained.optimizer, trained.momentum_state)


def test_what_an_earlier_save_left_is_not_read(trained, checkpoint):
    folder = Path(checkpoint) / STATE_FOLDER
    [part] = folder.glob("*.safetensors")
    shutil.copy(part, folder / part.name.replace("00001", "00003", 1))
    save_sharded_state(checkpoint, trained.model, trained.optimizer, trained.momentum_state)
    assert [path.name for path in folder.glob("*.safetensors")] == [part.name]
