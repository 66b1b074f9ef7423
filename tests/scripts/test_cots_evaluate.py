"""`cots-evaluate`: retrieval is measured, and nothing is trained."""

import functools
import json
import sys

import pytest
from script_runs import script_runner

from modeling_cots.scripts import cots_evaluate, cots_train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = script_runner(cots_train, folder, monkeypatch, image_tokenizer="random", eval_split="none")
        return run("scenes", max_steps=1)


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    runner = script_runner(cots_evaluate, tmp_path, monkeypatch, max_steps=None, zero_shot_protocol="none")
    return functools.partial(runner, model=str(trained))


@pytest.mark.parametrize("words", [(), ("retrieval",)])
def test_it_writes_results_and_a_card_and_trains_nothing(run, trained, words, capsys):
    folder = run("scenes", *words)
    printed = capsys.readouterr().out
    assert f"Nothing is trained: the checkpoint {trained} is measured." in printed
    assert "Training starts from" not in printed and "Defaults" not in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["trained_on"] is None and results["num_images"] == 200 and results["model"] == str(trained)
    assert (folder / "README.md").exists() and not (folder / "model.safetensors").exists()


def test_a_recipe_of_training_may_be_measured_with(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text("train_split: train\nlearning_rate: 0.001\n")
    folder = run("scenes", str(tmp_path / "recipe.yaml"))
    assert json.loads((folder / "results.json").read_text())["trained_on"] is None


@pytest.mark.parametrize("words", ["--train_split train", "--train_split=train", "video_retrieval --train_split none"])
def test_a_split_to_train_on_is_refused(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cots-evaluate", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cots_evaluate.main()
    assert "leave out --train_split, or use `cots-train" in ended.value.code and "\n" not in ended.value.code


def test_help_names_the_tasks_then_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cots-evaluate", "--help"])
    with pytest.raises(SystemExit):
        cots_evaluate.main()
    printed = capsys.readouterr().out
    assert "cots-evaluate video_retrieval [CONFIG.yaml]" in printed and "--zero_shot_protocol" in printed
