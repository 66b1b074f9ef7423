"""Several real processes (gloo): on a split batch they equal one on the joined one, and none waits for ever."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributed_results import RUN, SGD, assert_equal_runs, read_result
from filelock import FileLock
from programs import TORCHRUN, run_python

from modeling_cots.training.checkpoints import latest_checkpoint
from modeling_cots.training.recovery import LOCK_NAME

pytestmark = pytest.mark.slow

# Without a GPU too it starts several processes only where it believes in some; they take gloo, as they have none.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no")
ACCELERATE += ("--dynamo_backend=no", "--num_processes")


def launch(output: Path, num_processes: int, *options: str, launcher=TORCHRUN, check: bool = True):
    return run_python("-m", *launcher, str(num_processes), RUN, output, *options, check=check)


def result(output: Path, num_processes: int, batch: int, *options: str, **launching) -> dict:
    """Weights, queues, logs and metrics of a run whose processes share `batch` pairs."""
    launch(output, num_processes, "--batch", str(batch // num_processes), *options, **launching)
    return read_result(output)


@pytest.fixture(scope="module")
def one_step_alone(tmp_path_factory) -> dict:
    return result(tmp_path_factory.mktemp("alone") / "one.pt", 1, 12, *SGD)


@pytest.mark.parametrize(("num_processes", "launcher"), [(2, ACCELERATE), (3, TORCHRUN)])
def test_one_step_of_several_processes_equals_one_on_the_joined_batch(
    one_step_alone, tmp_path, num_processes, launcher
):
    """Two batches of 12 make the step: the queue is full after the first, so the filter decides over the second.

    Of three processes the second reads nothing of its first batch, and each keeps another number of the rest. Plain
    gradient descent at a rate that moves every weight by its gradient: what differs in a gradient is seen in full.
    """
    several = result(tmp_path / "several.pt", num_processes, 12, *SGD, launcher=launcher)
    assert_equal_runs(one_step_alone, several, 1e-6, rtol=0)
    assert one_step_alone["logs"][0]["kept_fraction"] < 1
    assert one_step_alone["filtered"]


@pytest.mark.parametrize("freeze", ["1", "all"])
def test_frozen_layers_are_shared_in_every_process(tmp_path, freeze):
    one = result(tmp_path / "one.pt", 1, 12, *SGD, "--freeze", freeze)
    two = result(tmp_path / "two.pt", 2, 12, *SGD, "--freeze", freeze)
    assert_equal_runs(one, two, 1e-6, rtol=0)


def test_two_launchers_equal_one_process(one_step_alone, tmp_path):
    """The command that docs/reliability.md shows for several machines, twice on this one."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{store.port}", "--rdzv_conf=is_host=0")
    launcher = ("torch.distributed.run", "--nnodes=2", *meeting, "--rdzv_id=my-run", "--nproc_per_node")
    output = tmp_path / "several.pt"
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(launch, output, 1, "--batch", "6", *SGD, launcher=launcher) for _ in range(2)]
    for run in runs:
        run.result()
    assert_equal_runs(one_step_alone, read_result(output), 1e-6, rtol=0)


def test_two_epochs_with_uneven_last_batches(tmp_path):
    """40 images: batches of 12, 12, 12 and 4, so that in the last two of three processes have nothing of their own."""
    one = result(tmp_path / "one.pt", 1, 12, "--shuffle")
    several = result(tmp_path / "several.pt", 3, 12, "--shuffle")
    assert_equal_runs(one, several, 1e-5)
    assert len(one["logs"]) == 4
    assert one["momentum"]["queue._extra_state"] == 2 * (40 - 5), "every readable image once an epoch"
    assert one["metrics"]["eval_recall_sum"] == pytest.approx(several["metrics"]["eval_recall_sum"], abs=1e-6)


def test_two_processes_resume_bit_for_bit_in_the_second_epoch(tmp_path):
    """40 images in batches of 2 x 4 are 5 batches, 3 steps an epoch; the fifth step is within the second."""
    whole = result(tmp_path / "run.pt", 2, 8, "--shuffle", "--save_steps", "1")
    checkpoint = f"{tmp_path}/run.pt.run/checkpoint-4"
    resumed = result(tmp_path / "resumed.pt", 2, 8, "--shuffle", "--resume", checkpoint)
    assert whole["logs"] == resumed["logs"]
    for part in ("model", "momentum"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])


@pytest.mark.parametrize(
    ("fault", "message"),
    [("raise", "the storage is gone"), ("kill", "SIGKILL"), ("nan", "NonFiniteLossError: Step 3")],
)
def test_when_one_process_fails_all_end(tmp_path, fault, message):
    output = tmp_path / "run.pt"
    ended = launch(output, 2, "--batch", "4", "--fault", fault, check=False)  # the time-out of the call is the bound
    assert ended.returncode != 0
    assert message in ended.stderr, ended.stderr
    assert not output.exists()
    if fault == "nan":
        assert "loss_i2t is nan" in ended.stderr
        assert ended.stderr.count("NonFiniteLossError: Step 3") >= 2, "both processes know"
        assert latest_checkpoint(f"{output}.run") == f"{output}.run/checkpoint-2"
        resumed = result(output, 2, 8, "--resume", "latest")
        whole = result(tmp_path / "whole.pt", 2, 8)
        assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])


def test_when_one_process_hangs_the_other_ends_within_the_time_out(tmp_path):
    """As two machines without a common launcher: nobody but the time-out tells the one that the other is gone."""
    # The store is ours, on a port that it has: one looked up beforehand may be taken by the time it is needed.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    command = [
        sys.executable,
        str(RUN),
        str(tmp_path / "run.pt"),
        "--batch",
        "4",
        "--fault",
        "stop",
        "--timeout",
        "20",
    ]
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        _, errors = processes[0].communicate(timeout=300)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode not in (0, None)
    assert "imed out" in errors, errors


def test_a_mode_that_splits_the_model_is_refused(tmp_path):
    ended = launch(tmp_path / "run.pt", 1, "--batch", "4", "--fsdp", check=False)
    assert ended.returncode != 0
    assert "ValueError: fsdp='full_shard' cannot be used" in ended.stderr and "set shard_model" in ended.stderr


def test_processes_of_one_launch_are_one_run_and_all_of_them_are_refused_beside_another(tmp_path):
    folder = tmp_path / "run.pt.run"
    folder.mkdir()
    with FileLock(folder / LOCK_NAME):
        ended = launch(tmp_path / "run.pt", 2, "--batch", "4", check=False)
    assert ended.returncode != 0
    assert ended.stderr.count(f"ValueError: Another run is training into {folder}") == 2
