"""`cots-train`: the trainings of `examples/`, by the first word of the command line."""

import json
import sys

import pytest
import run_pretraining
import run_retrieval
import run_video_retrieval
from script_runs import script_runner

from modeling_cots import COTSModel
from modeling_cots.scripts import cots_train, pretraining, retrieval, video_retrieval


@pytest.fixture
def run(tmp_path, monkeypatch):
    return script_runner(cots_train, tmp_path, monkeypatch)


def test_the_scripts_call_the_same_functions():
    assert run_pretraining.main is pretraining.main
    assert run_retrieval.main is retrieval.main
    assert run_video_retrieval.main is video_retrieval.main
    assert {f"modeling_cots.scripts.{task}" for task in cots_train.TASKS} == {
        function.__module__ for function in (pretraining.main, retrieval.main, video_retrieval.main)
    }


@pytest.mark.parametrize("words", [(), ("pretraining",)])
def test_it_pre_trains_unless_told_otherwise(run, capsys, words):
    folder = run("scenes", *words, image_tokenizer="random")
    assert f"The model is in {folder}" in capsys.readouterr().out
    assert COTSModel.from_pretrained(folder).config.vision_config.image_size == 32
    assert not (folder / "results.json").exists()


def test_retrieval_fine_tunes_and_measures(run, tmp_path):
    checkpoint = run("scenes", image_tokenizer="random", eval_split="none", output_dir=str(tmp_path / "first"))
    folder = run("scenes", "retrieval", model=str(checkpoint))
    results = json.loads((folder / "results.json").read_text())
    assert results["model"] == str(checkpoint) and results["trained_on"] == "scenes train"


def test_options_may_stand_in_a_file_behind_the_word(run, tmp_path):
    (tmp_path / "some.yaml").write_text("image_tokenizer: random\neval_split: none\n")
    folder = run("scenes", "pretraining", str(tmp_path / "some.yaml"), max_steps=1)
    assert (folder / "model.safetensors").exists() and not (folder / "eval_results.json").exists()


def test_help_names_the_tasks_then_the_options(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cots-train", "--help"])
    with pytest.raises(SystemExit) as ended:
        cots_train.main()
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for task in cots_train.TASKS:
        assert task in printed
    assert "usage: cots-train [CONFIG.yaml] [--option value ...]" in printed
    assert "cots-train my.yaml --resume_from_checkpoint latest\n" in printed  # the description keeps its lines
    assert "(default: validation)" in printed


def test_an_error_is_one_sentence(monkeypatch, tmp_path):
    argv = ["cots-train", "video_retrieval", "--dataset", str(tmp_path / "none.mp4"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cots_train.main()
    assert "none.mp4" in ended.value.code and "\n" not in ended.value.code
