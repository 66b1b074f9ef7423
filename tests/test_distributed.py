"""Several real processes (gloo) on a split batch against one process on the joined batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).parent / "distributed_run.py"


def launch(tmp_path: Path, num_processes: int) -> dict:
    """Weights, queues, logs and metrics of a run with 8 pairs a step in all."""
    output = tmp_path / f"{num_processes}.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [*launcher, str(RUN), str(output), "--batch", str(8 // num_processes)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    return torch.load(output, weights_only=True)


@pytest.mark.slow
def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    """With accumulation, unreadable pictures, and a process that keeps nothing in one of its batches."""
    one, two = launch(tmp_path, 1), launch(tmp_path, 2)
    assert len(one["logs"]) == len(two["logs"]) == 6
    for alone, split in zip(one["logs"], two["logs"], strict=True):
        for name in ("kept_fraction", "queue_fill", "skipped_images"):
            assert alone[name] == split[name], name
        for name in ("loss_i2t", "loss_t2i", "loss_kl", "loss_cmvm", "loss_cmlm", "filter_threshold"):
            assert alone[name] == pytest.approx(split[name], rel=1e-4, abs=1e-5), name
    assert any(entry["kept_fraction"] < 1 for entry in one["logs"])
    assert one["momentum"]["queue.pair_ids"].tolist() == two["momentum"]["queue.pair_ids"].tolist()
    for part in ("model", "momentum"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(two[part][name], tensor, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
    assert one["metrics"]["eval_recall_sum"] == pytest.approx(two["metrics"]["eval_recall_sum"], abs=1e-6)
