"""The estimate script as a user starts it."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from transformers import BertConfig, Dinov2Config

from modeling_cots.training.recomputed_activations import IS_SEEN

ROOT = Path(__file__).parents[2]
COSTS = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python examples/estimate\.py (.*)", COSTS.replace("\\\n", " "), flags=re.MULTILINE)
PAPER_RECIPES = "pretrain_5m", "pretrain_15m", "flickr30k", "coco", "msrvtt"
CONFIGS = [path for path in sorted((ROOT / "examples" / "configs").glob("*.yaml")) if path.stem not in PAPER_RECIPES]


@pytest.fixture
def estimate(monkeypatch, capsys):
    """A function that runs the script on a configuration with further options and returns what it prints."""

    def run(*options: str, config: str | Path | None = "quickstart") -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        files = [] if config is None else [str((ROOT / "examples" / "configs" / config).with_suffix(".yaml"))]
        monkeypatch.setattr(sys, "argv", ["estimate.py", *files, *options])
        runpy.run_path("examples/estimate.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def number(printed: str, title: str) -> float:
    return float(re.search(rf"^{title} +([\d.]+)", printed, flags=re.MULTILINE).group(1))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_has_a_cost(estimate, tmp_path, config):
    """Shapes of the real recipes; the text encoder's configuration, which is on the Hub, is a folder here."""
    options = ["--num_pairs", "1000000", "--gpu_tflops", "100"]
    if "text_model:" in config.read_text():
        BertConfig().save_pretrained(tmp_path)
        options += ["--text_model", str(tmp_path)]
    if "vision_model: facebook" in config.read_text():
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14).save_pretrained(
            tmp_path / "v"
        )
        options += ["--vision_model", str(tmp_path / "v")]
    printed = estimate(*options, config=config.stem)
    assert 2 < number(printed, "parameters") < 210
    assert number(printed, "largest batch of a device") >= 48
    flop, per_second = number(printed, "GFLOP a pair"), number(printed, "pairs a second")
    assert 100e12 / per_second / 1e9 == pytest.approx(flop, rel=0.05, abs=0.006)  # printed with two digits
    is_cached = "feature_cache:" in config.read_text()  # then nothing of an encoder is kept for the backward pass
    assert is_cached or number(printed, "memory a pair") > 0.5
    assert "hours" in printed


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: Path(command.split()[0]).stem)
def test_the_cost_table_is_what_its_commands_print(estimate, command):
    """As they stand on the page, without a hub: sizes come from names and configurations, and no weights are read."""
    config, *options = shlex.split(command)
    printed = estimate(*options, config=ROOT / config)
    name = Path(config).stem
    row = re.search(rf"^\| `{name}`, (\d+) epochs of ([\d,]+) .*$", COSTS, flags=re.MULTILINE)
    num_epochs, num_pairs = (int(value.replace(",", "")) for value in row.groups())
    cells = [cell.split()[0].replace(",", "") for cell in row.group(0).strip("| ").split(" | ")[1:]]
    assert f"{num_epochs * num_pairs:,} pairs seen" in printed
    num_gpus = int(re.search(r"on (\d+) GPU", row.group(0)).group(1))
    assert f"TFLOP/s x {num_gpus}\n" in printed
    titles = "GFLOP a pair", "memory a pair", "memory of weights and queue", "hours"
    for title, cell in zip(titles, cells, strict=True):
        digits = len(cell.partition(".")[2])
        assert f"{number(printed, title):.{digits}f}" == cell, title
    batch = yaml.safe_load((ROOT / config).read_text())["per_device_train_batch_size"]
    assert number(printed, "largest batch of a device") >= batch
    takes = batch * number(printed, "memory a pair") / 1024 + number(printed, "memory of weights and queue")
    assert f"{takes:.0f} GiB" in COSTS


def test_the_cost_table_has_the_papers_recipes():
    assert [Path(command.split()[0]).stem for command in COMMANDS] == list(PAPER_RECIPES)


def test_a_video_costs_its_frames(estimate):
    costs = [number(estimate("--num_frames", n, config="moving_scenes"), "  vision, momentum") for n in ("8", "80")]
    assert costs[1] == pytest.approx(10 * costs[0], rel=0.05)


