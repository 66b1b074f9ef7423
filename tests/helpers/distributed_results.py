"""What runs of `distributed_run.py` have written, and whether two of them are equal."""

from pathlib import Path

import pytest
import torch

from modeling_cots.training.filter_log import read_filter_log

RUN = Path(__file__).with_name("distributed_run.py")
# Plain gradient descent at a rate that moves every weight by its gradient: what differs in a gradient is seen in full.
SGD = ("--max_steps", "1", "--optim", "sgd", "--learning_rate", "1", "--queue_size", "8")


def read_result(output: Path) -> dict:
    rows = read_filter_log(f"{output}.filter_log").drop(["attempt", "attempt_step"])
    return {**torch.load(output, weights_only=True), "filtered": rows.to_pylist()}


def assert_equal_runs(one: dict, several: dict, tolerance: float, rtol: float = 1e-4) -> None:
    assert len(one["logs"]) == len(several["logs"]) > 0
    for alone, split in zip(one["logs"], several["logs"], strict=True):
        for name in ("kept_fraction", "queue_fill", "skipped_images", "learning_rate"):
            assert alone[name] == split[name], name
        losses = {"loss_i2t", "loss_t2i", "loss_kl", "loss_cmvm", "loss_cmlm", "filter_threshold"}
        assert losses & alone.keys() == losses & split.keys()
        for name in losses & alone.keys():
            assert alone[name] == pytest.approx(split[name], rel=1e-4, abs=1e-5), name
    assert one["momentum"]["queue.pair_ids"].tolist() == several["momentum"]["queue.pair_ids"].tolist()
    assert int(one["momentum"]["queue._extra_state"]) == int(several["momentum"]["queue._extra_state"])
    decisions = [[(row["step"], row["pair_id"], row["name"]) for row in run["filtered"]] for run in (one, several)]
    assert decisions[0] == decisions[1]
    for part in ("model", "momentum"):
        for name, tensor in one[part].items():
            torch.testing.assert_close(
                several[part][name], tensor, rtol=rtol, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
