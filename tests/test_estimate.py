"""The estimate script as a user starts it."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def estimate(monkeypatch, capsys):
    """A function that runs the script on a recipe with further options and returns what it prints."""

    def run(*options: str, recipe: str = "quickstart") -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.setattr(sys, "argv", ["estimate.py", f"examples/configs/{recipe}.yaml", *options])
        runpy.run_path("examples/estimate.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def test_hours_follow_from_pairs_rate_and_devices(estimate):
    printed = {}
    for num_gpus in (1, 4):
        options = ["--num_pairs", "100000000", "--num_gpus", str(num_gpus), "--gpu_tflops", "1"]
        line = next(line for line in estimate(*options).splitlines() if line.startswith("hours"))
        printed[num_gpus] = float(line.split()[1])
    assert printed[1] > 10
    assert printed[4] == pytest.approx(printed[1] / 4, abs=0.06)


def test_a_batch_that_will_not_fit_is_said(estimate):
    assert "will not fit" not in estimate()
    assert "will not fit" in estimate("--gpu_memory_gib", "0.2", "--per_device_train_batch_size", "512")


def test_without_the_number_of_pairs_there_are_no_hours(estimate):
    assert "hours: give --num_pairs" in estimate()


def test_takes_the_recipes_of_the_retrieval_scripts(estimate):
    """A small model in place of the paper's; a video of 16 frames costs nearly 16 pictures."""
    small = ("--model_config", "examples/configs/quickstart_model.json", "--max_text_length", "3")
    flop = {}
    for recipe in ("flickr30k", "msrvtt"):
        printed = estimate(*small, "--gradient_checkpointing", "false", recipe=recipe)
        flop[recipe] = {
            line[:28].strip(): float(line[28:].split()[0])
            for line in printed.splitlines()
            if line[28:].strip()[:1].isdigit()
        }
    assert flop["msrvtt"]["vision, clean"] == pytest.approx(16 * flop["flickr30k"]["vision, clean"], rel=0.1)
