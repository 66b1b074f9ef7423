"""The code of docs/pipelines.md and of a card runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

from modeling_cots import COTSModel, COTSTrainingArguments, ScenesDataset
from modeling_cots.hub.model_card import build_model_card
from modeling_cots.hub.widget_examples import publishable_images, record_widget_examples
from modeling_cots.hub_export import export_repository
from modeling_cots.training.record import build_record

DOCS = Path(__file__).parents[1] / "docs/pipelines.md"


@pytest.fixture
def quickstart(tiny_config, tiny_processor, tmp_path, monkeypatch) -> Path:
    """What the quick start leaves behind, tiny and untrained."""
    torch.manual_seed(0)
    folder, model = tmp_path / "runs/quickstart", COTSModel(tiny_config)
    scenes = ScenesDataset("validation", 6, 32)
    args = COTSTrainingArguments(output_dir=str(folder), use_cpu=True, bf16=False)
    data = {"train_dataset": scenes, "eval_dataset": scenes}
    record = build_record(model, args, num_steps=1, metrics=None, **data)
    record["widget"] = record_widget_examples(model, tiny_processor, publishable_images(scenes), folder)
    card = build_model_card(tiny_config, record, model_name="runs/quickstart")
    export_repository(model, tiny_processor, folder, card=card)
    monkeypatch.chdir(tmp_path)
    return folder


def code_of(text: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


def test_the_code_of_the_docs(quickstart, capsys):
    exec(compile(code_of(DOCS.read_text(encoding="utf-8")), "pipelines.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_the_code_of_a_card_runs_as_it_stands_where_its_folder_lies(quickstart, capsys):
    code = code_of((quickstart / "README.md").read_text(encoding="utf-8"))
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "torch.Size([2, 16])" in out and "widget/example-" in out


def test_every_image_of_the_card_is_shipped(quickstart):
    named = re.findall(r"src: (\S+)", (quickstart / "README.md").read_text(encoding="utf-8"))
    assert len(named) == 3 and all((quickstart / name).is_file() for name in named)
