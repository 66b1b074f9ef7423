"""A run that would go on for nothing stops: what it says, what it leaves behind, and that it can go on from there."""

import math

import pytest
import torch

from modeling_cots import ScenesDataset
from modeling_cots.method.feature_queue import PairQueue
from modeling_cots.training.checkpoints import check_checkpoint, latest_checkpoint
from modeling_cots.training.filter_log import read_filter_log
from modeling_cots.training.finite_check import NonFiniteLossError, StepSnapshot, UnreadableDataError

ARGUMENTS = {
    "num_train_epochs": 2,
    "max_steps": -1,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "filter_num_std": 0.5,
    "queue_size": 10,
    "logging_steps": 5,
}


@pytest.fixture
def dropout_config(tiny_config):
    tiny_config.text_config.hidden_dropout_prob = 0.1
    return tiny_config


def make_bad(trainer, name: str, step: int, batch: int = 1) -> None:
    """From the given step on (counted from 1), in this batch of a step, the loss `name` is NaN."""
    original, num_batches = trainer.compute_loss, 0

    def compute_loss(model, inputs, **kwargs):
        nonlocal num_batches
        num_batches += 1
        if (num_batches - 1) // 2 + 1 == step and (num_batches - 1) % 2 == batch:
            if name == "gradient":
                next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.inf)
            else:
                inputs = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
                inputs["pixel_values"][2] = math.nan
        return original(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss


def everything(trainer) -> dict[str, torch.Tensor]:
    state = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    state |= {f"momentum.{name}": tensor for name, tensor in trainer.momentum_state.state_dict().items()}
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("name", ["loss", "gradient"])
# In the middle of an epoch of 3 steps, at its beginning, and where there is no checkpoint from before.
@pytest.mark.parametrize("step", [6, 4, 1])
def test_a_bad_step_is_undone_and_the_run_goes_on_from_before_it(make_trainer, dropout_config, tmp_path, name, step):
    whole = make_trainer(dropout_config, output_dir=str(tmp_path / "whole"), **ARGUMENTS)
    whole.train()

    arguments = {**ARGUMENTS, "filter_log": str(tmp_path / "filter_log")}
    stopped = make_trainer(dropout_config, **arguments)
    make_bad(stopped, name, step)
    with pytest.raises(NonFiniteLossError, match=f"Step {step}: .*saved as it was after step {step - 1}") as error:
        stopped.train()
    if name == "loss":
        assert "loss_i2t is nan" in str(error.value) and "loss_cmlm is nan" in str(error.value)
        assert str(error.value).count("(pair ") == 1, "the one sample that was spoilt"
    else:
        assert "the gradient is not finite" in str(error.value)
        assert str(error.value).count("(pair ") == 8
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint == str(tmp_path / "run" / f"checkpoint-{step - 1}")

    resumed = make_trainer(dropout_config, **arguments)
    resumed.train(resume_from_checkpoint="latest")
    expected, got = everything(whole), everything(resumed)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)]
    assert logs[0] == logs[1]
    rows = read_filter_log(tmp_path / "filter_log")
    assert len(set(zip(rows["step"].to_pylist(), rows["pair_id"].to_pylist(), strict=True))) == len(rows) > 0


def test_a_checkpoint_that_is_there_is_not_written_again(make_trainer, tmp_path):
    trainer = make_trainer(**ARGUMENTS, save_strategy="steps", save_steps=3)
    make_bad(trainer, "loss", 4)
    written = []
    original = trainer.checkpoints.write
    trainer.checkpoints.write = lambda *args: written.append(trainer.state.global_step) or original(*args)
    with pytest.raises(NonFiniteLossError, match="after step 3"):
        trainer.train()
    assert written == [3]
    check_checkpoint(tmp_path / "run" / "checkpoint-3")


class Rotten(ScenesDataset):
    """Scenes of which every second cannot be read."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "image": b"rotten", "name": f"rotten-{index}.jpg"} if index % 2 else item


def test_rotten_data_stops_the_run_with_names(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_cots.training.finite_check.MIN_IMAGES", 16)
    trainer = make_trainer(train_dataset=Rotten("train", 24, 32), max_steps=9)
    message = r"Step 2: 8 of the last 16 images.*max_skipped_fraction=0.2 .*rotten-\d+.jpg \(pair"
    trainer.args.train_sampling_strategy = "sequential"
    with pytest.raises(UnreadableDataError, match=message) as error:
        trainer.train()
    assert all(f"rotten-{index}.jpg" in str(error.value) for index in range(1, 16, 2))
    assert latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-1")


def test_what_is_allowed_goes_on(make_trainer, monkeypatch):
    monkeypatch.setattr("modeling_cots.training.finite_check.MIN_IMAGES", 16)
    trainer = make_trainer(train_dataset=Rotten("train", 24, 32), max_skipped_fraction=0.6)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[2]["skipped_images"] == 12


def test_a_fraction_is_a_fraction(make_trainer):
    with pytest.raises(ValueError, match="max_skipped_fraction must be between 0 and 1, got 20"):
        make_trainer(max_skipped_fraction=20)


def test_a_snapshot_puts_queue_and_generators_back():
    queue = PairQueue(3, 2)
    numbers = torch.arange(2)
    queue.push(torch.ones(2, 2), -torch.ones(2, 2), numbers.float(), numbers)
    snapshot = StepSnapshot(queue, torch.device("cpu"))
    snapshot.take_generators()
    snapshot.take(kept=7)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    drawn = torch.rand(3)
    queue.push(torch.zeros(2, 2), torch.zeros(2, 2), numbers.float(), numbers + 5)
    assert snapshot.put_back() == {"kept": 7}
    assert torch.equal(torch.rand(3), drawn)
    assert queue.num_pushed == 2
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())
