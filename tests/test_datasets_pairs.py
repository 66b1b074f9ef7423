"""`open_pairs` on small real files of every form it takes, and on what it must refuse."""

import csv
import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from modeling_cots import pair_files
from modeling_cots.datasets_pairs import open_pairs

NAMES = ["a.png", "b.png", "c.png"]
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
CAPTIONS = [["a one", "a two"], ["b one", "b two"], ["c one", "c two"]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Converted files go to a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 10, 20)).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(shade) for shade in (50, 100, 150)]


def write_images(folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(NAMES, PICTURES, strict=True):
        (folder / name).write_bytes(picture)


def write_jsonl(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def embedded(names=NAMES, pictures=PICTURES) -> list[dict]:
    return [{"bytes": picture, "path": name} for name, picture in zip(names, pictures, strict=True)]


def a_row_an_image(column: str = "image") -> list[dict]:
    return [{column: name, "caption": captions} for name, captions in zip(NAMES, CAPTIONS, strict=True)]


def a_row_a_caption(column: str = "image") -> list[dict]:
    """The rows of one image do not stand together."""
    return [{column: name, "caption": CAPTIONS[i][k]} for k in (0, 1) for i, name in enumerate(NAMES)]


def picture_of(item: dict) -> bytes:
    image = item["image"]
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()


def check_pairs(pairs, captions=CAPTIONS) -> None:
    items = list(pairs)
    assert [item["captions"] for item in items] == captions
    assert [picture_of(item) for item in items] == PICTURES
    assert [item["pair_id"] for item in items] == [0, 1, 2] and len(pairs) == 3
    assert [set(item) for item in items] == [{"image", "captions", "pair_id", "name", "seed"}] * 3
    assert list(pairs.iter_captions()) == [caption for item in items for caption in item["captions"]]


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
    [embedded(), PICTURES, [{"bytes": picture, "path": None} for picture in PICTURES]],
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
@pytest.mark.parametrize("as_glob", [False, True])
def test_parquet_folder_and_glob_are_read_by_split(tmp_path, layout, as_glob):
    root = tmp_path / "testing"  # a split's name above the data set says nothing
    for split in ("train", "validation", "restval"):
        captions = [[f"{split} {name}"] for name in NAMES]
        write_parquet(root / layout.format(split=split), {"image": embedded(), "captions": captions})
    dataset = str(root / "**" / "*.parquet") if as_glob else str(root)
    for split in ("train", "validation", "restval"):
        check_pairs(open_pairs(dataset, split), [[f"{split} {name}"] for name in NAMES])
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        open_pairs(dataset, "test")


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


def test_a_hub_data_set_is_opened_by_its_id(tmp_path, monkeypatch):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    hub = datasets.Dataset.from_dict({"image": embedded(), "caption": CAPTIONS}, features=features)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: {"some/pairs": ["train"]}[name])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("some/pairs", "train"): hub}[name, split])
    check_pairs(open_pairs("some/pairs", "train"))
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        open_pairs("some/pairs", "test")


def shard(numbers, *, as_json: bool) -> dict[str, bytes]:
    members = {}
    for i in numbers:
        members[f"{i:03d}.png"] = PICTURES[i]
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
    write_tar(tmp_path / "any.tar", {"0.webp": PICTURES[0], "0.json": b'{"alt": "a hill", "caption": "no"}'})
    pairs = open_pairs(str(tmp_path / "any.tar"), "train", caption_column="json.alt")
    assert pairs[0]["captions"] == ["a hill"] and pairs[0]["name"] == "0.webp"
    with pytest.raises(ValueError, match="no field for captions; they have alt, caption"):
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
    monkeypatch.setattr(pair_files.logger, "warning", messages.append)
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
    images = [{"bytes": PICTURES[i], "path": NAMES[i] if with_path else None} for i in order]
    columns = {"image": pa.array(images, IMAGE_TYPE), "caption": [f"{row} of {i}" for row, i in enumerate(order)]}
    write_parquet(tmp_path / "any.parquet", columns)
    expected = [["0 of 0", "2 of 0"], ["1 of 1", "4 of 1"], ["3 of 2"]]
    check_pairs(open_pairs(str(tmp_path / "any.parquet"), "train"), expected)


def test_images_of_equal_name_and_length_are_told_apart(tmp_path):
    pictures = [b"x" * 9 + bytes([i]) for i in range(3)]
    columns = {"image": embedded(["same.png"] * 3, pictures), "caption": ["p", "q", "r"]}
    write_parquet(tmp_path / "any.parquet", columns)
    assert [item["captions"] for item in open_pairs(str(tmp_path / "any.parquet"), "train")] == [["p"], ["q"], ["r"]]