def test_image_tokens_that_the_data_bring_along_cost_nothing(estimate):
    assert "image tokenizer" in estimate("--cmvm_weight", "1")
    assert "image tokenizer" not in estimate("--cmvm_weight", "1", "--image_tokenizer", "none")


def test_a_model_is_split_among_the_devices(estimate):
    title = "memory of weights and queue"
    whole, split = estimate("--num_gpus", "8"), estimate("--num_gpus", "8", "--shard_model", "true")
    assert number(split, title) < number(whole, title)
    with pytest.raises(SystemExit, match="shard_model splits the model among several processes"):
        estimate("--shard_model", "true")


def test_timm_names_say_the_size(estimate, tmp_path):
    model = ["--dataset", "COCO", "--vision_model", "timm/vit_small_patch16_384.augreg_in21k_ft_in1k"]
    printed = estimate(*model, "--image_size", "96", config=None)
    assert number(printed, "  vision encoder") == pytest.approx(21.6, abs=0.1)
    with pytest.raises(SystemExit, match="timm cannot build timm/nothing"):
        estimate("--dataset", "COCO", "--vision_model", "timm/nothing", config=None)
    with pytest.raises(SystemExit, match="hidden_size is 128 in the model_config and 384 in vision_model timm/"):
        estimate(*model)


def test_a_named_script_gives_its_options_and_defaults(estimate):
    """Retrieval leaves the token losses out by default, and has a longer queue; from scratch other defaults hold."""
    vision_model = "timm/vit_small_patch16_384.augreg_in21k_ft_in1k"
    sizes = ["--dataset", "COCO", "--vision_model", vision_model, "--image_size", "48"]
    spelled_out = estimate(*sizes, "--cmvm_weight", "0", "--cmlm_weight", "0", "--queue_size", "4096", config=None)
    assert estimate(*sizes, "--script", "run_retrieval", config=None) == spelled_out
    assert estimate(*sizes, "--script=run_pretraining", config=None) == estimate(*sizes, config=None) != spelled_out
    video = estimate(*sizes, "--script", "run_video_retrieval", config=None)
    assert number(video, "  vision, momentum") == pytest.approx(
        16 * number(spelled_out, "  vision, momentum"), rel=0.05
    )


def test_a_named_script_refuses_the_options_of_another(estimate, tmp_path, capsys):
    with pytest.raises(SystemExit, match="options that do not exist: num_frames"):
        estimate("--script", "run_retrieval", config="moving_scenes")
    with pytest.raises(SystemExit):
        estimate("--script", "run_everything")
    assert "invalid choice: 'run_everything'" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("dataset: scenes\nscript: run_retrieval\n")
    with pytest.raises(SystemExit, match="give --script on the command line"):
        estimate(config=tmp_path / "mine.yaml")


def test_hours_follow_from_pairs_rate_and_devices(estimate):
    printed = {}
    for num_gpus in (1, 4):
        options = ["--num_pairs", "100000000", "--num_gpus", str(num_gpus), "--gpu_tflops", "1"]
        line = next(line for line in estimate(*options).splitlines() if line.startswith("hours"))
        printed[num_gpus] = float(line.split()[1])
    assert printed[1] > 10
    assert printed[4] == pytest.approx(printed[1] / 4, abs=0.06)


@pytest.mark.skipif(not IS_SEEN, reason="this torch does not tell what it keeps")
def test_a_batch_that_will_not_fit_is_said(estimate):
    assert "will not fit" not in estimate()
    small = "--gpu_memory_gib", "0.2", "--per_device_train_batch_size", "512"
    assert "512 will not fit: set recompute_activations or" in estimate(*small)
    again = estimate(*small, "--recompute_activations", "true")
    assert "512 will not fit: set gradient_checkpointing instead or" in again
    least = estimate("--gpu_memory_gib", "0.01", *small[2:], "--gradient_checkpointing", "true")
    assert "512 will not fit: take a smaller batch" in least


def test_without_the_number_of_pairs_there_are_no_hours(estimate):
    assert "hours: give --num_pairs" in estimate()
