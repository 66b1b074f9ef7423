"""What `open_pairs` refuses, and how its data set behaves."""

import numpy as np
import pyarrow as pa
import pytest
from pair_writers import (
    CAPTIONS,
    IMAGE_TYPE,
    IMAGES,
    NAMES,
    a_row_an_image,
    check_pairs,
    embedded,
    write_images,
    write_jsonl,
    write_parquet,
)
from torch.utils.data import DataLoader

from modeling_cots.data import files
from modeling_cots.data.pairs import open_pairs
from modeling_cots.image_reading_cots import UnreadableImageError, read_image

# What is refused


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    write_parquet(tmp_path / "any.parquet", {"photo": embedded(), "words": CAPTIONS})
    dataset = str(tmp_path / "any.parquet")
    with pytest.raises(ValueError, match="no image in one of image, file_name; there is photo, words"):
        open_pairs(dataset, "train", image_column="image", caption_column="words")
    with pytest.raises(ValueError, match="has a caption in caption; name the column .*: there are photo, words"):
        open_pairs(dataset, "train", image_column="photo", caption_column="caption")
    with pytest.raises(ValueError, match="no image in one of image, file_name, jpg, .*; there is photo, words"):
        open_pairs(dataset, "train")
    with pytest.raises(ValueError, match="has a caption in caption or captions or .*: there are photo, words"):
        open_pairs(dataset, "train", image_column="photo")
    check_pairs(open_pairs(dataset, "train", image_column="photo", caption_column="words"))


@pytest.mark.parametrize("captions", [[1, 2, 3], [[1.5], [2.5], [3.5]], [[["x"]], [["y"]], [["z"]]]])
def test_captions_that_are_no_strings_are_refused(tmp_path, captions):
    write_parquet(tmp_path / "any.parquet", {"image": embedded(), "caption": captions})
    with pytest.raises(ValueError, match="any.parquet/0: its captions in 'caption' hold .*, which is no text"):
        open_pairs(str(tmp_path / "any.parquet"), "train")


def test_images_that_are_none_are_refused(tmp_path):
    write_parquet(tmp_path / "any.parquet", {"image": [1, 2, 3], "caption": CAPTIONS})
    with pytest.raises(ValueError, match="any.parquet/0: its image column 'image' holds 1, neither an image"):
        open_pairs(str(tmp_path / "any.parquet"), "train")


@pytest.mark.parametrize("name", ["any.parquet", "any.jsonl", "any.csv", "any.tar"])
def test_empty_data_sets_are_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"is empty|{name}: it cannot be read"):
        open_pairs(str(tmp_path / name), "train")


def test_a_data_set_without_rows_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"image": pa.array([], IMAGE_TYPE), "caption": pa.array([], pa.string())})
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(str(tmp_path / "a.parquet"), "train")
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(str(tmp_path / "a.csv"), "train")
    write_parquet(tmp_path / "b.parquet", {"image": embedded(), "caption": pa.array([None] * 3, pa.string())})
    with pytest.raises(ValueError, match="No image .* has a caption in"):
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


def test_an_id_that_cannot_be_fetched_is_refused():
    with pytest.raises(ValueError, match="'some/pairs': this path does not exist, .* cannot be opened: .* the Hub"):
        open_pairs("some/pairs", "train")


def test_a_folder_or_glob_without_captions_is_refused(tmp_path):
    write_images(tmp_path)
    with pytest.raises(ValueError, match="has no metadata.jsonl, metadata.csv or metadata.parquet"):
        open_pairs(str(tmp_path), "train")
    with pytest.raises(ValueError, match="No file matches"):
        open_pairs(str(tmp_path / "*.parquet"), "train")
    with pytest.raises(ValueError, match="files that end in .parquet, .*; got .*a.png"):
        open_pairs(str(tmp_path / "*.png"), "train")


@pytest.mark.parametrize("name", ["any.parquet", "any.jsonl", "any.tar"])
def test_damaged_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"{not any of these formats" * 50)
    with pytest.raises(ValueError, match=rf"{name}(/0)?: (it cannot be read|its line is no JSON)"):
        open_pairs(str(tmp_path / name), "train")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "images/../../secret.png", "a.png/../../x/a.png"])
def test_image_paths_that_leave_the_folder_are_refused(tmp_path, path):
    write_images(tmp_path / "x")
    write_images(tmp_path / "data")
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
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
    with pytest.raises(ValueError, match="no one folder that their paths could start from"):
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


# Links


def test_links_out_of_the_folder_are_refused_one_by_one_and_never_read(tmp_path):
    write_images(tmp_path / "elsewhere")
    write_images(tmp_path / "data")
    (tmp_path / "data" / "b.png").unlink()
    (tmp_path / "data" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "inside.png").symlink_to("a.png")
    (tmp_path / "data" / "sub").symlink_to(tmp_path / "elsewhere")
    rows = [{"image": name, "caption": name} for name in ("a.png", "b.png", "sub/c.png", "inside.png")]
    write_jsonl(tmp_path / "data" / "pairs.jsonl", rows)
    images = [item["image"] for item in open_pairs(str(tmp_path / "data" / "pairs.jsonl"), "train")]
    assert [image["path"] is None for image in images] == [False, True, False, False]
    with pytest.raises(UnreadableImageError, match="is a link that leads out of"):
        read_image(images[1])
    for image in images[2:]:
        read_image(image)


def test_the_links_of_the_hub_s_own_cache_are_read(tmp_path):
    repository = tmp_path / "datasets--a--b"
    write_images(repository / "blobs")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in NAMES:
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    rows = [{"file_name": name, "caption": name[0]} for name in NAMES]
    write_jsonl(repository / "blobs" / "metadata", rows)
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/metadata")
    check_pairs(open_pairs(str(snapshot), "train"), [["a"], ["b"], ["c"]])


def test_data_files_of_a_folder_that_are_links_out_of_it_are_refused_by_name(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(files.logger, "warning", messages.append)
    write_parquet(tmp_path / "secret.parquet", {"image": embedded(), "caption": ["s", "s", "s"]})
    write_parquet(tmp_path / "data" / "a.parquet", {"image": embedded(), "caption": CAPTIONS})
    (tmp_path / "data" / "b.parquet").symlink_to(tmp_path / "secret.parquet")
    check_pairs(open_pairs(str(tmp_path / "data"), "train"))
    assert len(messages) == 1 and "b.parquet" in messages[0] and "links that lead out of it" in messages[0]
    check_pairs(open_pairs(str(tmp_path / "data" / "b.parquet"), "train"), [["s"]] * 3)  # what is named is meant
