"""The configuration files: each is one that its script takes; those of the paper give the source of every value."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml
from script_runs import ENCODER, script_runner
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessor, ViTModel

from modeling_cots import COTSConfig, COTSModel, COTSTrainingArguments
from modeling_cots.scripts.command_line import parse_config_and_options
from modeling_cots.scripts.factory import train_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"

PAPER_RECIPES = ["pretrain_5m", "pretrain_15m", "flickr30k", "coco", "msrvtt"]
# Housekeeping of a run, about which no paper says anything.
WITHOUT_SOURCE = {"dataset", "output_dir", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "seed"}


def script_of(config: Path):
    """The script that the configuration's own command names."""
    name = re.search(r"examples/run_(\w+)\.py examples/configs/" + config.name, config.read_text()).group(1)
    return importlib.import_module(f"modeling_cots.scripts.{name}")


def parse(config: Path, *options: str):
    script = script_of(config)
    argv = [str(config), "--use_cpu", "true", *options]
    defaults = getattr(script, "DEFAULTS", None)
    return parse_config_and_options(script.ScriptArguments, COTSTrainingArguments, argv=argv, defaults=defaults)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one_that_its_script_takes(config):
    script_args, args = parse(config)
    assert args.output_dir == f"runs/{config.stem}"
    model_config = getattr(script_args, "model_config", None)
    if model_config is not None:
        COTSModel(COTSConfig.from_json_file(ROOT / model_config))


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_every_value_of_the_papers_recipes_has_its_source(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    sources = dict(re.findall(r"^(\w+):.*#.*\[([SPD])\]", text, flags=re.MULTILINE))
    assert set(values) - set(sources) <= WITHOUT_SOURCE
    assert "not been run" in text


def test_gradients_of_the_papers_videos_are_not_clipped():
    """The supplement mentions no clipping. transformers would clip; where a recipe keeps that, it says so."""
    assert parse(CONFIGS / "msrvtt.yaml")[1].max_grad_norm == 0
    for name in PAPER_RECIPES:
        assert "max_grad_norm" in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_every_recipe_of_the_paper_takes_its_adam_by_name(name):
    assert parse(CONFIGS / f"{name}.yaml", "--optim", "adam")[1].optim == "adam"


@pytest.mark.parametrize("name", ["pretrain_5m", "pretrain_15m"])
def test_pretraining_is_that_of_the_method(name):
    """Our reading of the paper: optimizer, m and tau of fine-tuning; 12,800; 5e-5 for 5 epochs; 384 pixels; 256."""
    _, args = parse(CONFIGS / f"{name}.yaml")
    assert (args.momentum, args.queue_size, args.learning_rate, args.lr_hold_epochs) == (0.99, 12_800, 5e-5, 5)
    assert (args.weight_decay, args.lr_scheduler_type, args.filter_num_std) == (0.02, "linear", 2)
    assert (args.image_mask_ratio, args.text_mask_ratio) == (0.4, 0.15)
    assert args.adaptive_filter and not args.batch_candidates
    assert [args.mcl_weight, args.kl_weight, args.cmvm_weight, args.cmlm_weight] == [1, 1, 1, 1]
    config = COTSConfig()
    assert (config.temperature, config.projection_dim, config.image_size) == (0.05, 256, (384, 384))


def test_the_two_pretraining_recipes_differ_in_their_data_only():
    small, large = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in PAPER_RECIPES[:2])
    assert {key for key in small if small[key] != large[key]} == {"output_dir"}


def test_a_pretraining_recipe_runs_on_a_few_images(tmp_path, monkeypatch):
    BertModel(BertConfig(**ENCODER, vocab_size=150)).save_pretrained(tmp_path / "bert")
    ViTModel(ViTConfig(**ENCODER, image_size=32, patch_size=16)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    train_tokenizer(["a red circle", "a red circle"], 150).save_pretrained(tmp_path / "bert")
    small = (CONFIGS / "quickstart_model.json").read_text()
    sizes = {"projection_dim": json.loads(small)["projection_dim"], "image_vocab_size": 30}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    run = script_runner(importlib.import_module("run_pretraining"), tmp_path, monkeypatch, image_tokenizer="random")
    encoders = {"text_model": str(tmp_path / "bert"), "vision_model": str(tmp_path / "vit")}
    recipe, sizes = str(CONFIGS / "pretrain_5m.yaml"), str(tmp_path / "sizes.json")
    run(
        "scenes", recipe, **encoders, model_config=sizes, max_text_length=None, queue_size=10, dataloader_num_workers=0
    )
    assert COTSModel.from_pretrained(tmp_path / "run").config.projection_dim == json.loads(small)["projection_dim"]
