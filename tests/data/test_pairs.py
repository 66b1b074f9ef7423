"""`open_pairs` on small real files of every form it takes."""

import json
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pair_writers import (
    CAPTIONS,
    IMAGE_TYPE,
    IMAGES,
    NAMES,
    a_row_a_caption,
    a_row_an_image,
    check_pairs,
    embedded,
    image_of,
    write_csv,
    write_images,
    write_jsonl,
    write_parquet,
    write_tar,
)

from modeling_cots.data import files
from modeling_cots.data.pairs import open_pairs


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_folder_of_images_with_metadata(tmp_path, write):
    write_images(tmp_path)
    write(tmp_path / f"metadata.{write.__name__[6:]}", a_row_a_caption("file_name"))
    pairs = open_pairs(str(tmp_path), "train", image_column="image", caption_column="caption")
    check_pairs(pairs)
    assert [item["name"] for item in pairs] == NAMES
    with pytest.raises(ValueError, match="has no split 'validation'; it has train"):
        open_pairs(str(tmp_path), "validation")


def test_folder_of_images_with_a_sub_folder_a_split(tmp_path):
    for split in ("train", "held_out"):
        write_images(tmp_path / split)
        rows = [{"file_name": name, "text": f"{split} {name}"} for name in NAMES]
        write_jsonl(tmp_path / split / "metadata.jsonl", rows)
    check_pairs(open_pairs(str(tmp_path), "held_out"), [[f"held_out {name}"] for name in NAMES])
    with pytest.raises(ValueError, match="has no split 'test'; it has held_out, train"):
        open_pairs(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [(suffix, rows) for suffix in ("jsonl", "json") for rows in (a_row_an_image, a_row_a_caption)]
    + [("csv", a_row_a_caption)],  # a cell holds no list
)
def test_text_files_with_paths_relative_to_them(tmp_path, suffix, rows):
    write_images(tmp_path)
    file = tmp_path / f"pairs.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows()))
    else:
        (write_csv if suffix == "csv" else write_jsonl)(file, rows())
    check_pairs(open_pairs(str(file), "train"))


def test_a_csv_caption_may_be_a_word_that_means_missing_elsewhere(tmp_path):
    write_images(tmp_path)
    words = ["null", "NA", ""]
    write_csv(tmp_path / "pairs.csv", [{"image": n, "caption": w} for n, w in zip(NAMES, words, strict=True)])
    assert [item["captions"] for item in open_pairs(str(tmp_path / "pairs.csv"), "train")] == [["null"], ["NA"], [""]]


def test_text_files_of_a_folder_are_chosen_by_split(tmp_path):
    write_images(tmp_path / "images")
    for split in ("train", "val"):
        rows = [{"image": f"images/{name}", "caption": f"{split} {name}"} for name in NAMES]
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    check_pairs(open_pairs(str(tmp_path), "val"), [[f"val {name}"] for name in NAMES])


@pytest.mark.parametrize(
    "images",
    [embedded(), IMAGES, [{"bytes": image, "path": None} for image in IMAGES]],
    ids=["struct", "bytes", "struct without path"],
)
def test_parquet_with_embedded_images(tmp_path, images):
    write_parquet(tmp_path / "any.parquet", {"image": images, "captions": CAPTIONS})
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train")
    check_pairs(pairs)
    assert pairs[1]["name"] == ("b.png" if images == embedded() else "row 1")


def test_parquet_written_by_datasets(tmp_path):
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    rows = {"photo": embedded(), "text": [captions[0] for captions in CAPTIONS]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "any.parquet")
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train", image_column="photo")
    check_pairs(pairs, [captions[:1] for captions in CAPTIONS])


def test_parquet_with_paths_in_place_of_bytes(tmp_path):
    write_images(tmp_path)
    images = [{"bytes": None, "path": name} for name in NAMES]
    write_parquet(tmp_path / "any.parquet", {"image": pa.array(images, IMAGE_TYPE), "captions": CAPTIONS})
    check_pairs(open_pairs(str(tmp_path / "any.parquet"), "train"))


