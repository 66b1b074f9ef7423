"""The record of a run: what its card is written from."""

import json

import pytest

from modeling_cots import COTSModel, COTSTrainingArguments, ScenesDataset
from modeling_cots.training.record import RECORD_NAME, build_record, load_record, save_record


def make(model, tmp_path, eval_dataset, metrics):
    args = COTSTrainingArguments(output_dir=str(tmp_path), learning_rate=0.25, use_cpu=True, bf16=False)
    train_dataset = ScenesDataset("train", 12, 32)
    return build_record(
        model, args, num_steps=7, train_dataset=train_dataset, eval_dataset=eval_dataset, metrics=metrics
    )


def test_a_record_comes_back_as_it_was(tiny_config, tmp_path):
    model = COTSModel(tiny_config)
    record = make(model, tmp_path, ScenesDataset("validation", 4, 32), {"t2i_recall_at_1": 12.5})
    assert record["settings"]["learning_rate"] == 0.25 and record["num_steps"] == 7
    assert record["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["training_data"] == {"name": "scenes", "num_items": 12}
    assert record["evaluation_data"] == {"name": "scenes", "num_items": 4, "num_captions": 20}
    save_record(record, tmp_path / "run")
    assert load_record(tmp_path / "run") == record
    assert str(tmp_path) not in json.dumps(record)


def test_nothing_measured_nothing_recorded(tiny_config, tmp_path):
    record = make(COTSModel(tiny_config), tmp_path, None, None)
    assert record["metrics"] is None and record["evaluation_data"] is None and record["zero_shot_protocol"] is None


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"has no {RECORD_NAME}"):
        load_record(tmp_path)
