"""What a checkpoint holds beside the Trainer's own state, and what is said when it does not fit the run.

That a run which was stopped goes on exactly is in test_resume.py, test_killed_runs.py and test_distributed.py.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from modeling_cots.training.checkpoints import (
    MANIFEST_NAME,
    check_checkpoint,
    commit_checkpoint,
    latest_checkpoint,
    run_of,
)
from modeling_cots.training.recovery import LOCK_NAME, CheckpointError
from modeling_cots.training.trainer import LoopEvents


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


def test_checkpoints_of_another_run_survive_a_new_one(make_trainer, checkpoint, tmp_path, caplog):
    before = {step: (tmp_path / f"run/checkpoint-{step}/model.safetensors").read_bytes() for step in (1, 2)}
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make_trainer(**arguments, learning_rate=0.5).train()
    aside = tmp_path / "run" / "other_run_1"
    assert f"Moved 2 checkpoints of another run to {aside}" in caplog.text
    for step, weights in before.items():
        assert (aside / f"checkpoint-{step}" / "model.safetensors").read_bytes() == weights
        check_checkpoint(aside / f"checkpoint-{step}")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "run/checkpoint-2/model.safetensors").read_bytes() != before[2]


def test_a_run_that_goes_on_counts_its_earlier_checkpoints(make_trainer, checkpoint, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer(max_steps=4, **arguments).train("latest")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert len({run_of(folder) for folder in (tmp_path / "run").iterdir()} - {""}) == 1


def test_a_run_that_is_stopped_in_its_first_save_begins_anew_in_its_place(make_trainer, tmp_path):
    arguments = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**arguments).train()
    (tmp_path / "run" / "checkpoint-1" / MANIFEST_NAME).unlink()
    make_trainer(**arguments).train("latest")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
    check_checkpoint(tmp_path / "run" / "checkpoint-1")


# ------------------------------------------------------------------------------------------- one run a folder


def test_a_second_run_into_the_same_folder_is_refused(make_trainer):
    refused = []

    def train_too(*args, **kwargs) -> None:
        with pytest.raises(ValueError, match="Another run is training into .*: wait for its end, or choose another"):
            make_trainer(max_steps=1).train()
        refused.append(True)

    first = make_trainer(max_steps=1)
    first.add_callback(LoopEvents(on_step_end=train_too))
    first.train()
    assert refused == [True]
    make_trainer(max_steps=1).train()  # the first has ended


def test_a_run_that_failed_leaves_the_folder_free(make_trainer):
    def fail(*args, **kwargs) -> None:
        raise RuntimeError("a fault of the loop")

    trainer = make_trainer(max_steps=1)
    trainer.add_callback(LoopEvents(on_step_end=fail))
    with pytest.raises(RuntimeError):
        trainer.train()
    make_trainer(max_steps=1).train()


HOLDER = """
import os, sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire(timeout=0)
worker = os.fork()  # as a worker of the data loader, which outlives a killed run for a while
if worker:
    print(worker, flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_run_is_in_nobodys_way(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / LOCK_NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="Another run"):
            make_trainer(max_steps=1).train()
        holder.kill()
        holder.wait()
        make_trainer(max_steps=1).train()


def test_a_folder_that_cannot_be_written_is_named(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1)
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match=f"Nothing can be written to output_dir={tmp_path / 'run'}: "):
        trainer.train()


def test_a_folder_that_is_removed_during_the_run_is_made_anew_with_its_lock(make_trainer, tmp_path, caplog):
    def remove(args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            shutil.rmtree(tmp_path / "run")
        if state.global_step == 3:
            with pytest.raises(ValueError, match="Another run"):
                make_trainer(max_steps=1).train()

    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=2)
    trainer.add_callback(LoopEvents(on_step_end=remove))
    trainer.train()
    assert "was removed during the run, and is made anew" in caplog.text
    assert latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    assert not (tmp_path / "run" / LOCK_NAME).exists()


# ------------------------------------------------------------------------------------------- what cannot be saved


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device that is always full")
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", f"{MANIFEST_NAME}.partial"]
)
def test_a_full_disk_is_one_sentence_that_says_where_to_go_on(make_trainer, tmp_path, name):
    def fill_the_disk(args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            (tmp_path / "run" / "checkpoint-2").mkdir()
            (tmp_path / "run" / "checkpoint-2" / name).symlink_to("/dev/full")

    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    trainer.add_callback(LoopEvents(on_step_end=fill_the_disk))
    message = (
        r"checkpoint-2 could not be saved: (No space left|.* as on a full disk).*the run goes on from .*checkpoint-1\."
    )
    with pytest.raises(CheckpointError, match=message):
        trainer.train()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device that is always full")
def test_a_final_folder_that_cannot_be_written_says_where_to_go_on(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "run" / "config.json").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="run could not be saved: No space left.*goes on from .*checkpoint-1"):
        trainer.export_model(str(tmp_path / "run"))


def test_a_folder_that_becomes_a_file_is_one_sentence(make_trainer, tmp_path):
    def replace(*args, **kwargs) -> None:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("a file")

    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.add_callback(LoopEvents(on_step_begin=replace))
    with pytest.raises(ValueError, match=f"Nothing can be written to output_dir={tmp_path / 'run'}: "):
        trainer.train()


def test_an_error_of_another_kind_stays_what_it_is(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1, save_strategy="steps", save_steps=1)

    def fail(*args) -> None:
        raise RuntimeError("a fault of the device")

    monkeypatch.setattr(trainer.momentum_state, "save", fail)
    with pytest.raises(RuntimeError, match="^a fault of the device$"):
        trainer.train()


def test_a_run_that_is_interrupted_says_where_to_go_on(make_trainer, tmp_path, caplog):
    def interrupt(args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    trainer = make_trainer(max_steps=3, save_strategy="steps", save_steps=1)
    trainer.add_callback(LoopEvents(on_step_end=interrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert f"stopped after step 2. With resume_from_checkpoint=latest the run goes on from {tmp_path}" in caplog.text


# ------------------------------------------------------------------------------------------- what is kept secret


def test_no_file_of_a_run_holds_the_token_of_the_hub(make_trainer, tmp_path):
    token = "hf_" + "secret" * 6
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1, hub_token=token)
    trainer.train()
    trainer.save_model(str(tmp_path / "run" / "model"))
    trainer.export_model(str(tmp_path / "run" / "export"))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len([path for path in files if path.name == "training_args.bin"]) == 2
    assert not [path for path in files if token.encode() in path.read_bytes()]
    assert trainer.args.hub_token == token
