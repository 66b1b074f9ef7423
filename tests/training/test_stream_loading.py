"""The real Trainer on a stream: split once, resumed exactly, in several processes."""

import itertools
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
from modeling_cots.data.streaming.mixture import open_mixture
from modeling_cots.training.finite_check import NonFiniteLossError

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


def logged(trainer, name: str) -> int:
    return [entry[name] for entry in trainer.state.log_history if "loss_i2t" in entry][-1]


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


@pytest.fixture
def mixture(tmp_path, stream):
    """The same shards with others beside them, by weights."""
    pytest.importorskip("torchdata.nodes", reason="needs torchdata: pip install 'modeling-cots[mixtures]'")
    write_shards(tmp_path / "more", [5])
    listed = {"shards": 2, "more": 1}
    lines = [f"{name}: {{dataset: {tmp_path / name}, weight: {weight}}}\n" for name, weight in listed.items()]
    (tmp_path / "mix.yaml").write_text("".join(lines))
    return lambda: open_mixture(str(tmp_path / "mix.yaml"), "train", shuffle_buffer=6, seed=1)


@pytest.mark.parametrize(
    ("kind", "stopped_at", "num_workers"),
    [("stream", 2, 0), ("stream", 5, 0), ("stream", 5, 2), ("mixture", 5, 2)],
)
def test_a_resumed_run_equals_the_whole_run(make_trainer, request, tmp_path, kind, stopped_at, num_workers):
    stream = request.getfixturevalue(kind)
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
    assert logged(resumed, "skipped_shards") == logged(whole, "skipped_shards"), "what is read again does not count"
    expected, got = state_of(whole), state_of(resumed)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_run_that_refused_a_step_goes_on_with_the_batches_of_that_step(make_trainer, stream, tmp_path):
    """The refused step has taken its batches out of the stream already; the checkpoint is of the place before them."""

    def run(**options):
        return make_trainer(train_dataset=stream(), **{**ARGUMENTS, "save_strategy": "no", **options})

    whole = run(output_dir=str(tmp_path / "whole"))
    whole.train()
    broken = run(output_dir=str(tmp_path / "broken"))
    compute = broken.compute_loss

    def fail(model, inputs, **options):
        if broken.state.global_step == 4:
            inputs["pixel_values"][0] = float("nan")
        return compute(model, inputs, **options)

    broken.compute_loss = fail
    with pytest.raises(NonFiniteLossError, match="Step 5"):
        broken.train()
    resumed = run(output_dir=str(tmp_path / "broken"))
    resumed.train(resume_from_checkpoint="latest")
    expected, got = state_of(whole), state_of(resumed)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_a_place_that_another_run_would_not_read_is_refused(make_trainer, stream, mixture, tmp_path):
    trainer = make_trainer(train_dataset=stream(), **{**ARGUMENTS, "max_steps": 2})
    trainer.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    other_seed = open_stream(str(tmp_path / "shards"), "train", shuffle_buffer=5, seed=2)
    other_shards = open_stream(str(tmp_path / "shards" / "train-000.tar"), "train", shuffle_buffer=5, seed=1)
    for dataset, arguments, message in [
        (stream(), {"dataloader_num_workers": 2}, "dataloader_num_workers was 0 and is 2"),
        (other_seed, {}, "data_seed was 1 and is 2"),
        (other_shards, {}, "or come twice: other shards"),
        (mixture(), {}, "sources is new"),
    ]:
        again = make_trainer(train_dataset=dataset, **{**ARGUMENTS, "max_steps": 2, **arguments})
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=checkpoint)
    anew = make_trainer(train_dataset=other_seed, **{**ARGUMENTS, "max_steps": 2}, ignore_data_skip=True)
    anew.data_collator = recorder = Recorder(anew.data_collator)
    anew.train(resume_from_checkpoint=checkpoint)
    assert recorder.batches[0] == [item["name"] for item in itertools.islice(other_seed, 4)]


def test_a_checkpoint_that_does_not_say_where_its_run_was_is_refused(make_trainer, stream, tmp_path):
    make_trainer(**{**ARGUMENTS, "max_steps": 1}).train()
    again = make_trainer(train_dataset=stream(), **ARGUMENTS)
    with pytest.raises(ValueError, match="does not say where its run was in the stream.*ignore_data_skip"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "mixture"])
def test_two_processes_resume_bit_for_bit_and_three_are_refused(tmp_path, kind):
    """Three uneven shards and a bad one, stopped in the middle of the second pass; each process has its own place."""
    write_shards(tmp_path / "shards", [9, 2, 4])
    (tmp_path / "shards" / "train-003.tar").write_bytes(b"no archive")
    dataset = tmp_path / "shards"
    if kind == "mixture":
        pytest.importorskip("torchdata.nodes", reason="needs torchdata: pip install 'modeling-cots[mixtures]'")
        write_shards(tmp_path / "more", [7, 8])
        dataset = tmp_path / "mix.yaml"
        listed = {"shards": 3, "more": 1}
        lines = [f"{name}: {{dataset: {tmp_path / name}, weight: {weight}}}\n" for name, weight in listed.items()]
        dataset.write_text("".join(lines))
    run_python("-m", *TORCHRUN, "2", RUN, dataset, tmp_path / "whole", "--save")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    run_python("-m", *TORCHRUN, "2", RUN, dataset, tmp_path / "resumed", "--resume", checkpoint)
    for index in range(2):
        whole, resumed = (json.loads((tmp_path / name / f"{index}.json").read_text()) for name in ("whole", "resumed"))
        assert resumed["seen"] == whole["seen"][5:]
        assert resumed["state"] == whole["state"]
        for name in ("loss", "skipped_shards", "skipped_samples"):
            assert [line[name] for line in resumed["logs"]] == [line[name] for line in whole["logs"]]
    if kind == "shards":
        refused = run_python(
            "-m", *TORCHRUN, "3", RUN, dataset, tmp_path / "three", "--resume", checkpoint, check=False
        )
        assert refused.returncode != 0
        assert refused.stderr.count("processes was 2 and is 3") >= 3, refused.stderr
