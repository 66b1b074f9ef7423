"""Karpathy's JSON form: splits, COCO's `restval`, where images are found, and what is refused."""

import json
import os

import pytest
from karpathy_data import write_karpathy

from modeling_cots.data import karpathy
from modeling_cots.data.karpathy import is_karpathy, karpathy_name, load_karpathy
from modeling_cots.data.opening import open_dataset
from modeling_cots.image_reading_cots import read_image

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


def entry(**changes) -> dict:
    return {"split": "train", "filename": "0.png", "sentences": [{"raw": "a"}]} | changes


@pytest.mark.parametrize(
    "image",
    [
        entry(split=["train"]),
        entry(split=None),
        entry(split=3),
        entry(filename=None),
        entry(filename=["0.png"]),
        entry(filepath=7),
        entry(sentences=None),
        entry(sentences={"raw": "a"}),
        entry(sentences=["a"]),
        None,
        [],
        "image",
    ],
)
def test_entries_of_another_type_are_refused_by_their_number(tmp_path, image):
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": [entry(), image]}))
    with pytest.raises(ValueError, match="is not in Karpathy's form: image 1 is no object with texts"):
        load_karpathy(str(file), "train")


def test_captions_that_are_no_texts_are_left_out_and_named(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(karpathy.logger, "warning", messages.append)
    (tmp_path / "0.png").touch()
    sentences = [{"raw": " a "}, {"raw": None}, {"raw": 5}, {}, {"raw": float("nan")}, {"raw": ["b", 7]}]
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": [entry(sentences=sentences), entry(filename="1.png", sentences=[])]}))
    rows, _ = load_karpathy(str(file), "train")
    assert rows["captions"][:] == [["a"], []]
    assert len(messages) == 1 and "Left out 2 captions" in messages[0] and "5 of 0.png" in messages[0]


def test_an_image_that_is_listed_twice_has_all_captions(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(karpathy.logger, "warning", messages.append)
    (tmp_path / "0.png").touch()
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": [entry(), entry(sentences=[{"raw": "b"}])]}))
    assert [item["captions"] for item in open_dataset(str(file), "train")] == [["a", "b"]]
    file.write_text(json.dumps({"images": [entry(), entry(split="test")]}))
    assert messages == []
    load_karpathy(str(file), "train")
    assert len(messages) == 1 and messages[0].endswith("lists 1 images in two splits: 0.png in train and test.")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"images": ' + b"[" * 100_000, b"\xff\xfe", b""])
def test_files_that_are_no_json_are_refused_in_one_sentence(tmp_path, content):
    file = tmp_path / "dataset_coco.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not in Karpathy's form: [^\n]*$"):
        load_karpathy(str(file), "train")
