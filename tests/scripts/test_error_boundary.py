"""How a program ends: one sentence for what its user can mend, the traceback for the rest and with --debug."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pyarrow
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import OfflineModeIsEnabled
from programs import kill_with_children
from safetensors import SafetensorError
from scene_files import write_folder
from transformers.debug_utils import DebugOption

from modeling_cots import ScenesDataset
from modeling_cots.hub_push import HubPushError
from modeling_cots.scripts import error_boundary
from modeling_cots.scripts.error_boundary import DEBUG_FEATURES, GO_ON_TRAINING, run_script
from modeling_cots.training.finite_check import NonFiniteLossError
from modeling_cots.training.recovery import CheckpointError

ROOT = Path(__file__).parents[2]
ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co")


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
        (PermissionError(errno.EACCES, "Permission denied", "run"), "PermissionError: Permission denied: run"),
        (OSError(errno.EROFS, "Read-only file system", "run"), "OSError: Read-only file system: run"),
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
        (httpx.ConnectError("Refused"), f"ConnectError: {ENDPOINT} cannot be reached. Refused"),
        (OfflineModeIsEnabled("No network."), "OfflineModeIsEnabled: No network."),
        (DatasetGenerationError("Broken."), "DatasetGenerationError: Broken."),
        (pyarrow.lib.ArrowKeyError("no column"), "ArrowKeyError: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "RuntimeError: DefaultCPUAllocator"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_sentence(error, said):
    with pytest.raises(SystemExit) as ended:
        run_script(raising(error))
    assert ended.value.code.startswith(said) and ended.value.code.endswith(" (--debug shows where.)")
    assert ended.value.__suppress_context__ and ended.value.__cause__ is None


@pytest.mark.parametrize("error", [KeyError("a"), AssertionError(), RuntimeError("a fault")], ids=repr)
def test_the_traceback_of_a_fault_of_the_program_is_kept(error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run_script(raising(error))
    (file,) = tmp_path.iterdir()
    assert ended.value.code.startswith(type(error).__name__) and str(file) in ended.value.code
    assert "\n" not in ended.value.code and "--debug" in ended.value.code
    kept = file.read_text()
    assert kept.startswith("Traceback") and "raise error" in kept and type(error).__name__ in kept


def test_where_no_traceback_can_be_kept_the_sentence_is_all(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(SystemExit, match=r"KeyError: 'a' \(a fault of the program; --debug shows where"):
        run_script(raising(KeyError("a")))


def test_the_status_that_a_program_chooses_stays():
    with pytest.raises(SystemExit) as ended:
        run_script(raising(SystemExit(2)))
    assert ended.value.code == 2


def test_of_a_data_loaders_worker_only_the_error_is_told():
    text = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File...\n"
    with pytest.raises(SystemExit, match="^OSError: a.jpg is gone "):
        run_script(raising(OSError(f"{text}OSError: a.jpg is gone")))


def write_to_full_device() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def write_inside_a_library() -> None:
    try:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        raise DatasetGenerationError("An error occurred while generating the data set") from error


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a device that is always full")
@pytest.mark.parametrize(
    "write",
    [
        write_to_full_device,
        write_inside_a_library,
        # As safetensors said it on a full tmpfs. (Never save weights to a device: they take its place.)
        raising(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    ],
)
def test_a_full_disk_is_said_first(write):
    with pytest.raises(SystemExit, match=r"^\w+: The disk is full"):
        run_script(write)


def test_a_full_disk_is_named(command_line, tmp_path, monkeypatch):
    command_line[1:] = ["--output_dir", str(tmp_path)]
    places = {str(tmp_path): 0}
    monkeypatch.setattr(error_boundary, "_free_space", lambda place: places.get(place, 1 << 40))
    with pytest.raises(SystemExit) as ended:
        run_script(write_to_full_device)
    assert f"The disk is full ({tmp_path}). No space left on device" in ended.value.code
    with pytest.raises(SystemExit) as ended:
        run_script(raising(OSError(errno.ENOSPC, "No space left on device", "run/results.json")))
    assert "The disk is full (run/results.json)." in ended.value.code


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


@pytest.mark.parametrize(
    ("words", "go_on", "said"),
    [
        (["a.py", "--out", "my run"], {}, "To start again: python a.py --out 'my run'"),
        (["/bin/cots-search", "index", "P"], {"go_on": "To go on: {command}"}, "To go on: cots-search index P"),
        (
            ["a.py", "b.yaml"],
            {"go_on": GO_ON_TRAINING},
            "To go on: python a.py b.yaml --resume_from_checkpoint latest",
        ),
        (
            ["a.py", "--resume_from_checkpoint", "c", "--strict", "--resume_from_checkpoint=d", "--seed", "1"],
            {"go_on": GO_ON_TRAINING},
            "To go on: python a.py --strict --seed 1 --resume_from_checkpoint latest",
        ),
    ],
)
def test_an_interrupt_is_one_sentence_with_the_command_that_goes_on(command_line, capsys, words, go_on, said):
    command_line[:] = words
    with pytest.raises(SystemExit) as ended:
        run_script(raising(KeyboardInterrupt()), **go_on)
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == f"\nStopped by SIGINT. {said}\n"


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for rank, said in (("1", ""), ("0", "\nStopped by SIGINT. To start again: torchrun ... program.py --steps 3\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_script(raising(KeyboardInterrupt()))
        assert capsys.readouterr().err == said


PROGRAM = """
import sys
from modeling_cots.scripts.error_boundary import run_script
run_script(lambda: print("x" * 200_000))
"""


@pytest.mark.parametrize(
    ("target", "status", "said"), [("| head -c 1", 141, ""), ("> /dev/full", 1, "OSError: The disk is full")]
)
def test_where_the_output_goes_nowhere_that_is_no_fault(tmp_path, target, status, said):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'} {target}; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    # Without what torch and torchao say where one is too old for the other.
    lines = [line for line in ended.stderr.splitlines() if not re.match(r"W\d{4} |Skipping import of cpp ext", line)]
    assert ended.returncode == status and len(lines) == bool(said) and "".join(lines).startswith(said)


def test_the_features_of_transformers_debug_are_known():
    assert DEBUG_FEATURES == {option.value for option in DebugOption}


def scripts() -> list[str]:
    """All programs of the repository: what runs code when it is no import."""
    folders = ("examples", "benchmarks", "demo", "docs", "model_cards")
    files = (path for folder in folders for path in (ROOT / folder).glob("*.py"))
    return sorted(str(file.relative_to(ROOT)) for file in files if "__main__" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("script", scripts())
def test_every_script_ends_there(script):
    last = (ROOT / script).read_text(encoding="utf-8").rpartition("\n    ")[2]
    assert last.startswith(("run_script(main", "run_script(lambda: main", "run_alone(measure"))


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
    said = errors.splitlines()[-1]
    assert said.startswith("Stopped by SIGTERM. To go on: python examples/run_pretraining.py examples/configs/")
    assert said.endswith("--use_cpu --resume_from_checkpoint latest")
