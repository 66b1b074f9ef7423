"""The constants of the method page are those of the recipes, and each of its rows says where it comes from."""

import re
from pathlib import Path

import pytest
import yaml

from modeling_cots import COTSConfig, COTSTrainingArguments

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| ([^|`]+) \| ([^|]+) \| `", PAGE, flags=re.MULTILINE))


def recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / "examples" / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", ROWS)
def test_every_row_has_its_mark(part):
    assert re.search(r"\b[SPD]\b.*\)$", part), part


def test_the_constants_are_those_of_the_recipes(tmp_path):
    args = COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    page = "\n".join(ROWS.values())
    pretraining, videos = recipe("pretrain_5m"), recipe("msrvtt")
    assert f"τ = {videos['temperature']}" in page and COTSConfig().temperature == videos["temperature"]
    assert f"m = {pretraining['momentum']}" in page and videos["momentum"] == pretraining["momentum"]
    assert f"N_Q = {videos['queue_size']:,} (fine-tuning S), {pretraining['queue_size']:,} (pre-training P)" in page
    assert f"k = {pretraining['filter_num_std']:g}" in page and args.filter_num_std == pretraining["filter_num_std"]
    assert f"d = {COTSConfig().projection_dim}" in page
    assert len(ROWS) == PAGE.count("\n| ") - 1  # all but the header
