"""What a checkpoint holds beside the Trainer's own state, and what is said when it does not fit the run.

That a run which was stopped goes on exactly is in test_resume.py, test_killed_runs.py and test_distributed.py.
"""

import pytest
import safetensors.torch
import torch

from modeling_cots.training.checkpoints import check_checkpoint, commit_checkpoint


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    make_trainer(max_steps=2, save_strategy="steps", save_steps=1).train()
    return tmp_path / "run" / "checkpoint-1"


def test_a_checkpoint_is_whole_and_complete(checkpoint):
    files = check_checkpoint(checkpoint)["files"]
    state = {"model.safetensors", "momentum_state.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert state | {"trainer_state.json", "training_args.bin", "averages_0.safetensors"} <= files.keys()


def test_a_run_says_where_it_goes_on(make_trainer, checkpoint, caplog):
    make_trainer(max_steps=1).train(str(checkpoint))
    assert f"Going on from {checkpoint}." in caplog.text
    assert "processes" not in caplog.text and "missing keys" not in caplog.text


def test_a_checkpoint_of_another_model_is_refused(make_trainer, checkpoint):
    state = safetensors.torch.load_file(checkpoint / "model.safetensors")
    state["text_to_image.of_another"] = state.pop("text_to_image.weight")
    safetensors.torch.save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})
    commit_checkpoint(checkpoint, num_processes=1)
    with pytest.raises(ValueError, match=r"lacks .'text_to_image.weight'., and this model has no \['text_to_image.of"):
        make_trainer(max_steps=2).train(str(checkpoint))


def test_another_number_of_processes_is_said(make_trainer, checkpoint, caplog):
    commit_checkpoint(checkpoint, num_processes=2)
    make_trainer(max_steps=2).train(str(checkpoint))
    assert "was saved by 2 processes, and now there are 1" in caplog.text


def test_nothing_is_resumed_from_a_damaged_checkpoint(make_trainer, checkpoint):
    trainer = make_trainer(max_steps=2)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    names = sorted(check_checkpoint(checkpoint)["files"])
    assert len(names) > 8
    for name in names:
        content = (checkpoint / name).read_bytes()
        damages = (None, content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]))
        for damaged in damages:
            if damaged is None:
                (checkpoint / name).unlink()
            else:
                (checkpoint / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"has no {name}" if damaged is None else f"{name} is damaged"):
                trainer.train(str(checkpoint))
        (checkpoint / name).write_bytes(content)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    trainer.train(str(checkpoint))
