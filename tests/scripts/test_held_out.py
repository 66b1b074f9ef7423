"""A data set without a split to measure on: a share of its images is held out, each with all of its captions."""

import json

import pytest
import run_pretraining
import run_retrieval
from karpathy_data import write_karpathy
from scene_files import write_folder, write_jsonl
from script_runs import script_runner

from modeling_cots import ScenesDataset
from modeling_cots.scripts.held_out import hold_out_if_missing
from modeling_cots.scripts.steps import DataArguments, open_split


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    return [ScenesDataset("train", 30, 32)[index] for index in range(30)]


def divide(dataset, seed: int = 0, **options):
    options = DataArguments(str(dataset), **options)
    train = open_split(options, options.train_split, image_size=32, seed=seed)
    return hold_out_if_missing(options, train, image_size=32, seed=seed)


@pytest.mark.parametrize("write", [write_folder, write_jsonl])
def test_a_tenth_of_the_images_is_held_out_with_its_captions(tmp_path, scenes, write, caplog):
    data = write(tmp_path / "data", scenes)
    train, held_out = divide(data)
    assert "3 of its 30 images are held out of training" in caplog.text and "--eval_split none" in caplog.text
    assert len(train) == 27 and len(held_out) == 3
    whole = open_split(DataArguments(str(data)), "train", image_size=32, seed=0)
    captions = {item["name"]: item["captions"] for item in whole}
    assert {item["name"]: item["captions"] for part in (train, held_out) for item in part} == captions
    assert [item["pair_id"] for item in held_out] == [0, 1, 2]
    assert train.name == held_out.name == data.name
    # The same in every run, whatever its seed.
    assert divide(data, seed=7)[1].names() == held_out.names()


def test_what_has_a_validation_split_is_left_alone(tmp_path, scenes):
    train, held_out = divide("scenes")
    assert (len(train), len(held_out)) == (4000, 200)
    karpathy = write_karpathy(tmp_path / "karpathy", ["train"] * 5 + ["val"] * 2)
    assert [len(part) for part in divide(karpathy)] == [5, 2]
    (tmp_path / "both").mkdir()
    for split in ("train", "validation"):
        write_folder(tmp_path / "both" / split, scenes[:4])
    assert [len(part) for part in divide(tmp_path / "both")] == [4, 4]


def test_another_split_that_is_not_there_is_refused_and_none_is_none(tmp_path, scenes):
    data = write_folder(tmp_path / "data", scenes)
    with pytest.raises(ValueError, match="has no split 'test'"):
        divide(data, eval_split="test")
    train, held_out = divide(data, eval_split="none")
    assert len(train) == 30 and held_out is None


def test_nothing_can_be_held_out_of_one_image(tmp_path, scenes):
    with pytest.raises(ValueError, match="Nothing can be held out of 1 image: give more, or --eval_split none"):
        divide(write_folder(tmp_path / "data", scenes[:1]))


@pytest.mark.parametrize("script", [run_pretraining, run_retrieval])
def test_a_plain_folder_trains_and_is_measured(tmp_path, scenes, monkeypatch, script):
    run = script_runner(script, tmp_path, monkeypatch)
    folder = run(write_folder(tmp_path / "data", scenes), **({"cmvm_weight": 0} if script is run_pretraining else {}))
    record = json.loads((folder / "training_record.json").read_text())
    assert record["training_data"]["num_items"] == 27 and record["evaluation_data"]["num_items"] == 3
