"""Karpathy's JSON form: splits, COCO's `restval`, where images are found, and what is refused."""

import json
import os

import pytest
from karpathy_data import write_karpathy

from modeling_cots.data.image_reading import read_image
from modeling_cots.data.karpathy import is_karpathy, karpathy_name, load_karpathy
from modeling_cots.data.opening import open_dataset

COCO_SPLITS = ["train", "restval", "val", "test", "train", "restval", "test"]


def names(rows) -> list[str]:
    return [name.split("/")[-1].removesuffix(".png") for name in paths(rows)]


def paths(rows) -> list[str]:
    return [os.fsdecode(path) for path in rows["path"]]


def test_a_split_is_its_images_each_with_all_captions(tmp_path):
    file = write_karpathy(tmp_path, ["train", "test", "train", "val"])
    rows, root = load_karpathy(str(file), "train")
    assert names(rows) == ["0", "2"] and root == tmp_path / "images"
    written = json.loads(file.read_text())["images"][2]["sentences"]
    assert rows[1]["captions"] == [sentence["raw"].strip() for sentence in written]


@pytest.mark.parametrize(
    "split, expected",
    [
        ("train", ["0", "1", "4", "5"]),
        ("train_only", ["0", "4"]),
        ("restval", ["1", "5"]),
        ("validation", ["2"]),
        ("val", ["2"]),
        ("test", ["3", "6"]),
        ("train[:3]", ["0", "1", "4"]),
        ("train[50%:]", ["4", "5"]),
        ("val+test", ["2", "3", "6"]),
    ],
)
def test_coco_trains_on_restval_too(tmp_path, split, expected):
    write_karpathy(tmp_path, COCO_SPLITS, name="coco")
    rows, root = load_karpathy(str(tmp_path), split)
    assert names(rows) == expected
    assert all((root / name).is_file() for name in paths(rows))


def test_the_file_or_its_folder_is_recognized_and_named(tmp_path):
    file = write_karpathy(tmp_path, ["train"])
    assert is_karpathy(str(file)) and is_karpathy(str(tmp_path)) and not is_karpathy("scenes")
    assert karpathy_name(str(tmp_path)) == karpathy_name(str(file)) == "flickr30k"
    assert open_dataset(str(tmp_path), "train").name == "flickr30k"


def test_images_may_lie_elsewhere(tmp_path):
    file = write_karpathy(tmp_path / "data", ["train", "test"])
    (tmp_path / "data" / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="give image_folder"):
        load_karpathy(str(file), "train")
    opened = open_dataset(str(file), "train", image_folder=str(tmp_path / "elsewhere"))
    assert read_image(opened[0]["image"]).size == (32, 32)
    with pytest.raises(ValueError, match="does not exist"):
        load_karpathy(str(file), "train", str(tmp_path / "nowhere"))


def test_bad_files_and_splits_are_refused(tmp_path):
    file = write_karpathy(tmp_path, ["train", "val"])
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        load_karpathy(str(file), "test")
    with pytest.raises(ValueError, match="is no slice"):
        load_karpathy(str(file), "train[oops]")
    write_karpathy(tmp_path, ["train"], name="coco")
    with pytest.raises(ValueError, match="name the one that you mean"):
        load_karpathy(str(tmp_path), "train")
    for content in ("[]", "{", '{"images": [{"split": "train"}]}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="not in Karpathy's form"):
            load_karpathy(str(file), "train")


def test_image_folder_is_for_this_form_only(tmp_path):
    with pytest.raises(ValueError, match="image_folder is for Karpathy's form"):
        open_dataset(str(tmp_path), "train", image_folder=str(tmp_path))