@pytest.mark.parametrize("layout", ["{split}.parquet", "data/{split}-00000-of-00001.parquet", "{split}/0000.parquet"])
def test_a_folder_of_parquet_is_read_by_split(tmp_path, layout):
    root = tmp_path / "testing"  # a split's name above the data set says nothing
    for split in ("train", "validation", "restval"):
        captions = [[f"{split} {name}"] for name in NAMES]
        write_parquet(root / layout.format(split=split), {"image": embedded(), "captions": captions})
    for split in ("train", "validation", "restval"):
        check_pairs(open_pairs(str(root), split), [[f"{split} {name}"] for name in NAMES])
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        open_pairs(str(root), "test")


def test_a_repository_with_a_card_is_read_as_the_card_says(tmp_path):
    write_parquet(tmp_path / "x" / "first.parquet", {"image": embedded(), "captions": CAPTIONS})
    write_parquet(tmp_path / "y" / "second.parquet", {"image": embedded(), "captions": CAPTIONS[::-1]})
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/*\n"
        "  - split: odd\n    path: y/*\n---\n"
    )
    check_pairs(open_pairs(str(tmp_path), "odd"), CAPTIONS[::-1])
    with pytest.raises(ValueError, match="has no split 'validation'; it has odd, train"):
        open_pairs(str(tmp_path), "validation")


def shard(numbers, *, as_json: bool) -> dict[str, bytes]:
    members = {}
    for i in numbers:
        members[f"{i:03d}.png"] = IMAGES[i]
        if as_json:
            members[f"{i:03d}.json"] = json.dumps({"caption": CAPTIONS[i], "width": 4}).encode()
        else:
            members[f"{i:03d}.txt"] = " ".join(CAPTIONS[i]).encode()
    return members


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("dataset", ["", "*.tar"])
def test_webdataset_shards(tmp_path, as_json, dataset):
    write_tar(tmp_path / "00000.tar", shard([0, 1], as_json=as_json))
    write_tar(tmp_path / "00001.tar", shard([2], as_json=as_json))
    captions = CAPTIONS if as_json else [[" ".join(two)] for two in CAPTIONS]
    check_pairs(open_pairs(str(tmp_path / dataset), "train"), captions)


def test_a_single_webdataset_shard_and_a_named_field(tmp_path):
    write_tar(tmp_path / "any.tar", {"0.webp": IMAGES[0], "0.json": b'{"alt": "a hill", "caption": "no"}'})
    pairs = open_pairs(str(tmp_path / "any.tar"), "train", caption_column="json.alt")
    assert pairs[0]["captions"] == ["a hill"] and pairs[0]["name"] == "0.webp"
    with pytest.raises(ValueError, match="has a caption in json.title; .*: there are webp, json"):
        open_pairs(str(tmp_path / "any.tar"), "train", caption_column="json.title")


def test_split_slices(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"image": embedded(), "captions": CAPTIONS})
    assert [item["captions"] for item in open_pairs(str(tmp_path), "train[1:]")] == CAPTIONS[1:]


def test_names_with_glob_characters(tmp_path):
    folder = tmp_path / "run [1] *"
    write_parquet(folder / "train.parquet", {"image": embedded(), "captions": CAPTIONS})
    check_pairs(open_pairs(str(folder), "train"))
    check_pairs(open_pairs(str(folder / "train.parquet"), "train"))


def test_a_file_that_names_another_split_is_read_with_a_warning(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(files.logger, "warning", messages.append)
    write_parquet(tmp_path / "train.parquet", {"image": embedded(), "captions": CAPTIONS})
    shutil.copy(tmp_path / "train.parquet", tmp_path / "test.parquet")
    for name, split, num_messages in [("train", "train", 0), ("test", "test", 0), ("train", "validation", 1)]:
        messages.clear()
        check_pairs(open_pairs(str(tmp_path / f"{name}.parquet"), split))
        assert len(messages) == num_messages
    assert "all of it is read as 'validation'" in messages[0]


# Grouping


def test_rows_of_one_image_become_one_item_by_path(tmp_path):
    write_images(tmp_path)
    rows = [("a.png", "1"), ("b.png", "2"), ("./a.png", "3"), (str(tmp_path / "a.png"), "4"), ("c.png", "5")]
    write_jsonl(tmp_path / "pairs.jsonl", [{"image": path, "caption": f"x {text}"} for path, text in rows])
    check_pairs(open_pairs(str(tmp_path / "pairs.jsonl"), "train"), [["x 1", "x 3", "x 4"], ["x 2"], ["x 5"]])


@pytest.mark.parametrize("with_path", [False, True])
def test_rows_of_one_image_become_one_item_by_its_bytes(tmp_path, with_path):
    order = [0, 1, 0, 2, 1]
    images = [{"bytes": IMAGES[i], "path": NAMES[i] if with_path else None} for i in order]
    columns = {"image": pa.array(images, IMAGE_TYPE), "caption": [f"{row} of {i}" for row, i in enumerate(order)]}
    write_parquet(tmp_path / "any.parquet", columns)
    expected = [["0 of 0", "2 of 0"], ["1 of 1", "4 of 1"], ["3 of 2"]]
    check_pairs(open_pairs(str(tmp_path / "any.parquet"), "train"), expected)


def test_images_of_equal_name_and_length_are_told_apart(tmp_path):
    images = [b"x" * 9 + bytes([i]) for i in range(3)]
    columns = {"image": embedded(["same.png"] * 3, images), "caption": ["p", "q", "r"]}
    write_parquet(tmp_path / "any.parquet", columns)
    assert [item["captions"] for item in open_pairs(str(tmp_path / "any.parquet"), "train")] == [["p"], ["q"], ["r"]]


def test_grouping_equals_a_slow_twin(tmp_path):
    rng = np.random.default_rng(0)
    order = rng.integers(0, 40, 200)
    images = [rng.bytes(30 + i % 3) for i in range(40)]
    captions = [[f"{row}.{k}" for k in range(rng.integers(1, 4))] for row in range(200)]
    write_parquet(tmp_path / "any.parquet", {"image": [images[i] for i in order], "caption": captions})
    expected: dict[bytes, list[str]] = {}
    for i, own in zip(order, captions, strict=True):
        expected[images[i]] = expected.get(images[i], []) + own
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train")
    assert {item["image"]["bytes"]: item["captions"] for item in pairs} == expected
    assert len(pairs) == len(expected)


# What the wild brings


def test_images_are_never_decoded(tmp_path):
    images = [b"no image", b"", IMAGES[2][:30]]
    write_parquet(tmp_path / "any.parquet", {"image": embedded(images=images), "caption": CAPTIONS})
    assert [item["image"]["bytes"] for item in open_pairs(str(tmp_path / "any.parquet"), "train")] == images
    write_tar(tmp_path / "any.tar", {"0.jpg": b"no image", "0.txt": b"one", "1.jpg": b"", "1.txt": b"two"})
    assert [item["image"]["bytes"] for item in open_pairs(str(tmp_path / "any.tar"), "train")] == [b"no image", b""]


def test_a_missing_file_keeps_its_place_and_a_row_without_image_is_left_out(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr("modeling_cots.data.tables.logger.warning", messages.append)
    write_images(tmp_path)
    rows = [{"image": name, "caption": f"of {name}"} for name in ("gone.png", None, "a.png", None, "")]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs = open_pairs(str(tmp_path / "pairs.jsonl"), "train")
    assert [item["name"] for item in pairs] == ["gone.png", "a.png"]
    assert image_of(pairs[1]) == IMAGES[0]
    assert len(messages) == 1 and messages[0].startswith("3 of 5 rows of ")
    assert "it has no image in 'image': pairs.jsonl/1, pairs.jsonl/3, pairs.jsonl/4." in messages[0]


@pytest.mark.parametrize("captions", [["x", None, "z"], [["x"], [], ["z"]], [["x"], [None], [None, "z"]]])
def test_images_without_a_caption_are_left_out_by_name(tmp_path, monkeypatch, captions):
    messages = []
    monkeypatch.setattr("modeling_cots.data.columns.logger.warning", messages.append)
    write_parquet(tmp_path / "any.parquet", {"image": embedded(), "caption": captions})
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train")
    assert [(item["name"], item["captions"]) for item in pairs] == [("a.png", ["x"]), ("c.png", ["z"])]
    assert messages == ["Left out 1 of 3 images, which have no caption: b.png."]
