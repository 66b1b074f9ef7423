"""Models that are split among real processes (gloo), with their momentum copies: equal to one process, and resumed.

Many runs share a launch, as starting processes takes longer than training these models does.
"""

import json
from pathlib import Path

import pytest
import torch
from distributed_results import RUN, SGD, assert_equal_runs, read_result
from programs import TORCHRUN, run_python
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import is_torch_greater_or_equal

from modeling_cots import COTSModel
from modeling_cots.training.checkpoints import check_checkpoint, latest_checkpoint
from modeling_cots.training.sharding import MIN_TORCH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_torch_greater_or_equal(MIN_TORCH), reason=f"needs torch {MIN_TORCH}"),
]

SHARD = ("--set", "shard_model", "true")
# Two epochs with accumulation, the filter, and last batches that are not full; a line of logs every other step.
EPOCHS = ("--shuffle", "--set", "logging_steps", "2")
# Each run: its options, and how many pairs all processes share.
ALIKE = {
    "sgd": SGD,
    "adamw": EPOCHS,
    "fused": (*EPOCHS, "--optim", "adamw_torch_fused"),
    "adam": (*EPOCHS, "--optim", "adam", "--set", "encoder_learning_rate", "3e-4"),
    "one layer frozen": (*SGD, "--freeze", "1"),
    "encoders frozen": (*SGD, "--freeze", "all"),
    "videos": (*SGD, "--videos", "--set", "cmvm_weight", "0", "--set", "cmlm_weight", "0"),
    "bf16": (*SGD, "--set", "bf16", "true"),
}
# What makes no difference to a single process.
SAME = {
    "checkpointed layers": (*SGD, "--set", "gradient_checkpointing", "true"),
    "recomputed activations": (*SGD, "--set", "recompute_activations", "true"),
    "one pass after the other": (*SGD, "--split_passes"),
    "compiled layers": (*SGD, "--compile", "aot_eager"),
}
SAVING = (*EPOCHS, "--save_steps", "1")


