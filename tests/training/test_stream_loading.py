"""The real Trainer on a stream: split once, resumed exactly, in several processes."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from programs import TORCHRUN, run_python
from stream_files import png, write_shards
from trainer_states import state_of

from modeling_cots.data.streaming.dataset import open_stream, pair_id_of

RUN = Path(__file__).parents[1] / "helpers" / "stream_run.py"
ARGUMENTS = {"per_device_train_batch_size": 4, "max_steps": 7, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def stream(tmp_path):
    """Thirteen pairs in three shards and a fourth that is none; a pass is a little more than three steps."""
    write_shards(tmp_path / "shards", [6, 3, 4])
    (tmp_path / "shards" / "train-003.tar").write_bytes(b"no archive")
    return lambda: open_stream(str(tmp_path / "shards"), "train", shuffle_buffer=5, seed=1)


def losses_of(trainer) -> list[tuple]:
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss_i2t" in entry]


class Recorder:
    """Stands in front of a collator and counts the batches that are really made."""

    def __init__(self, collate):
        self.collate, self.batches = collate, []

    def __call__(self, items):
        self.batches.append([item["name"] for item in items])
        return self.collate(items)


def test_a_stream_is_trained_through_pass_after_pass(make_trainer, stream):
    trainer = make_trainer(train_dataset=stream(), **ARGUMENTS)
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    trainer.train()
    assert trainer.state.global_step == 7
    names = [name for batch in recorder.batches for name in batch]
    assert len(set(names[:13])) == len(set(names[13:26])) == 13
    logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
    assert logs[-1]["skipped_shards"] >= 2 and logs[-1]["skipped_samples"] == 0
    assert logs[-1]["skipped_images"] == 0


@pytest.mark.parametrize(("stopped_at", "num_workers"), [(2, 0), (5, 0), (5, 2)])
def test_a_resumed_run_equals_the_whole_run(make_trainer, stream, tmp_path, stopped_at, num_workers):
    options = {**ARGUMENTS, "gradient_accumulation_steps": 2, "dataloader_num_workers": num_workers}
    whole = make_trainer(train_dataset=stream(), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    checkpoint = tmp_path / "stopped" / f"checkpoint-{stopped_at}"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stopped_at}", checkpoint)
    resumed = make_trainer(train_dataset=stream(), output_dir=str(tmp_path / "stopped"), **options)
    resumed.data_collator = recorder = Recorder(resumed.data_collator)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    if num_workers == 0:
        assert len(recorder.batches) <= 2 * (7 - stopped_at) + 1, "skipped batches are not made; one is read ahead"
    assert losses_of(resumed) == losses_of(whole) and len(losses_of(whole)) == 7
    expected, got = state_of(whole), state_of(resumed)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_without_max_steps_a_stream_is_refused(make_trainer, stream):
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(train_dataset=stream(), max_steps=-1)


def test_epochs_of_the_schedule_are_shares_of_all_steps(make_trainer, stream):
    """The paper's 5 of 10 epochs at the full rate: half of the steps."""
    trainer = make_trainer(
        train_dataset=stream(), per_device_train_batch_size=2, max_steps=8, lr_hold_epochs=5.0, num_train_epochs=10
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss_i2t" in entry]
    assert rates == pytest.approx([1e-3 * share for share in (1, 1, 1, 1, 1, 0.75, 0.5, 0.25)])


@pytest.mark.slow
def test_two_processes_share_a_stream_and_end_together(tmp_path):
    """Three uneven shards and a bad one: parts of unequal length, of which none waits for the other."""
    write_shards(tmp_path / "shards", [9, 2, 4])
    (tmp_path / "shards" / "train-003.tar").write_bytes(b"no archive")
    run_python("-m", *TORCHRUN, "2", RUN, tmp_path / "shards", tmp_path / "out")
    written = [json.loads((tmp_path / "out" / f"{index}.json").read_text()) for index in range(2)]
    assert [len(each["seen"]) for each in written] == [8, 8]
    assert written[0]["skipped_shards"] == written[1]["skipped_shards"] >= 1
    pairs = open_stream(str(tmp_path / "shards"), "train", shuffle_buffer=3)
    parts = [pairs.split_by_process(index, 2) for index in range(2)]
    first_pass = [[item["pair_id"] for item in part] for part in parts]
    assert Counter(first_pass[0] + first_pass[1]) == Counter(pair_id_of(png(number)) for number in range(15))
    for each, expected in zip(written, first_pass, strict=True):
        flat = [pair_id for batch in each["seen"] for pair_id in batch]
        num = min(len(flat), len(expected))
        assert flat[:num] == expected[:num], "accelerate has neither split nor sent anything around"