def test_grouping_equals_a_slow_twin(tmp_path):
    rng = np.random.default_rng(0)
    order = rng.integers(0, 40, 200)
    pictures = [rng.bytes(30 + i % 3) for i in range(40)]
    captions = [[f"{row}.{k}" for k in range(rng.integers(1, 4))] for row in range(200)]
    write_parquet(tmp_path / "any.parquet", {"image": [pictures[i] for i in order], "caption": captions})
    expected: dict[bytes, list[str]] = {}
    for i, own in zip(order, captions, strict=True):
        expected[pictures[i]] = expected.get(pictures[i], []) + own
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train")
    assert {item["image"]["bytes"]: item["captions"] for item in pairs} == expected
    assert len(pairs) == len(expected)


# What the wild brings


def test_pictures_are_never_decoded(tmp_path):
    pictures = [b"no picture", b"", PICTURES[2][:30]]
    write_parquet(tmp_path / "any.parquet", {"image": embedded(pictures=pictures), "caption": CAPTIONS})
    assert [item["image"]["bytes"] for item in open_pairs(str(tmp_path / "any.parquet"), "train")] == pictures
    write_tar(tmp_path / "any.tar", {"0.jpg": b"no picture", "0.txt": b"one", "1.jpg": b"", "1.txt": b"two"})
    assert [item["image"]["bytes"] for item in open_pairs(str(tmp_path / "any.tar"), "train")] == [b"no picture", b""]


def test_a_missing_file_and_a_missing_image_keep_their_place(tmp_path):
    write_images(tmp_path)
    rows = [{"image": name, "caption": f"of {name}"} for name in ("gone.png", None, "a.png", None, "")]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs = open_pairs(str(tmp_path / "pairs.jsonl"), "train")
    assert [item["name"] for item in pairs] == ["gone.png", "row 1", "a.png", "row 3", "row 4"]
    assert picture_of(pairs[2]) == PICTURES[0]


@pytest.mark.parametrize("captions", [["x", None, "z"], [["x"], [], ["z"]], [["x"], [None], [None, "z"]]])
def test_images_without_a_caption_are_left_out_by_name(tmp_path, monkeypatch, captions):
    messages = []
    monkeypatch.setattr("modeling_cots.datasets_pairs.logger.warning", messages.append)
    write_parquet(tmp_path / "any.parquet", {"image": embedded(), "caption": captions})
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train")
    assert [(item["name"], item["captions"]) for item in pairs] == [("a.png", ["x"]), ("c.png", ["z"])]
    assert messages == ["Left out 1 of 3 images, which have no caption: b.png."]


# What is refused


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write_parquet(tmp_path / "any.parquet", {"photo": embedded(), "words": CAPTIONS})
    dataset = str(tmp_path / "any.parquet")
    with pytest.raises(ValueError, match="no image column 'image'; there are photo, words"):
        open_pairs(dataset, "train", image_column="image", caption_column="words")
    with pytest.raises(ValueError, match="no caption column 'caption'; there are photo, words"):
        open_pairs(dataset, "train", image_column="photo", caption_column="caption")
    with pytest.raises(ValueError, match="Name the image column.* there are photo, words"):
        open_pairs(dataset, "train")
    with pytest.raises(ValueError, match="Name the caption column.* there are photo, words"):
        open_pairs(dataset, "train", image_column="photo")
    check_pairs(open_pairs(dataset, "train", image_column="photo", caption_column="words"))


@pytest.mark.parametrize(
    "captions", [[1, 2, 3], [[1.5], [2.5], [3.5]], [[["x"]], [["y"]], [["z"]]], [b"x", b"y", b"z"]]
)
def test_captions_that_are_no_strings_are_refused(tmp_path, captions):
    write_parquet(tmp_path / "any.parquet", {"image": embedded(), "caption": captions})
    with pytest.raises(ValueError, match="strings or lists of strings; 'caption' holds"):
        open_pairs(str(tmp_path / "any.parquet"), "train")


def test_images_that_are_none_are_refused(tmp_path):
    write_parquet(tmp_path / "any.parquet", {"image": [1, 2, 3], "caption": CAPTIONS})
    with pytest.raises(ValueError, match="'image' holds int64, neither images nor paths"):
        open_pairs(str(tmp_path / "any.parquet"), "train")


@pytest.mark.parametrize("name", ["any.parquet", "any.jsonl", "any.csv", "any.tar"])
def test_empty_data_sets_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(str(tmp_path / name), "train")


