"""Which files are read as a split, and what is said of the others."""

import json
from pathlib import Path

import datasets
import pytest
from pair_writers import (
    CAPTIONS,
    IMAGES,
    NAMES,
    check_pairs,
    embedded,
    write_csv,
    write_images,
    write_jsonl,
    write_parquet,
    write_tar,
)

from modeling_cots.data import files
from modeling_cots.data.files import find_files, holds_dataset, names_videos
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.streaming.dataset import open_stream


@pytest.fixture
def warnings_logged(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(files.logger, "warning", messages.append)
    return messages


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(dataset, split: str, folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in find_files(str(dataset), split)]


@pytest.mark.parametrize(
    "names",
    [
        ["boats.tar", "bullet-train.tar", "cars.tar"],
        ["dev-board.tar", "part1.tar", "part2.tar"],
        ["oslo/a.tar", "rome/b.tar", "val d'isere/c.tar"],
        ["extra.tar", "train-0.tar", "train-1.tar"],
        ["contest.tar", "latest.tar", "strain.tar"],
        ["a.tar", "my test/b.tar"],
    ],
)
@pytest.mark.parametrize("pattern", ["", "**/*.tar"])
def test_a_split_s_word_in_one_name_hides_no_other_file(tmp_path, names, pattern):
    touch(tmp_path, *names)
    assert found(tmp_path / pattern, "train", tmp_path) == names


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train-00000-of-00002.tar", "train-00001-of-00002.tar", "val.tar"], "val", ["val.tar"]),
        (["train2014/a.tar", "val2014/a.tar"], "val", ["val2014/a.tar"]),
        (["flickr-train.tar", "flickr-test.tar"], "train", ["flickr-train.tar"]),
        (["train.tar", "held_out_3.tar"], "held_out", ["held_out_3.tar"]),
        (["test.tar", "more.tar"], "train", ["more.tar"]),
    ],
)
def test_files_of_a_folder_are_read_by_the_split_that_they_are_named_after(tmp_path, names, split, expected):
    assert found(touch(tmp_path, *names), split, tmp_path) == expected


def test_what_is_not_read_is_named(tmp_path, warnings_logged):
    touch(tmp_path, "train.tar", "test.tar", "extra.tar")
    assert found(tmp_path, "train", tmp_path) == ["train.tar"]
    assert (
        len(warnings_logged) == 1
        and "Did not read 1 files" in warnings_logged[0]
        and "extra.tar" in warnings_logged[0]
    )
    warnings_logged.clear()
    touch(tmp_path / "mixed", "a.parquet", "b.tar", "c.csv")
    assert found(tmp_path / "mixed", "train", tmp_path / "mixed") == ["a.parquet"]
    assert "b.tar, c.csv" in warnings_logged[0]
    warnings_logged.clear()
    touch(tmp_path / "loose", "flickr-train.tar", "flickr-test.tar")
    find_files(str(tmp_path / "loose"), "train")
    assert "flickr-test.tar" in warnings_logged[0] and "named after another split than 'train'" in warnings_logged[0]
    with pytest.raises(ValueError, match="has no split 'validation'; it has test, train. .A glob reads all files"):
        find_files(str(tmp_path / "loose"), "validation")


def test_a_glob_reads_all_that_it_matches_and_says_so(tmp_path, warnings_logged):
    touch(tmp_path, "train-0.tar", "test-0.tar", "extra.tar")
    assert found(tmp_path / "*.tar", "train", tmp_path) == ["extra.tar", "test-0.tar", "train-0.tar"]
    assert (
        len(warnings_logged) == 1 and "test-0.tar" in warnings_logged[0] and "Give their folder" in warnings_logged[0]
    )


def test_a_list_in_braces_is_the_split(tmp_path):
    touch(tmp_path, "a-0.tar", "a-1.tar", "test.tar")
    assert found(tmp_path / "a-{0..2}.tar", "train", tmp_path) == ["a-0.tar", "a-1.tar", "a-2.tar"]
    assert found(tmp_path / "{a-*,test}.tar", "train", tmp_path) == ["a-0.tar", "a-1.tar", "test.tar"]
    with pytest.raises(ValueError, match="None of the 2 files"):
        find_files(str(tmp_path / "{x,y}.tar"), "train")


