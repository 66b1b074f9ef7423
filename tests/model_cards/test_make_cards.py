"""`model_cards/`: the command that writes cards, and the cards that stand there."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from card_records import METRICS, check_metadata, make_record
from huggingface_hub import ModelCard

from modeling_cots import COTSModel
from modeling_cots.training.record import REPORTED_SETTINGS, save_record

ROOT = Path(__file__).parents[2]
CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if "template" not in path.name)
RECIPES = {"pretrain_5m": "cots-base-5m-recipe", "pretrain_15m": "cots-base-15m-recipe"}


@pytest.fixture(scope="module")
def make_cards():
    spec = importlib.util.spec_from_file_location("make_cards", ROOT / "model_cards/make_cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_folder_becomes_a_card(make_cards, tiny_config, tmp_path, capsys):
    COTSModel(tiny_config).save_pretrained(tmp_path / "run")
    save_record(make_record(), tmp_path / "run")
    make_cards.main([str(tmp_path / "run"), str(tmp_path / "cards/first.md")])
    assert "first.md" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "cards/first.md")
    check_metadata(card)
    recalls = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert recalls == {name: round(value, 2) for name, value in METRICS.items() if "recall" in name}


def test_a_card_links_the_space_that_is_named(make_cards, tiny_config, tmp_path):
    COTSModel(tiny_config).save_pretrained(tmp_path / "run")
    save_record(make_record(), tmp_path / "run")
    make_cards.main([str(tmp_path / "run"), str(tmp_path / "first.md"), "--space", "you/search"])
    text = (tmp_path / "first.md").read_text(encoding="utf-8")
    assert "# first\n\n[Try it in your browser](https://huggingface.co/spaces/you/search).\n\nA two-stream" in text
    check_metadata(ModelCard.load(tmp_path / "first.md"))
    with pytest.raises(ValueError, match="--space must name a Space as owner/name, got 'search'"):
        make_cards.main([str(tmp_path / "run"), str(tmp_path / "second.md"), "--space", "search"])
    assert not (tmp_path / "second.md").exists()


@pytest.mark.parametrize(("config", "name"), RECIPES.items())
def test_recipe_cards_are_what_the_command_writes_and_say_that_there_are_no_weights(
    make_cards, tmp_path, config, name
):
    path = ROOT / f"examples/configs/{config}.yaml"
    make_cards.main([str(path), str(tmp_path / f"{name}.md")])
    text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert text == (ROOT / f"model_cards/{name}.md").read_text(encoding="utf-8")
    assert "**There are no weights of this model.**" in text and "model-index" not in text
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    for setting in REPORTED_SETTINGS:
        if setting in options:
            assert f"| `{setting}` | {options[setting]} |" in text


def test_what_is_neither_a_run_nor_a_recipe(make_cards, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_cards.main([str(tmp_path / "nothing"), str(tmp_path / "card.md")])
    assert "there is no" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no training_record.json"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "cots"}))
        make_cards.main([str(tmp_path), str(tmp_path / "card.md")])
    with pytest.raises(ValueError, match="no recipe of the paper"):
        make_cards.main([str(ROOT / "examples/configs/quickstart.yaml"), str(tmp_path / "card.md")])


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_card_here_is_valid_and_written_by_the_command(path):
    card = ModelCard.load(path)
    check_metadata(card)
    assert card.data.library_name == "transformers" and card.data.license == "apache-2.0"
    assert path.stem in RECIPES.values() or card.data.model_name == path.stem
    for example in card.data.get("widget") or []:
        labels = example["candidate_labels"].split(", ")
        assert sorted(found["label"] for found in example["output"]) == sorted(labels)
        assert sum(found["score"] for found in example["output"]) == pytest.approx(1, abs=1e-3)