def test_a_data_set_without_rows_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": pa.array([], IMAGE_TYPE), "caption": pa.array([], pa.string())})
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(str(tmp_path / "a.parquet"), "train")
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(str(tmp_path / "a.csv"), "train")
    write_parquet(tmp_path / "b.parquet", {"image": embedded(), "caption": pa.array([None] * 3, pa.string())})
    with pytest.raises(ValueError, match="No image .* has a caption"):
        open_pairs(str(tmp_path / "b.parquet"), "train")


@pytest.mark.parametrize("dataset", ["missing.parquet", "./missing", "/nowhere/pairs", "a/b/c", "~/missing", "a b"])
def test_a_path_that_does_not_exist_is_refused(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_pairs(dataset, "train")


def test_no_name_is_refused():
    with pytest.raises(ValueError, match="Name a data set"):
        open_pairs("", "train")


def test_an_empty_shard_among_others_does_no_harm(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"image": embedded(), "captions": CAPTIONS})
    empty = {"image": pa.array([], IMAGE_TYPE), "captions": pa.array([], pa.list_(pa.string()))}
    write_parquet(tmp_path / "train-1.parquet", empty)
    check_pairs(open_pairs(str(tmp_path), "train"))


def test_an_id_that_cannot_be_fetched_is_refused(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(ValueError, match="'some/pairs': this path does not exist, .* cannot be opened: no network"):
        open_pairs("some/pairs", "train")


def test_a_folder_or_glob_without_captions_is_refused(tmp_path):
    write_images(tmp_path)
    with pytest.raises(ValueError, match="has no metadata.jsonl or metadata.csv"):
        open_pairs(str(tmp_path), "train")
    with pytest.raises(ValueError, match="No file matches"):
        open_pairs(str(tmp_path / "*.parquet"), "train")
    with pytest.raises(ValueError, match="files of one kind out of .parquet"):
        open_pairs(str(tmp_path / "*.png"), "train")


@pytest.mark.parametrize("name", ["any.parquet", "any.jsonl", "any.tar"])
def test_damaged_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"{not any of these formats" * 50)
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        open_pairs(str(tmp_path / name), "train")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images/../../secret.png", "a.png/../../x/a.png"])
def test_image_paths_that_leave_the_folder_are_refused(tmp_path, path):
    write_images(tmp_path / "x")
    write_images(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    write_jsonl(tmp_path / "data" / "pairs.jsonl", [{"image": name, "caption": "x"} for name in ("a.png", path)])
    with pytest.raises(ValueError, match="leads out of"):
        open_pairs(str(tmp_path / "data" / "pairs.jsonl"), "train")
    images = pa.array([{"bytes": None, "path": path}], IMAGE_TYPE)
    write_parquet(tmp_path / "data" / "any.parquet", {"image": images, "caption": ["x"]})
    with pytest.raises(ValueError, match="leads out of"):
        open_pairs(str(tmp_path / "data" / "any.parquet"), "train")


def test_a_folder_where_no_image_exists_is_refused(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", a_row_an_image())
    with pytest.raises(ValueError, match="None of the 3 images exists: 'a.png'"):
        open_pairs(str(tmp_path / "pairs.jsonl"), "train")


def test_paths_in_files_of_several_folders_are_refused(tmp_path):
    for part in ("one", "two"):
        write_images(tmp_path / part)
        write_jsonl(tmp_path / part / "part.jsonl", a_row_an_image())
    with pytest.raises(ValueError, match="no one folder that paths could start from"):
        open_pairs(str(tmp_path / "*" / "part.jsonl"), "train")


# As a data set


def first_seed(items: list[dict]) -> int:
    return items[0]["seed"]


def test_seeds_change_with_the_epoch_in_persistent_workers_too(tmp_path):
    write_parquet(tmp_path / "any.parquet", {"image": embedded(), "caption": CAPTIONS})
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train", seed=3)
    loader = DataLoader(pairs, num_workers=1, persistent_workers=True, collate_fn=first_seed)
    seen = set()
    for epoch in range(3):
        pairs.set_epoch(epoch)
        seeds = list(loader)
        assert seeds == [item["seed"] for item in pairs]
        seen.update(seeds)
    assert len(seen) == 9
    other = open_pairs(str(tmp_path / "any.parquet"), "train", seed=4)
    assert other[0]["seed"] not in seen


def test_indices(tmp_path):
    write_parquet(tmp_path / "any.parquet", {"image": embedded(), "caption": CAPTIONS})
    pairs = open_pairs(str(tmp_path / "any.parquet"), "train")
    assert pairs[-1]["captions"] == pairs[np.int64(2)]["captions"] == CAPTIONS[2]
    assert type(pairs[np.int64(2)]["pair_id"]) is int
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"Item {index} of 3"):
            pairs[index]