def test_two_metadata_files_of_one_split_are_refused(tmp_path):
    touch(tmp_path, "metadata.jsonl", "metadata.csv")
    with pytest.raises(ValueError, match="metadata.jsonl' and .*metadata.csv' are both metadata of the split 'train'"):
        find_files(str(tmp_path), "train")
    touch(tmp_path / "other", "metadata.jsonl", "train/metadata.csv")
    with pytest.raises(ValueError, match="are both metadata of the split 'train'"):
        find_files(str(tmp_path / "other"), "train")


def test_hidden_files_and_those_of_an_index_are_no_data(tmp_path):
    touch(
        tmp_path, "a.tar", ".cache/log.tar", ".b.tar", "index/state.json", "index/dataset_info.json", "index/x.parquet"
    )
    assert found(tmp_path, "train", tmp_path) == ["a.tar"]


def test_linked_folders_are_read_and_named(tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr("modeling_cots.data.paths.logger.warning", messages.append)
    touch(tmp_path / "disk", "a.tar")
    touch(tmp_path / "data", "b.tar")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert found(tmp_path / "data", "train", tmp_path / "data") == ["b.tar", "more/a.tar"]
    assert len(messages) == 1 and f"more to {tmp_path / 'disk'}" in messages[0]


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("---\nconfigs: [\n---\n", "README.md cannot be read"),
        ("---\nconfigs: !!python/object:os.system x\n---\n", "README.md cannot be read"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(tmp_path, card, message):
    touch(tmp_path, "a.tar")
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        find_files(str(tmp_path), "train")


def test_a_folder_of_save_to_disk_is_refused_with_what_to_do(tmp_path):
    datasets.Dataset.from_dict({"image": embedded(), "caption": CAPTIONS}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="was written by `save_to_disk`: write it as parquet"):
        find_files(str(tmp_path / "saved"), "train")


# img2dataset


def write_img2dataset(folder: Path, kind: str) -> Path:
    """Its output: shards or folders of samples, each beside a table of metadata and a file of statistics."""
    rows = [{"key": f"{i:09d}", "caption": CAPTIONS[i][0], "status": "success", "url": "x"} for i in range(3)]
    folder.mkdir()
    if kind == "webdataset":
        write_tar(
            folder / "00000.tar",
            {
                f"{i:09d}.{suffix}": content
                for i, row in enumerate(rows)
                for suffix, content in (
                    ("png", IMAGES[i]),
                    ("txt", row["caption"].encode()),
                    ("json", json.dumps(row).encode()),
                )
            },
        )
    elif kind == "files":
        for i, row in enumerate(rows):
            touch(folder, f"00000/{i:09d}.png")
            (folder / "00000" / f"{i:09d}.png").write_bytes(IMAGES[i])
            (folder / "00000" / f"{i:09d}.txt").write_text(row["caption"])
            (folder / "00000" / f"{i:09d}.json").write_text(json.dumps(row))
    names = ("key", "caption", "status", "url")
    columns = {name: [row[name] for row in rows] for name in names} | ({"jpg": IMAGES} if kind == "parquet" else {})
    write_parquet(folder / "00000.parquet", columns)
    (folder / "00000_stats.json").write_text('{"count": 3}')
    return folder


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
def test_the_output_folder_of_img2dataset_opens_as_it_is(tmp_path, kind, warnings_logged):
    folder = write_img2dataset(tmp_path / "web", kind)
    expected = [captions[:1] for captions in CAPTIONS]
    check_pairs(open_pairs(str(folder), "train"), expected)
    streamed = list(open_stream(str(folder), "train", shuffle_buffer=0))
    assert [item["captions"] for item in streamed] == expected
    assert [item["image"]["bytes"] for item in streamed] == IMAGES
    assert warnings_logged == [] and holds_dataset(folder)


# Photos beside other files


def stray_table(folder: Path) -> None:
    write_csv(folder / "expenses.csv", [{"date": "2020", "amount": 5}])


def stray_table_that_names_an_image(folder: Path) -> None:
    write_jsonl(folder / "pairs.jsonl", [{"image": NAMES[0], "caption": "a"}])


def stray_archive_of_pairs(folder: Path) -> None:
    write_tar(folder / "backup.tar", {"0.png": IMAGES[0], "0.txt": b"a"})


def stray_notes_beside_an_image(folder: Path) -> None:
    (folder / "a.txt").write_text("from Oslo")
    (folder / "b.json").write_text("{}")


def stray_metadata(folder: Path) -> None:
    write_csv(folder / "metadata.csv", [{"date": "2020", "amount": 5}])


def stray_metadata_of_files_that_are_gone(folder: Path) -> None:
    write_jsonl(folder / "metadata.jsonl", [{"file_name": "gone.png", "text": "a"}])


def metadata_in_a_folder_of_one_year(folder: Path) -> None:
    write_images(folder / "2020")
    write_csv(folder / "2020" / "metadata.csv", [{"file_name": NAMES[0], "text": "a"}])


def metadata_of_a_split_that_holds_a_part(folder: Path) -> None:
    write_images(folder / "test")
    write_csv(folder / "test" / "metadata.csv", [{"file_name": NAMES[0], "text": "a"}])


def two_metadata_files(folder: Path) -> None:
    stray_metadata(folder)
    write_csv(folder / "train" / "metadata.csv", [{"a": 1}])


def a_readme_that_is_no_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\nphotos: [of: Oslo\n---\n")


def broken_data(folder: Path) -> None:
    (folder / "old.tar").write_bytes(bytes(10_240))
    (folder / "notes.json").write_text("[" * 100_000)
    touch(folder, ".cache/log.jsonl", "broken.parquet", "metadata.parquet")


STRAY = [
    stray_table,
    stray_table_that_names_an_image,
    stray_archive_of_pairs,
    stray_notes_beside_an_image,
    stray_metadata,
    stray_metadata_of_files_that_are_gone,
    metadata_in_a_folder_of_one_year,
    metadata_of_a_split_that_holds_a_part,
    two_metadata_files,
    a_readme_that_is_no_card,
    broken_data,
]


@pytest.mark.parametrize("put", STRAY, ids=lambda put: put.__name__)
@pytest.mark.parametrize("media", ["images", "videos"])
def test_stray_files_beside_images_and_videos_make_no_data_set(tmp_path, put, media):
    if media == "images":
        write_images(tmp_path)
    else:
        touch(tmp_path, "x.mp4", "y.MOV")
    assert not holds_dataset(tmp_path)
    put(tmp_path)
    assert not holds_dataset(tmp_path)


def test_what_a_folder_declares_is_a_data_set(tmp_path):
    rows = [{"file_name": name, "text": "a"} for name in NAMES]
    for folder in ("own", "splits/train", "splits/test"):
        write_images(tmp_path / folder)
        write_jsonl(tmp_path / folder / "metadata.jsonl", rows)
    assert holds_dataset(tmp_path / "own") and holds_dataset(tmp_path / "splits")
    write_images(tmp_path / "years" / "2020")
    write_jsonl(tmp_path / "years" / "2020" / "metadata.jsonl", rows)
    assert holds_dataset(tmp_path / "years", "2020[:5]") and not holds_dataset(tmp_path / "years")
    write_images(tmp_path / "captions")
    touch(tmp_path / "captions", "a.txt", "b.txt", "c.txt")
    assert holds_dataset(tmp_path / "captions")
    for name in ("own", "splits", "captions"):  # what is put beside it changes nothing
        stray_table(tmp_path / name)
        stray_archive_of_pairs(tmp_path / name)
        assert holds_dataset(tmp_path / name)
    write_images(tmp_path / "card")
    (tmp_path / "card" / "README.md").write_text("---\nconfigs: []\n---\n")
    assert holds_dataset(tmp_path / "card")


def test_metadata_that_names_videos(tmp_path):
    touch(tmp_path, "own/x.mp4", "splits/train/x.mp4", "splits/test/x.mp4")
    write_jsonl(tmp_path / "own" / "metadata.jsonl", [{"video": "gone.mp4"}, {"video": "x.mp4"}])
    write_csv(tmp_path / "splits" / "test" / "metadata.csv", [{"file_name": "x.mp4", "text": "a"}])
    assert holds_dataset(tmp_path / "own") and names_videos(str(tmp_path / "own"), "train")
    assert names_videos(str(tmp_path / "own" / "metadata.jsonl"), "train")
    assert names_videos(str(tmp_path / "splits"), "test[:3]") and not names_videos(str(tmp_path / "splits"), "train")
    write_images(tmp_path / "images")
    write_jsonl(tmp_path / "images" / "metadata.jsonl", [{"file_name": NAMES[0], "text": "a"}])
    assert not names_videos(str(tmp_path / "images"), "train") and not names_videos("user/data", "train")


def test_a_folder_without_images_is_a_data_set_if_it_has_data(tmp_path):
    assert not holds_dataset(tmp_path)
    touch(tmp_path, "a.tar")
    assert holds_dataset(tmp_path)
