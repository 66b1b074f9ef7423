"""How a program ends: one sentence for what its user can mend, the traceback for the rest and with --debug."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import kill_with_children
from safetensors import SafetensorError
from scene_files import write_folder

from modeling_cots import ScenesDataset
from modeling_cots.hub_push import HubPushError
from modeling_cots.scripts.error_boundary import GO_ON_TRAINING, run_script
from modeling_cots.training.finite_check import NonFiniteLossError
from modeling_cots.training.recovery import CheckpointError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    """Gives the words that a program finds, and leaves the signals as they were."""
    monkeypatch.setattr(sys, "argv", ["program.py", "--steps", "3"])
    before = signal.getsignal(signal.SIGTERM)
    yield sys.argv
    signal.signal(signal.SIGTERM, before)


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\nlines"), "ValueError: two lines"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), "FileNotFoundError: No such file: a.json"),
        (OSError(errno.ENOSPC, "No space left on device"), "OSError: No space left on device"),
        (
            CheckpointError("run/checkpoint-2 could not be saved."),
            "CheckpointError: run/checkpoint-2 could not be saved.",
        ),
        (ImportError("pip install av"), "ImportError: pip install av"),
        (MemoryError(), "MemoryError: no more is known"),
        (
            torch.OutOfMemoryError("CUDA."),
            "OutOfMemoryError: The memory of the device is full, ",
        ),
        (SafetensorError("invalid header"), "SafetensorError: invalid header"),
        (HubPushError("refused"), "HubPushError: refused"),
        (NonFiniteLossError("Step 3: loss is nan."), "NonFiniteLossError: Step 3: loss is nan."),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."),
            "RuntimeError: DataLoader worker (pid 3) is",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_sentence(error, said):
    with pytest.raises(SystemExit) as ended:
        run_script(raising(error))
    assert ended.value.code.startswith(said) and ended.value.code.endswith(" (--debug shows where.)")
    assert ended.value.__suppress_context__ and ended.value.__cause__ is None


@pytest.mark.parametrize("error", [KeyError("a"), AssertionError(), RuntimeError("a fault"), SystemExit(2)], ids=repr)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        run_script(raising(error))
    assert raised.value is error


@pytest.mark.parametrize(
    ("words", "left", "is_debugging"),
    [
        (["--debug"], [], True),
        (["--debug", "--seed", "1"], ["--seed", "1"], True),
        (["--debug", "my.yaml"], ["my.yaml"], True),
        (["--debug", "underflow_overflow"], ["--debug", "underflow_overflow"], False),
        (["--debug", "underflow_overflow", "--debug"], ["--debug", "underflow_overflow"], True),
        (["--seed", "1"], ["--seed", "1"], False),
    ],
)
def test_debug_shows_the_traceback_and_is_nobody_elses_option(command_line, words, left, is_debugging):
    command_line[1:] = words
    with pytest.raises(ValueError if is_debugging else SystemExit):
        run_script(raising(ValueError("x")))
    assert command_line[1:] == left


def test_a_request_to_end_is_one_sentence_and_ends_as_ever(capfd):
    def main() -> None:
        if os.fork() == 0:  # as a worker of the data loader: it says nothing
            os.kill(os.getpid(), signal.SIGTERM)
        os.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    child = os.fork()
    if child == 0:
        run_script(main, go_on="Run it again.")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert capfd.readouterr().err == "Stopped by SIGTERM. Run it again.\n"


def test_an_interrupt_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(raising(KeyboardInterrupt()))
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "Stopped by SIGINT.\n"


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_every_script_ends_there(script):
    assert (
        (ROOT / "examples" / script).read_text(encoding="utf-8").rpartition("\n    ")[2].startswith("run_script(main")
    )


@pytest.mark.slow
def test_a_training_that_is_stopped_with_its_workers_says_where_to_go_on(tmp_path):
    """As a cluster does it: the signal goes to all processes of the group at once."""
    data = write_folder(tmp_path / "data", [ScenesDataset("train", 8, 32)[index] for index in range(8)])
    options = f"--dataset {data} --eval_split none --output_dir {tmp_path / 'run'} --dataloader_num_workers 2"
    options += (
        " --save_steps 1 --save_total_limit 2 --logging_steps 1 --max_steps 100000 --per_device_train_batch_size 4"
    )
    command = [sys.executable, "examples/run_pretraining.py", "examples/configs/quickstart.yaml", *options.split()]
    process = subprocess.Popen(
        [*command, "--disable_tqdm", "true", "--use_cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while "'loss'" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            kill_with_children(process)
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"Stopped by SIGTERM. {GO_ON_TRAINING}"