def launch(num_processes: int, runs: dict[Path, tuple[str, ...]], check: bool = True):
    """Several runs in one launch; each is given the file for its outcome, and shares 12 pairs a batch."""
    arguments: list = []
    for output, options in runs.items():
        arguments += ["--then", output, "--batch", str(12 // num_processes), *options]
    launcher = ("-m", *TORCHRUN, str(num_processes)) if num_processes > 1 else ()
    return run_python(*launcher, RUN, *arguments[1:], check=check, timeout=1800)


def assert_equal_weights(whole: dict, resumed: dict) -> None:
    """All but the last line of logs, whose averages begin anew with another number of processes."""
    assert_equal_runs(whole, {**resumed, **{name: whole[name] for name in ("logs", "filtered")}}, 1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def split(folder) -> dict[str, Path]:
    """Outcomes of all runs of two processes that split the model."""
    runs = {name: folder / f"split {name}.pt" for name in (*ALIKE, *SAME, "saving", "resumed", "best")}
    options = {name: (*options, *SHARD) for name, options in {**ALIKE, **SAME}.items()}
    options["saving"] = (*SAVING, *SHARD, "--export", str(folder / "exported"))
    options["resumed"] = (*EPOCHS, *SHARD, "--resume", f"{runs['saving']}.run/checkpoint-3")
    best = ("--set", "eval_strategy", '"steps"', "--set", "eval_steps", "1", "--set", "load_best_model_at_end", "true")
    options["best"] = (*SAVING, *SHARD, *best)
    launch(2, {runs[name]: options[name] for name in runs})
    return runs


@pytest.fixture(scope="module")
def alone(folder, split) -> dict[str, Path]:
    """Outcomes of a single process that splits nothing; one of them goes on from a checkpoint of two."""
    runs = {name: folder / f"alone {name}.pt" for name in (*ALIKE, "resumed", "exported")}
    options = dict(ALIKE)
    options["exported"] = (*EPOCHS, "--export", str(folder / "exported alone"))
    options["resumed"] = (*EPOCHS, "--resume", f"{split['saving']}.run/checkpoint-3")
    launch(1, {runs[name]: options[name] for name in runs})
    return runs


@pytest.mark.parametrize("name", [name for name in ALIKE if name != "bf16"])
def test_two_processes_that_split_the_model_equal_one(split, alone, name):
    """SGD shows gradients as they are; Adam divides by their size, which makes more of the order of summing."""
    one, two = read_result(alone[name]), read_result(split[name])
    assert_equal_runs(one, two, 1e-6 if "sgd" in ALIKE[name] else 1e-5)
    assert one["metrics"]["eval_recall_sum"] == pytest.approx(two["metrics"]["eval_recall_sum"], abs=1e-6)


@pytest.mark.parametrize("name", SAME)
def test_how_the_model_runs_makes_no_difference(split, alone, name):
    assert_equal_runs(read_result(alone["sgd"]), read_result(split[name]), 1e-6, rtol=0)


def test_bfloat16_gathers_halves_and_keeps_weights_whole(split, alone):
    """Gathered in bfloat16, which has 8 bits: a loss differs by some 1 / 256 of itself."""
    one, two = read_result(alone["bf16"]), read_result(split["bf16"])
    for name in ("loss_i2t", "loss_t2i", "loss_cmvm", "loss_cmlm"):
        assert one["logs"][0][name] == pytest.approx(two["logs"][0][name], rel=1e-2)
    for part in ("model", "momentum"):
        assert all(t.dtype != torch.bfloat16 for t in two[part].values())


def test_a_split_run_resumes_bit_for_bit(split):
    whole, resumed = read_result(split["saving"]), read_result(split["resumed"])
    assert whole["logs"] == resumed["logs"]
    for part in ("model", "momentum"):
        assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])


def test_a_checkpoint_of_two_processes_goes_on_in_one(split, alone):
    """The batches of all processes together stay the same 12 pairs, so the order of the data does too."""
    assert_equal_weights(read_result(split["saving"]), read_result(alone["resumed"]))


def test_a_checkpoint_holds_the_model_whole_and_the_rest_in_parts(split):
    checkpoint = Path(latest_checkpoint(f"{split['saving']}.run"))
    files = check_checkpoint(checkpoint)["files"]
    parts = [name for name in files if name.startswith("training_state/")]
    assert len([name for name in parts if name.endswith(".safetensors")]) == 2, "one a process"
    assert "optimizer.pt" not in files and "momentum_state.safetensors" not in files
    model = read_result(split["saving"])["model"]
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        for name in file.keys():
            torch.testing.assert_close(file.get_tensor(name), model[name], rtol=0, atol=0)
        assert set(model) - set(file.keys()) == {"cmlm_head.1.weight"}, "tied"
    sizes = [(checkpoint / name).stat().st_size for name in parts if name.endswith(".safetensors")]
    assert max(sizes) < 0.7 * sum(sizes)


def test_the_best_model_is_loaded_at_the_end(split):
    checkpoint = Path(latest_checkpoint(f"{split['best']}.run"))
    best = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
    saved = load_file(Path(best) / "model.safetensors")
    model = read_result(split["best"])["model"]
    assert all(torch.equal(model[name], tensor) for name, tensor in saved.items())


def test_a_split_model_is_evaluated_before_training_and_exported(split, alone, folder):
    one, two = read_result(alone["exported"]), read_result(split["saving"])
    assert two["before"]["eval_recall_sum"] == pytest.approx(one["before"]["eval_recall_sum"], abs=1e-6)
    exported = COTSModel.from_pretrained(folder / "exported")
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, two["model"][f"cots.{name}"], rtol=0, atol=0)
    names = [sorted(path.name for path in (folder / each).iterdir()) for each in ("exported", "exported alone")]
    assert names[0] == names[1]


def test_two_replicas_of_two_processes_equal_one(folder, split, alone):
    """Four processes; the second run goes on from a checkpoint of two, in other parts."""
    replicas = (*SHARD, "--set", "shard_replicas", "2")
    checkpoint = f"{split['saving']}.run/checkpoint-3"
    runs = {
        folder / "replicas.pt": (*SGD, *replicas),
        folder / "again.pt": (*EPOCHS, *replicas, "--resume", checkpoint),
    }
    launch(4, runs)
    assert_equal_runs(read_result(alone["sgd"]), read_result(folder / "replicas.pt"), 1e-6)
    assert_equal_weights(read_result(split["saving"]), read_result(folder / "again.pt"))


def test_a_kill_and_a_nan_cost_nothing_that_was_saved(folder, split):
    killed, broken = folder / "killed.pt", folder / "nan.pt"
    ended = launch(2, {killed: (*SAVING, *SHARD, "--fault", "kill")}, check=False)
    assert ended.returncode != 0 and "SIGKILL" in ended.stderr, ended.stderr
    assert latest_checkpoint(f"{killed}.run") == f"{killed}.run/checkpoint-2"
    ended = launch(2, {broken: (*EPOCHS, *SHARD, "--fault", "nan")}, check=False)
    assert ended.stderr.count("NonFiniteLossError: Step 3") >= 2, "both processes know"
    assert latest_checkpoint(f"{broken}.run") == f"{broken}.run/checkpoint-2"
    latest = (*EPOCHS, *SHARD, "--resume", "latest")
    launch(2, {killed: latest, broken: latest})
    whole = read_result(split["saving"])
    for resumed in map(read_result, (killed, broken)):
        for part in ("model", "momentum"):
            assert all(torch.equal(whole[part][name], resumed[part][name]) for name in whole[part])
