"""`kill -9` at any moment, and `--resume_from_checkpoint latest`: the run ends as the one that was never stopped."""

import json
import random
import signal

import killed_run
import numpy as np
import pytest
import torch
from transformers.trainer import safe_globals

from modeling_cots.training.checkpoints import latest_checkpoint
from modeling_cots.training.filter_log import read_filter_log

pytestmark = pytest.mark.slow

# Every one has steps, a save, or both behind it: 24 batches are computed in all, and 6 checkpoints saved.
NUM_KILLS = 5
MAX_SILENCE = 300  # seconds; a run that hangs must not hang the tests
SAVE_MOMENTS = [
    "in the model",
    "in the optimizer",
    "in the momentum state",
    "before the manifest",
    "in the manifest",
    "before older ones go",
    "while older ones go",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return killed_run.write_data(tmp_path_factory.mktemp("killed") / "data")


def to_the_end(data, output_dir) -> None:
    """Start, or go on, and let it finish."""
    process, connection = killed_run.start(data, output_dir, filter_log=output_dir / "filter_log")
    while heard(connection):
        pass
    process.join()
    assert process.exitcode == 0


def heard(connection) -> str | None:
    try:
        assert connection.poll(MAX_SILENCE), f"The run has said nothing for {MAX_SILENCE} seconds."
        return connection.recv()
    except EOFError:
        return None


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of the run that is never stopped."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    to_the_end(data, output_dir)
    return output_dir


def comparable(value):
    """Nested state with nothing left whose `==` is not a plain bool."""
    if isinstance(value, dict):
        return {key: comparable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(part) for part in value]
    if isinstance(value, torch.Tensor | np.ndarray):
        return np.asarray(value).tobytes()
    return value


def assert_same_run(run, whole) -> None:
    """Weights, momentum copy, queues, optimizer, schedule, generators, logged numbers: all of it bit for bit."""
    mine, expected = (folder / f"checkpoint-{killed_run.NUM_STEPS}" for folder in (run, whole))
    for name in ("model", "momentum_state", "averages_0"):
        name = f"{name}.safetensors"
        assert (mine / name).read_bytes() == (expected / name).read_bytes(), name
    with safe_globals():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            states = [comparable(torch.load(folder / name, weights_only=True)) for folder in (mine, expected)]
            assert states[0] == states[1], name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (mine, expected)]
    assert states[0]["log_history"] == states[1]["log_history"]
    assert [entry["step"] for entry in states[0]["log_history"]] == [5, 10]
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows = [read_filter_log(folder / "filter_log").drop(["attempt", "attempt_step"]) for folder in (run, whole)]
    assert rows[0].equals(rows[1])
    assert len(rows[0]) > 0


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(data, whole, tmp_path, seed):
    rng = random.Random(seed)
    run = tmp_path / "run"
    for _ in range(NUM_KILLS):
        process, connection = killed_run.start(data, run, filter_log=run / "filter_log")
        num_heard = rng.randrange(1, 14)
        for _ in range(num_heard):
            if not heard(connection):
                break
        process.join(timeout=rng.uniform(0, 0.05))  # somewhere within a batch or a save
        process.kill()
        process.join()
    to_the_end(data, run)
    assert_same_run(run, whole)


@pytest.mark.parametrize("moment", SAVE_MOMENTS)
def test_killed_while_it_saves(data, whole, tmp_path, moment):
    run = tmp_path / "run"
    process, connection = killed_run.start(data, run, die_at=moment, filter_log=run / "filter_log")
    while heard(connection):
        pass
    process.join()
    assert process.exitcode == -signal.SIGKILL
    is_whole = moment in ("before older ones go", "while older ones go")
    assert (run / "checkpoint-6").is_dir()
    assert latest_checkpoint(run) == str(run / f"checkpoint-{6 if is_whole else 4}")
    to_the_end(data, run)
    assert_same_run(run, whole)
