"""A run that was stopped and resumed equals the run that was not, bit for bit."""

import shutil

import pytest
import torch
from trainer_states import state_of

from modeling_cots.method.momentum import MOMENTUM_STATE_NAME
from modeling_cots.training import learning_watch, trainer
from modeling_cots.training.checkpoints import MANIFEST_NAME, latest_checkpoint

ARGUMENTS = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 1, "momentum": 0.9}


@pytest.fixture
def dropout_config(tiny_config):
    """Dropout on, so that a random number out of place would show."""
    tiny_config.text_config.hidden_dropout_prob = 0.1
    tiny_config.vision_config.hidden_dropout_prob = 0.1
    return tiny_config


@pytest.mark.parametrize("stopped_at", [1, 3, 4])  # in the first epoch, at its end, in the second; 3 steps an epoch
def test_resumed_run_equals_the_whole_run(make_trainer, dropout_config, tmp_path, stopped_at):
    whole = make_trainer(dropout_config, output_dir=str(tmp_path / "whole"), **ARGUMENTS)
    whole.train()
    checkpoint = tmp_path / "stopped" / f"checkpoint-{stopped_at}"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stopped_at}", checkpoint)

    resumed = make_trainer(dropout_config, output_dir=str(tmp_path / "stopped"), **ARGUMENTS)
    with torch.no_grad():  # whatever a fresh process would start from
        for parameter in resumed.model.parameters():
            parameter.add_(1.0)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=str(checkpoint))

    expected, got = state_of(whole), state_of(resumed)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    losses = [
        [
            (entry["step"], entry["loss"], entry["learning_rate"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_averages_of_a_log_line_reach_back_over_the_checkpoint(make_trainer, tmp_path):
    """Step 4 is logged with what happened in steps 1 to 4, though the run went on from step 3."""
    arguments = {**ARGUMENTS, "logging_steps": 4}
    whole = make_trainer(**arguments)
    whole_loss = whole.train().training_loss
    resumed = make_trainer(**arguments, output_dir=str(tmp_path / "resumed"))
    resumed_loss = resumed.train(str(tmp_path / "run" / "checkpoint-3")).training_loss
    lines = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (whole, resumed)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [4]
    # The Trainer's own summary is of the steps since the resume.
    first_three = make_trainer(**{**arguments, "logging_steps": 3, "output_dir": str(tmp_path / "logged")})
    first_three.train()
    sums = [line["loss"] * 3 for line in first_three.state.log_history if "loss" in line]
    assert whole_loss == pytest.approx(sum(sums) / 6, rel=1e-6)
    assert resumed_loss == pytest.approx(sums[1] / 3, rel=1e-6)


@pytest.mark.parametrize("stopped_at", [3, 5])
def test_the_watch_for_a_collapse_goes_on(make_trainer, tmp_path, monkeypatch, stopped_at):
    """Every line counts as flat here, those before the stop too: it is said at the first line after it, and once."""
    monkeypatch.setattr(learning_watch, "CHANCE_SHARE", 0.0)
    monkeypatch.setattr(learning_watch, "FLAT_KL", 1e9)
    warnings = []
    monkeypatch.setattr(trainer.logger, "warning", warnings.append)
    arguments = {**ARGUMENTS, "queue_size": 8, "num_train_epochs": 3}
    make_trainer(**arguments).train()
    assert [message.split(":")[0] for message in warnings] == ["Step 2"]
    warnings.clear()
    resumed = make_trainer(**arguments, output_dir=str(tmp_path / "resumed"))
    resumed.train(str(tmp_path / "run" / f"checkpoint-{stopped_at}"))
    assert [message.split(":")[0] for message in warnings if "collapsed" in message] == [f"Step {stopped_at + 1}"]


def test_latest_is_the_whole_one_written_last(make_trainer, tmp_path):
    make_trainer(**ARGUMENTS).train()
    (tmp_path / "run" / "checkpoint-6" / MANIFEST_NAME).unlink()
    trainer = make_trainer(**ARGUMENTS)
    steps = []
    trainer.compute_loss = lambda *args, compute_loss=trainer.compute_loss, **kwargs: (
        steps.append(trainer.state.global_step) or compute_loss(*args, **kwargs)
    )
    trainer.train(resume_from_checkpoint="latest")
    assert steps == [5]
    assert latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-6")


def test_latest_begins_where_there_is_none(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.train(resume_from_checkpoint="latest")
    assert trainer.state.global_step == 1


def test_true_asks_for_one(make_trainer):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make_trainer(max_steps=1).train(resume_from_checkpoint=True)


def test_only_the_newest_whole_ones_stay(make_trainer, tmp_path):
    half_written = tmp_path / "run" / "checkpoint-99"
    half_written.mkdir(parents=True)
    make_trainer(**{**ARGUMENTS, "save_total_limit": 2}).train()
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    saved = torch.load(tmp_path / "run" / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2


def test_missing_momentum_state_is_an_error(make_trainer, tmp_path):
    trainer = make_trainer(**ARGUMENTS)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / MOMENTUM_STATE_NAME).unlink()
    with pytest.raises(ValueError, match="has no momentum_state.safetensors"):
        make_trainer(**ARGUMENTS).train(resume_from_checkpoint=str(checkpoint))


def test_a_queue_of_another_size_is_an_error(make_trainer, tmp_path):
    make_trainer(**ARGUMENTS).train()
    with pytest.raises(ValueError, match="queue of 20 pairs, and queue_size is 30"):
        make_trainer(**ARGUMENTS, queue_size=30).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
