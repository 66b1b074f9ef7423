"""What training starts from, and which defaults follow; what the user sets always stays."""

import json
import math
from dataclasses import dataclass

import pytest

from modeling_cots.scripts.starting_point import FROM_SCRATCH
from modeling_cots.scripts.steps import DataArguments, ModelArguments, parse_options, read_config
from modeling_cots.training.arguments import COTSTrainingArguments


@dataclass
class ScriptArguments(ModelArguments, DataArguments):
    pass


def parse(tmp_path, *options: str, defaults: dict | None = None):
    required = "--dataset", "scenes", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"
    argv = [*options, *required] if options and options[0].endswith(".yaml") else [*required, *options]
    return parse_options(ScriptArguments, argv=argv, defaults=defaults)


def test_from_scratch_every_default_for_that_is_taken_and_printed(tmp_path, capsys):
    _, args = parse(tmp_path)
    assert {name: getattr(args, name) for name in FROM_SCRATCH} == FROM_SCRATCH
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "fresh weights" in lines[0] and args.starting_point == "fresh weights"
    assert all(name in lines[1] for name in [*FROM_SCRATCH, "initializer_range"])


@pytest.mark.parametrize(
    "options",
    [
        ("--text_model", "org/text", "--vision_model", "org/vision"),
        ("--vision_model", "timm/vit"),
        ("--model", "runs/mine"),
    ],
)
def test_with_pretrained_weights_the_papers_defaults_stay(tmp_path, capsys, options):
    _, args = parse(tmp_path, *options)
    paper = COTSTrainingArguments(str(tmp_path / "run"), use_cpu=True)
    assert all(getattr(args, name) == getattr(paper, name) for name in FROM_SCRATCH)
    printed = capsys.readouterr().out
    assert "the paper's" in printed and all(name in printed for name in options[1::2])
    assert all(name in args.starting_point for name in options[1::2])


def test_what_the_user_sets_wins_on_the_command_line_and_in_the_file(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("kl_weight: 0.5\nqueue_size: 33\n", encoding="utf-8")
    _, args = parse(tmp_path, str(path), "--learning_rate", "0.25", "--adaptive_filter", "true")
    assert (args.kl_weight, args.queue_size, args.learning_rate, args.adaptive_filter) == (0.5, 33, 0.25, True)
    assert args.cmvm_weight == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "cmvm_weight" in line and not any(
        f"{name} " in line for name in ("kl_weight", "queue_size", "learning_rate")
    )


def test_a_log_of_the_filter_keeps_the_filter_on(tmp_path, capsys):
    _, args = parse(tmp_path, "--filter_log", str(tmp_path / "log"))
    assert args.adaptive_filter is True and "adaptive_filter" not in capsys.readouterr().out


def test_a_model_that_the_file_names_counts(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("model: runs/mine\n", encoding="utf-8")
    assert parse(tmp_path, str(path))[1].learning_rate == 5e-5


def test_the_defaults_of_a_script_give_way_to_those_from_scratch(tmp_path):
    defaults = {"queue_size": 4096, "max_grad_norm": 0.0}
    _, args = parse(tmp_path, defaults=defaults)
    assert (args.queue_size, args.max_grad_norm) == (FROM_SCRATCH["queue_size"], 0.0)
    assert parse(tmp_path, "--model", "runs/mine", defaults=defaults)[1].queue_size == 4096


@pytest.mark.parametrize("width", ["0", "-4", '"wide"', "1.5"])
def test_a_width_that_is_none_is_refused(tmp_path, width):
    path = tmp_path / "sizes.json"
    path.write_text(f'{{"text_config": {{"hidden_size": {width}}}, "vision_config": null}}', encoding="utf-8")
    with pytest.raises(ValueError, match="sizes.json: hidden_size must be a whole number above 0, got"):
        parse(tmp_path, "--model_config", str(path))


@pytest.mark.parametrize("fields", ['{"projection_dim": 8}', '{"text_config": ' + "8" * 300 + "}"])
def test_fields_in_place_of_a_file_of_them_are_refused(tmp_path, fields):
    with pytest.raises(ValueError, match="cannot be read: .* Give the name of a JSON file of COTSConfig fields"):
        parse(tmp_path, "--model_config", fields)


def test_fresh_encoders_start_at_a_deviation_for_their_width(tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    path = tmp_path / "sizes.json"
    content = {"text_config": {**sizes, "initializer_range": 0.5}, "vision_config": {**sizes, "hidden_size": 16}}
    path.write_text(json.dumps(content), encoding="utf-8")
    options, args = parse(tmp_path, "--model_config", str(path))
    assert args.learning_rate == pytest.approx(0.06 / 64), "of the wider encoder"
    config = read_config(options)
    assert (config.text_config.initializer_range, config.vision_config.initializer_range) == (0.5, 0.25)
    options, args = parse(tmp_path)
    assert args.learning_rate == pytest.approx(0.06 / 768)
    config = read_config(options)
    assert config.text_config.initializer_range == pytest.approx(1 / math.sqrt(768))
