"""The ablation of benchmarks/ at toy size: every arm trains with its real trainer, and tables come from the JSON."""

import io
import json
import sys
from pathlib import Path

import ablation
import ablation_table
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from modeling_cots import ScenesDataset

ROOT = Path(__file__).parents[2]


ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
MEASURED = {f"{side}_{name}": 10.0 for side in ("t2i", "i2t") for name in ablation_table.MEASURES}
METRICS = {**MEASURED, "recall_sum": 60.0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of scenes with five captions each."""
    for split, name, number in (("train", "train", 16), ("validation", "validation", 5), ("validation", "test", 5)):
        rows = {"image": [], "captions": []}
        for item in ScenesDataset(split, number, 32):
            file = io.BytesIO()
            item["image"].save(file, "PNG")
            rows["image"].append({"bytes": file.getvalue(), "path": f"{item['name']}.png"})
            rows["captions"].append(item["captions"])
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The recipe at toy size; an ablation of it has every option of the real one."""
    recipe = yaml.safe_load(ablation.RECIPE.read_text(encoding="utf-8"))
    model = {
        "text_config": {**ENCODER, "vocab_size": 200, "max_position_embeddings": 40},
        "vision_config": {**ENCODER, "image_size": 32, "patch_size": 16},
        "attn_implementation": "eager",
        "projection_dim": 16,
        "image_vocab_size": 30,
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    recipe |= {"model_config": str(tmp_path / "model.json"), "per_device_train_batch_size": 8, "queue_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "warmup_steps": 1, "disable_tqdm": True}))
    monkeypatch.setattr(ablation, "RECIPE", tmp_path / "recipe.yaml")
    monkeypatch.setattr(ablation, "PROTOCOL", None)
    monkeypatch.setattr(ablation, "SEEDS", (0,))


def start(monkeypatch, script, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_every_arm_runs_once_and_a_stopped_ablation_goes_on(folder, toy, monkeypatch, capsys):
    path = folder / "out.json"
    start(monkeypatch, ablation, folder, "--json", path, "--steps", 4)
    results = json.loads(path.read_text())
    assert [run["arm"] for run in results["runs"]] == [*ablation.ARMS, "b", "c", "d"]
    flop = results["flop_per_step"]
    assert flop["a"] < flop["b"] == flop["c"] < flop["d"]
    assert [run["steps"] for run in results["runs"][-3:]] == [round(4 * flop["a"] / flop[name]) for name in "bcd"]
    assert all(0 <= run["metrics"]["detection_auc"] <= 1 for run in results["runs"] if run["arm"].startswith("e-"))
    last = results["runs"].pop()
    path.write_text(json.dumps(results))
    capsys.readouterr()
    start(monkeypatch, ablation, folder, "--json", path, "--steps", 4)
    again = json.loads(path.read_text())["runs"]
    assert again[-1] == last, "and the same run gives the same numbers"
    assert sum(line.startswith('{"arm"') for line in capsys.readouterr().out.splitlines()) == 1


def test_trials_are_as_many_for_the_peer_and_of_what_the_trainers_know(folder, toy, monkeypatch):
    trials = ablation.trials_wanted(2)
    by_arm = {name: [trial for trial in trials if trial["arm"] == name] for name in ablation.TRIALS}
    assert len({len(group) for group in by_arm.values()}) == 1
    arms = ablation.Ablation(folder, "validation")
    for trial in trials:  # an option that there is not is an error here
        options = {name: value for name, value in trial["overrides"].items() if name != "temperature"}
        arms.arguments(options, 0, 2, str(folder / "work"))
    monkeypatch.setattr(ablation, "TRIALS", {name: group[-1:] for name, group in ablation.TRIALS.items()})
    path = folder / "out.json"
    start(monkeypatch, ablation, folder, "--json", path, "--steps", 2, "--trials")
    assert len(json.loads(path.read_text())["trials"]) == len(by_arm)


def test_the_peer_learns_by_its_own_loss_on_the_batches_of_cots(folder, toy, tmp_path):
    arms = ablation.Ablation(folder, "validation")
    trainers, batches = {}, {}
    for name in ("a", "b"):
        args = arms.arguments(ablation.ARMS[name].overrides, 0, 2, str(tmp_path / name))
        trainers[name] = arms.build_trainer(ablation.ARMS[name], args, arms.train_dataset, arms.config)
        batches[name] = next(iter(trainers[name].get_train_dataloader()))
    assert set(batches["a"]) == {"input_ids", "attention_mask", "pixel_values", "return_loss"}
    batches["b"] = trainers["b"].pixel_normalizer(batches["b"])
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batches["a"][name], batches["b"][name])
    outputs = trainers["a"].model.eval()(**batches["a"])
    same_pair = torch.arange(len(outputs.logits_per_text))
    in_batch = [cross_entropy(logits, same_pair) for logits in (outputs.logits_per_text, outputs.logits_per_image)]
    torch.testing.assert_close(outputs.loss, sum(in_batch) / 2)
    assert outputs.loss > 0


def test_results_of_another_recipe_are_not_gone_on_with(folder, toy, monkeypatch):
    path = folder / "out.json"
    path.write_text(json.dumps({"settings": {"recipe": {"momentum": 0.99}}}))
    with pytest.raises(ValueError, match="another recipe or other arms"):
        start(monkeypatch, ablation, folder, "--json", path)


def test_tables_are_written_between_the_marks(tmp_path):
    metrics = [{**METRICS, "t2i_recall_at_10": value} for value in (10.0, 12.0, 14.0)]
    runs = [{"arm": "a", "seed": seed, "steps": 100, "metrics": found} for seed, found in enumerate(metrics)]
    runs += [{"arm": "e-on", "seed": 0, "steps": 100, "metrics": {**METRICS, "detection_auc": 0.75}}]
    trials = [{"arm": "a", "seed": 0, "steps": 9, "overrides": {"learning_rate": 0.002}, "metrics": METRICS}]
    results = {"flop_per_step": {"a": 2.0, "e-on": 3.0}, "runs": runs, "trials": trials}
    (tmp_path / "out.json").write_text(json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablation_table.BEGIN}\nold\n{ablation_table.END}\nafter\n")
    for _ in range(2):
        ablation_table.write_tables(tmp_path / "out.json", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    same = "10.0 ± 0.0"
    assert f"| 100 | 1.00 | 3 | text to image | {same} | {same} | 12.0 ± 2.0 | {same} | 60.0 ± 0.0 |" in text
    assert "| 100 | 1.50 | 1 | text to image | 10.0 | 10.0 | 10.0 | 10.0 | 60.0 |" in text
    assert "filter on | 0.750 |" in text and "| a | `learning_rate` 0.002 | 9 | 10.0 | 10.0 |" in text
