"""The door: no path of a data set leads to a file outside its folder, whatever form the data have."""

import os

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_writers import IMAGE_TYPE, IMAGES, write_images, write_jsonl, write_parquet

from modeling_cots.data import paths
from modeling_cots.data.image_token_writing import encoded_image
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.paths import RefusedPathError, is_inside, open_door, walk_visible
from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.data.videos import open_videos
from modeling_cots.image_reading_cots import UnreadableImageError, read_image


@pytest.fixture
def folder(tmp_path):
    """A data folder beside a secret one."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("PRIVATE KEY")
    (tmp_path / "secret" / "a.png").write_bytes(IMAGES[0])
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "b.png").write_bytes(IMAGES[1])
    return tmp_path / "data"


@pytest.mark.parametrize(
    "path", ["../secret/key", "sub/../../secret/key", "/etc/passwd", "", ".", "a\0b", "sub/../..", "../data2/x"]
)
def test_paths_that_leave_their_folder_are_refused(folder, path):
    with pytest.raises(RefusedPathError):
        open_door(path, folder)


def test_no_folder_gives_no_file(folder):
    with pytest.raises(RefusedPathError, match="no one folder"):
        open_door(str(folder / "sub" / "b.png"), None)


def test_a_linked_file_is_refused_where_it_leads_out_and_a_linked_folder_is_followed(folder, monkeypatch):
    (folder / "key.png").symlink_to("../secret/key")
    (folder / "in.png").symlink_to("sub/b.png")
    (folder / "disk").symlink_to("../secret")
    with pytest.raises(RefusedPathError, match="is a link that leads out"):
        open_door("key.png", folder)
    assert open_door("in.png", folder) == str(folder / "in.png")
    assert open_door("disk/a.png", folder) == str(folder / "disk" / "a.png")
    messages: list[str] = []
    monkeypatch.setattr(paths.logger, "warning", messages.append)
    paths.report_linked_folders([str(folder / "disk" / "a.png"), str(folder / "sub" / "b.png")], folder)
    assert len(messages) == 1 and f"{folder / 'disk'} to {folder.parent / 'secret'}" in messages[0]


def test_what_is_no_plain_file_is_refused(folder):
    os.mkfifo(folder / "pipe.png")
    for path in ("pipe.png", "sub"):
        with pytest.raises(RefusedPathError, match="no plain file"):
            open_door(path, folder)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(["..", ".", "sub", "disk", "key.png", "secret", "", "\0", "a.png"]), max_size=6))
def test_whatever_the_path_the_file_is_inside_or_in_a_linked_folder(folder, parts):
    if not (folder / "disk").exists():
        (folder / "disk").symlink_to("../secret")
        (folder / "key.png").symlink_to("../secret/key")
    try:
        file = open_door("/".join(parts), folder)
    except RefusedPathError:
        return
    assert file.startswith(f"{folder}/") and ".." not in file.split("/")
    assert not os.path.exists(file) or is_inside(file, folder) or file.startswith(f"{folder}/disk/")


def test_a_circle_of_links_comes_to_an_end(folder):
    (folder / "sub" / "up").symlink_to(folder)
    assert [place for place, _ in walk_visible(folder)] == [str(folder), str(folder / "sub")]


# Every way in


def attack(path: str) -> pa.Array:
    return pa.array([{"bytes": None, "path": path}], IMAGE_TYPE)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret/key"])
def test_parquet_files_in_several_folders_give_no_file_of_the_machine(folder, path, monkeypatch):
    for part in "ab":
        write_parquet(folder / part / "train.parquet", {"image": attack(path), "caption": ["x"]})
    with pytest.raises(ValueError, match="no one folder"):
        open_pairs(str(folder), "train")
    messages: list[str] = []
    monkeypatch.setattr("modeling_cots.data.pairs.logger.warning", messages.append)
    write_parquet(folder / "c" / "train.parquet", {"image": [{"bytes": IMAGES[2], "path": path}], "caption": ["y"]})
    (item,) = open_pairs(str(folder), "train")
    assert encoded_image(item["image"]) == IMAGES[2] and "Left out 2 of 3 rows, which only name a file" in messages[0]
    (streamed,) = open_stream(str(folder), "train", shuffle_buffer=0)
    assert streamed["image"]["bytes"] == IMAGES[2]


def test_a_repository_gives_no_file_outside(folder):
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: '*.parquet'\n---\n")
    write_parquet(folder / "a.parquet", {"image": attack("../secret/a.png"), "caption": ["x"]})
    with pytest.raises(ValueError, match="leads out of"):
        open_pairs(str(folder), "train")
    with pytest.raises(ValueError, match="None of the 1 shards gives a pair.*leads out of"):
        open_stream(str(folder), "train")


def test_a_folder_of_samples_gives_no_file_outside(folder):
    for name, link in (("1.png", "../../secret/a.png"), ("2.png", "b.png")):
        (folder / "sub" / name).symlink_to(link)
        (folder / "sub" / name).with_suffix(".txt").write_text("x")
    items = list(open_pairs(str(folder), "train"))
    assert [item["image"]["bytes"] for item in items] == [IMAGES[1]]
    assert len(list(open_stream(str(folder), "train"))) == 1


def test_links_out_and_bytes_of_what_is_no_image_are_not_copied(folder):
    (folder / "disk").symlink_to("../secret")
    (folder / "key.png").symlink_to("../secret/key")
    rows = [{"image": name, "caption": name} for name in ("sub/b.png", "disk/key", "key.png")]
    write_jsonl(folder / "pairs.jsonl", rows)
    assert [encoded_image(item["image"]) for item in open_pairs(str(folder / "pairs.jsonl"), "train")] == [
        IMAGES[1],
        b"",
        b"",
    ]
    assert [item["captions"] for item in open_stream(str(folder / "pairs.jsonl"), "train", shuffle_buffer=0)][0] == [
        "sub/b.png"
    ]


def test_videos_go_through_the_same_door(folder):
    (folder.parent / "secret" / "v.mp4").touch()
    (folder / "in.mp4").touch()
    (folder / "out.mp4").symlink_to("../secret/v.mp4")
    write_jsonl(folder / "metadata.jsonl", [{"file_name": name, "caption": "x"} for name in ("in.mp4", "out.mp4")])
    items = list(open_videos(str(folder), "train"))
    assert [item["video"] for item in items] == [str(folder / "in.mp4"), None]
    assert "is a link that leads out" in items[1]["refused"]
    for path in ("../secret/v.mp4", "../../secret/v", "/etc/passwd"):
        write_jsonl(folder / "metadata.jsonl", [{"file_name": name, "caption": "x"} for name in ("in.mp4", path)])
        with pytest.raises(ValueError, match="leads out of"):
            open_videos(str(folder), "train")


def test_images_are_refused_one_by_one_when_they_are_read(folder):
    write_images(folder)
    (folder / "x.png").symlink_to("/etc/passwd")
    write_jsonl(folder / "pairs.jsonl", [{"image": name, "caption": name} for name in ("a.png", "x.png")])
    first, second = open_pairs(str(folder / "pairs.jsonl"), "train")
    read_image(first["image"])
    with pytest.raises(UnreadableImageError, match="leads out"):
        read_image(second["image"])
