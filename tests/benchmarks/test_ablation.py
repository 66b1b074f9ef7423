"""The ablation of benchmarks/ at toy size: every arm trains with its real trainer, and tables come from the JSON."""

import io
import json
import sys
from pathlib import Path

import ablation
import ablation_table
import ablation_upper_layers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model, ViTImageProcessor

from modeling_cots import ScenesDataset
from modeling_cots.scripts.factory import train_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
METRICS = {f"{side}_recall_at_{k}": 10.0 for side in ("t2i", "i2t") for k in (1, 10)} | {"recall_sum": 60.0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Images of scenes with five captions each, and two tiny encoders."""
    captions = []
    for split, name, number in (("train", "train", 16), ("validation", "validation", 5), ("validation", "test", 5)):
        rows = {"image": [], "captions": []}
        for item in ScenesDataset(split, number, 32):
            file = io.BytesIO()
            item["image"].save(file, "PNG")
            rows["image"].append({"bytes": file.getvalue(), "path": f"{item['name']}.png"})
            rows["captions"].append(item["captions"])
            captions += item["captions"]
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), tmp_path / "data" / f"{name}.parquet")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(captions, 100)
    tokenizer.save_pretrained(tmp_path / "text")
    BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "text")
    Dinov2Model(Dinov2Config(**SIZES, image_size=28, patch_size=7)).save_pretrained(tmp_path / "vision")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "vision")
    return tmp_path


@pytest.fixture
def toy(folder, monkeypatch):
    """The recipe at toy size, with every option of the real one; an ablation of it has the real arms."""
    recipe = yaml.safe_load(ablation.RECIPE.read_text(encoding="utf-8"))
    recipe |= {"image_size": 28, "max_steps": 4, "per_device_train_batch_size": 8, "queue_size": 8}
    recipe |= {"projection_hidden_size": 8, "vision_model": str(folder / "vision"), "text_model": str(folder / "text")}
    arms = ablation.read_arms()
    (folder / "flickr8k_dinov2.yaml").write_text(yaml.safe_dump(recipe))
    for module in (ablation, ablation_table):
        monkeypatch.setattr(module, "RECIPE", folder / "flickr8k_dinov2.yaml")
    monkeypatch.setattr(ablation, "read_arms", lambda: arms)
    monkeypatch.setattr(ablation, "PROTOCOL", None)
    monkeypatch.setattr(ablation, "SEEDS", (0,))
    monkeypatch.setattr(ablation, "SMALL_BATCH", {"per_device_train_batch_size": 4, "max_steps": 6})


def start(monkeypatch, script, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def test_every_arm_runs_once_and_a_stopped_ablation_goes_on(folder, toy, monkeypatch, capsys):
    path, given = folder / "out.json", ("--features", folder / "features")
    start(monkeypatch, ablation, folder / "data", "--json", path, *given)
    results = json.loads(path.read_text())
    runs = results["runs"]
    assert {run["arm"] for run in runs} == set(ablation.read_arms())
    flop = results["flop_per_step"]["8"]
    assert flop["in_batch"] < flop["mcl"]
    fewer = {"max_steps": round(4 * flop["in_batch"] / flop["mcl"])}
    assert [run["arm"] for run in runs if run["overrides"] == fewer] == ["mcl"]
    noisy = [run for run in runs if run.get("noise") and run["arm"] != "in_batch"]
    assert all(0 <= run["metrics"]["detection_auc"] <= 1 for run in noisy)
    assert all(0 <= run["metrics"]["dropped_noise"] <= 100 for run in noisy if run["arm"].startswith("filter"))
    last = results["runs"].pop()
    path.write_text(json.dumps(results))
    capsys.readouterr()
    start(monkeypatch, ablation, folder / "data", "--json", path, *given)
    again = json.loads(path.read_text())["runs"]
    assert again[-1] == last, "and the same run gives the same numbers"
    assert sum(line.startswith('{"arm"') for line in capsys.readouterr().out.splitlines()) == 1
    changed = yaml.safe_load(ablation.RECIPE.read_text()) | {"momentum": 0.5}
    ablation.RECIPE.write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match="another recipe or other arms"):
        start(monkeypatch, ablation, folder / "data", "--json", path, *given)


def test_trials_are_as_many_for_the_peer_and_are_measured_on_validation_images(folder, toy, monkeypatch):
    wanted = ablation.trials_wanted()
    assert len({sum(run["arm"] == name for run in wanted) for name in (ablation.PEER, ablation.MCL)}) == 1
    path = folder / "out.json"
    start(monkeypatch, ablation, folder / "data", "--json", path, "--features", folder / "features", "--trials")
    assert [run["arm"] for run in json.loads(path.read_text())["trials"]] == [run["arm"] for run in wanted]


def test_the_peer_begins_alike_and_learns_by_its_own_loss_on_the_batches_of_cots(folder, toy):
    made, arms = ablation.Ablation(folder / "data", "validation", folder / "features", {}), ablation.read_arms()
    trainers = {}
    for name in ("in_batch", "mcl"):
        args = made.arguments(arms[name].overrides, 0, str(folder / name))
        dataset = ablation.PairsInMemory(made.train_dataset)
        trainers[name] = made.build_trainer(arms[name], args, dataset, made.config)
    peer, cots = trainers["in_batch"].model.eval(), trainers["mcl"].model.cots
    for mine, its in ((cots.vision_projection, peer.visual_projection), (cots.text_projection, peer.text_projection)):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, its.state_dict()[name]), name
    batches = {name: next(iter(trainer.get_train_dataloader())) for name, trainer in trainers.items()}
    assert torch.equal(batches["in_batch"]["pixel_values"], batches["mcl"]["image_features"])
    assert torch.equal(batches["in_batch"]["input_ids"], batches["mcl"]["text_features"])
    outputs = peer(**batches["in_batch"])
    same_pair = torch.arange(len(outputs.logits_per_text))
    in_batch = [cross_entropy(logits, same_pair) for logits in (outputs.logits_per_text, outputs.logits_per_image)]
    torch.testing.assert_close(outputs.loss, sum(in_batch) / 2)


def test_noise_moves_captions_with_their_features(folder, toy):
    made = ablation.Ablation(folder / "data", "validation", folder / "features", {})
    clean, noisy = ablation.PairsInMemory(made.train_dataset), ablation.PairsInMemory(made.train_dataset, 0.5, seed=1)
    features = {
        caption: row for item in clean for caption, row in zip(item["captions"], item["text_features"], strict=True)
    }
    num_moved = 0
    for before, item, is_moved in zip(clean, noisy, noisy.is_moved, strict=True):
        rows = zip(item["captions"], item["text_features"], strict=True)
        assert all((features[caption] == row).all() for caption, row in rows)
        stayed = [old == new for old, new in zip(before["captions"], item["captions"], strict=True)]
        assert all(same or moved for same, moved in zip(stayed, is_moved, strict=True))
        num_moved += sum(is_moved)
    assert num_moved == round(0.5 * 16 * 5)


def test_captions_are_drawn_anew_in_each_epoch(folder, toy):
    made = ablation.Ablation(folder / "data", "validation", folder / "features", {})
    pairs = ablation.PairsInMemory(made.train_dataset)
    first = [item["seed"] for item in pairs]
    pairs.set_epoch(1)
    assert not set(first) & {item["seed"] for item in pairs}


def test_upper_layers_train_from_the_projections_of_the_same_seed_with_masked_losses_and_without(
    folder, toy, monkeypatch
):
    pytest.importorskip("faiss")
    vision = Dinov2Config(**{**SIZES, "num_hidden_layers": 2}, image_size=28, patch_size=7)
    Dinov2Model(vision).save_pretrained(folder / "vision")
    second = {"freeze_vision": "1", "freeze_text": "all", "max_steps": 2, "logging_steps": 1}
    for name, value in {"FIRST_STAGE": {"image_size": 14}, "SECOND_STAGE": second, "VOCAB_SIZE": 8}.items():
        monkeypatch.setattr(ablation_upper_layers, name, value)
    monkeypatch.setattr(ablation_upper_layers, "SEEDS", (0, 1))
    trained = []
    original = ablation_upper_layers.COTSTrainer.train
    monkeypatch.setattr(
        ablation_upper_layers.COTSTrainer, "train", lambda self: (trained.append(self), original(self))[1]
    )
    path, given = folder / "out.json", ("--features", folder / "features", "--tokens", folder / "tokens")
    start(monkeypatch, ablation_upper_layers, folder / "data", "--json", path, *given)
    runs = json.loads(path.read_text())["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [
        ("contrast", 0),
        ("masked", 0),
        ("contrast", 1),
        ("masked", 1),
    ]
    assert runs[0]["metrics"]["before"] == runs[1]["metrics"]["before"]
    assert [trainer.args.cmvm_weight for trainer in trained] == [0, 0, 1, 0, 0, 1], "first stages are run once a seed"
    for stages in (trained[:3], trained[3:]):
        first, *both = [trainer.model.cots.vision_model.encoder.layer for trainer in stages]
        for layers in both:
            assert torch.equal(layers[0].norm1.weight, first[0].norm1.weight)
            assert not torch.equal(layers[1].norm1.weight, first[1].norm1.weight)
        assert stages[2].model.config.image_vocab_size == 8
    page = folder / "page.md"
    page.write_text(f"{ablation_table.BEGIN_UPPER}\n{ablation_table.END_UPPER}\n")
    start(monkeypatch, ablation_table, path, page, "--upper_layers")
    assert page.read_text().count("| 2 |") == 2
    with pytest.raises(ValueError, match="another recipe or other arms"):
        monkeypatch.setattr(ablation_upper_layers, "FIRST_STAGE", {"image_size": 28})
        start(monkeypatch, ablation_upper_layers, folder / "data", "--json", path, *given)


def test_tables_are_written_between_the_marks(tmp_path):
    runs = [
        {"arm": "in_batch", "overrides": {}, "seed": seed, "metrics": {**METRICS, "recall_sum": 60.0 + 2 * seed}}
        for seed in range(3)
    ]
    runs += [{"arm": "mcl", "overrides": {"max_steps": 450}, "seed": 0, "metrics": METRICS}]
    found = {**METRICS, "detection_auc": 0.75, "dropped_noise": 80.0, "dropped_clean": 5.0}
    runs += [{"arm": "filter_mixture", "overrides": {}, "noise": 0.2, "seed": 0, "metrics": found}]
    trials = [{"arm": "mcl", "seed": 0, "overrides": {"learning_rate": 0.002}, "metrics": METRICS}]
    results = {"flop_per_step": {"64": {"in_batch": 2.0, "mcl": 3.0}}, "runs": runs, "trials": trials}
    (tmp_path / "out.json").write_text(json.dumps(results))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablation_table.BEGIN}\nold\n{ablation_table.END}\nafter\n")
    for _ in range(2):
        ablation_table.write_tables(tmp_path / "out.json", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    same = "10.0 ± 0.0 / 10.0 ± 0.0"
    assert f"| 64 | 900 | 1.00 | 3 | {same} | {same} | 62.0 ± 2.0 |" in text
    assert "| MCL | 64 | 450 | 0.75 | 1 | 10.0 / 10.0 | 10.0 / 10.0 | 60.0 |" in text
    assert "| MCL, filter by the mixture | 20 % | 60.0 | 80.0 / 5.0 | 0.750 |" in text
    assert "| MCL | `learning_rate` 0.002 | 60.0 |" in text
