"""The benchmark of any data at toy size: every arm runs by the script itself and once, and stands in the table."""

import json
import sys

import any_data
import pytest
import torch

pytest.importorskip("sklearn")


def start(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["any_data.py", *map(str, arguments)])
    any_data.main()


def test_every_arm_runs_once_and_stands_in_the_table(tmp_path, monkeypatch):
    path, page = tmp_path / "out.json", tmp_path / "page.md"
    options = "--json", path, "--sets", "digits", "emoji", "--seeds", 3, "--steps", 2
    start(monkeypatch, *options)
    runs = json.loads(path.read_text())
    assert [(run["set"], run["arm"]) for run in runs] == [("digits", arm) for arm in any_data.ARMS], "emoji need npm"
    assert all(0 <= run["score"] <= 100 and run["held_out"] == 397 for run in runs)
    monkeypatch.setattr(any_data, "run", None)  # nothing is left to run
    start(monkeypatch, *options)
    page.write_text(f"before\n{any_data.START}\nold\n{any_data.END}\nafter\n")
    start(monkeypatch, "--json", path, "--table", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| scikit-learn's digits | 2 x 50 | zero-shot accuracy |" in text


def test_the_peer_passes_gradients_through_both_sides(make_trainer):
    """Its loss is that of COTSModel, and so in-batch contrast."""
    trainer = make_trainer(cmvm_weight=0, cmlm_weight=0)
    items = [trainer.train_dataset[index] for index in range(6)]
    batch = trainer._prepare_inputs(trainer.data_collator(items))
    loss = any_data.InBatchTrainer.compute_loss(trainer, trainer.model.eval(), batch)
    cots = trainer.model.cots
    images = cots.encode_image(batch["pixel_values"])
    texts = cots.encode_text(batch["input_ids"], batch["attention_mask"])
    logits = images @ texts.t() / cots.config.temperature
    both = [torch.nn.functional.cross_entropy(each, torch.arange(6)) for each in (logits, logits.t())]
    ratio = loss.item() / sum(each.item() for each in both)
    assert ratio == pytest.approx(1, rel=1e-5) or ratio == pytest.approx(0.5, rel=1e-5), "a sum, or a mean, of both"
