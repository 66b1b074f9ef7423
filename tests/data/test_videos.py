"""`open_videos` on MSR-VTT's own forms, in small, and on folders with metadata; and what it must refuse."""

import csv
import json
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from video_files import numbers_of, write_video

from modeling_cots.data import columns
from modeling_cots.data.opening import open_video_dataset
from modeling_cots.data.scenes import moving
from modeling_cots.data.videos import open_videos
from modeling_cots.video_reading_cots import read_video

SPLITS = {"train": ["video0", "video1"], "validate": ["video2"], "test": ["video3", "video4"]}


def annotations(*splits: str) -> dict:
    """In the form of MSR-VTT, with three captions a video that are not in the order of the videos."""
    videos = [
        {"category": 9, "url": "https://host/watch", "video_id": video, "start time": 1.5, "end time": 9.0, "id": 0}
        | {"split": split}
        for split in splits
        for video in SPLITS[split]
    ]
    sentences = [
        {"caption": f"{video['video_id']} caption {number}", "video_id": video["video_id"], "sen_id": number}
        for number in range(3)
        for video in reversed(videos)
    ]
    return {"info": {"version": "1.0"}, "videos": videos, "sentences": sentences}


def touch_videos(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(params=["one file", "two files"])
def msrvtt(request, tmp_path) -> Path:
    """A folder with all annotations in both of the forms in which they are passed on, and with empty video files."""
    if request.param == "one file":
        (tmp_path / "MSRVTT_data.json").write_text(json.dumps(annotations("train", "validate", "test")))
    else:
        (tmp_path / "train_val_videodatainfo.json").write_text(json.dumps(annotations("train", "validate")))
        (tmp_path / "test_videodatainfo.json").write_text(json.dumps(annotations("test")))
    touch_videos(tmp_path / "TrainValVideo", "video0.mp4", "video1.webm", "video2.mp4", "video0.txt")
    touch_videos(tmp_path / "TestVideo", "video3.mp4", "video4.MP4", "video99.mp4")
    write_csv(
        tmp_path / "MSRVTT_JSFUSION_test.csv",
        [{"key": "ret0", "vid_key": "msr4", "video_id": "video4", "sentence": "one, and only this"}],
    )
    write_csv(tmp_path / "MSRVTT_train.9k.csv", [{"video_id": video} for video in ("video0", "video2", "video3")])
    return tmp_path


def captions_of(video: str) -> list[str]:
    return [f"{video} caption {number}" for number in range(3)]


# MSR-VTT


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_full_split_of_msrvtt(msrvtt, split):
    opened = open_videos(str(msrvtt), split)
    assert opened.names == SPLITS[{"validation": "validate"}.get(split, split)]
    for index, name in enumerate(opened.names):
        item = opened[index]
        assert item["captions"] == captions_of(name) and item["pair_id"] == index and item["name"] == name
        assert Path(item["video"]).is_file() and Path(item["video"]).stem == name
    assert list(opened.iter_captions()) == [caption for name in opened.names for caption in captions_of(name)]


def test_1ka_split_of_msrvtt(msrvtt):
    """Test videos have one caption of a file of their own; the 9,000 for training have all captions, of any split."""
    test = open_videos(str(msrvtt), "test", protocol="msrvtt-1ka")
    assert (test.names, test.captions) == (["video4"], [["one, and only this"]])
    train = open_videos(str(msrvtt), "train", protocol="msrvtt-1ka")
    assert train.names == ["video0", "video2", "video3"]
    assert train.captions == [captions_of(name) for name in train.names]
    with pytest.raises(ValueError, match="has the splits train, test, got 'validation'"):
        open_videos(str(msrvtt), "validation", protocol="msrvtt-1ka")
    with pytest.raises(ValueError, match="'msrvtt-full' and 'msrvtt-1ka', got 'msrvtt-7k'"):
        open_videos(str(msrvtt), "test", protocol="msrvtt-7k")
    (msrvtt / "MSRVTT_train.9k.csv").unlink()
    with pytest.raises(ValueError, match="needs MSRVTT_train.9k.csv"):
        open_videos(str(msrvtt), "train", protocol="msrvtt-1ka")


def test_an_annotation_file_by_its_name(tmp_path):
    file = tmp_path / "train_val_videodatainfo.json"
    file.write_text(json.dumps(annotations("train", "validate")))
    (tmp_path / "test_videodatainfo.json").write_text(json.dumps(annotations("test")))
    touch_videos(tmp_path / "elsewhere", "video2.avi")
    opened = open_videos(str(file), "validation", video_folder=str(tmp_path / "elsewhere"))
    assert opened.names == ["video2"] and opened[0]["video"] == str(tmp_path / "elsewhere" / "video2.avi")
    with pytest.raises(ValueError, match="train_val_videodatainfo.json has no split 'test'; it has train, validation"):
        open_videos(str(file), "test")


def test_a_missing_video_is_left_to_the_reader(msrvtt):
    """It is then skipped, counted and named like any other that cannot be read."""
    (msrvtt / "TestVideo" / "video3.mp4").unlink()
    opened = open_videos(str(msrvtt), "test")
    assert len(opened) == 2 and not Path(opened[0]["video"]).exists() and opened[0]["name"] == "video3"
    (msrvtt / "TestVideo" / "video4.MP4").unlink()
    with pytest.raises(ValueError, match="None of the 2 videos .* `video_folder`"):
        open_videos(str(msrvtt), "test")


def test_an_annotation_cannot_name_a_file_elsewhere(tmp_path):
    content = annotations("train")
    content["videos"].append({**content["videos"][0], "video_id": "../other"})
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    touch_videos(tmp_path, "video0.mp4", "video1.mp4")
    with pytest.raises(ValueError, match="'../other.mp4' leads out of"):
        open_videos(str(tmp_path), "train")


def test_two_files_of_one_video_are_refused(msrvtt):
    touch_videos(msrvtt / "compressed", "video3.mp4")
    with pytest.raises(ValueError, match="are both video3"):
        open_videos(str(msrvtt), "test")
    assert len(open_videos(str(msrvtt), "test", video_folder=str(msrvtt / "TestVideo"))) == 2


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{", '{"videos": [{}], "sentences": []}', '{"videos": []}', '{"videos": 3, "sentences": []}']
)
def test_annotations_of_another_form_are_refused(tmp_path, content):
    (tmp_path / "MSRVTT_data.json").write_text(content)
    with pytest.raises(ValueError, match="MSRVTT_data.json is not in MSR-VTT's form"):
        open_videos(str(tmp_path), "train")


def test_videos_without_a_caption_are_named(tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(columns.logger, "warning", warnings.append)
    content = annotations("train")
    content["sentences"] = [sentence for sentence in content["sentences"] if sentence["video_id"] == "video0"]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(content))
    touch_videos(tmp_path, "video0.mp4", "video1.mp4")
    assert open_videos(str(tmp_path), "train").names == ["video0"]
    assert warnings == ["Left out 1 of 2 videos, which have no caption: video1."]


def test_options_that_would_be_ignored_are_refused(msrvtt, tmp_path_factory):
    with pytest.raises(ValueError, match="no columns to choose"):
        open_videos(str(msrvtt), "test", caption_column="caption")
    folder = tmp_path_factory.mktemp("folder")
    touch_videos(folder, "a.mp4")
    write_csv(folder / "metadata.csv", [{"video": "a.mp4", "caption": "a"}])
    with pytest.raises(ValueError, match="protocol 'msrvtt-full' is MSR-VTT's"):
        open_videos(str(folder), "train", protocol="msrvtt-full")


# Folders with metadata


def test_folder_with_metadata_a_row_a_video(tmp_path):
    rows = [{"file_name": "b.mp4", "captions": ["one", "two"]}, {"file_name": "in/a.webm", "captions": ["three"]}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    touch_videos(tmp_path, "b.mp4")
    touch_videos(tmp_path / "in", "a.webm")
    opened = open_videos(str(tmp_path), "train")
    assert opened.captions == [["one", "two"], ["three"]] and opened.names == ["b.mp4", "in/a.webm"]
    assert [opened[index]["video"] for index in range(2)] == [str(tmp_path / "b.mp4"), str(tmp_path / "in" / "a.webm")]


def test_folder_with_metadata_a_row_a_caption_and_a_sub_folder_a_split(tmp_path):
    for split in ("train", "validation"):
        touch_videos(tmp_path / split, "a.avi", "b.avi")
        rows = [("a.avi", f"{split} 1"), ("./b.avi", "2"), ("./a.avi", "null"), ("b.avi", "")]
        write_csv(tmp_path / split / "metadata.csv", [{"video": video, "text": text} for video, text in rows])
    opened = open_videos(str(tmp_path), "validation")
    assert opened.captions == [["validation 1", "null"], ["2", ""]]
    assert opened[1]["video"] == str(tmp_path / "validation" / "b.avi")
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        open_videos(str(tmp_path), "test")


def test_a_metadata_file_with_videos_elsewhere(tmp_path):
    touch_videos(tmp_path / "videos", "a.mp4", "b.mp4")
    rows = [{"clip": "a.mp4", "says": "one"}, {"clip": "b.mp4", "says": "two"}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"video_column": "clip", "caption_column": "says"}
    opened = open_videos(str(tmp_path / "test.jsonl"), "test[1:]", video_folder=str(tmp_path / "videos"), **columns)
    assert opened.captions == [["two"]] and opened[0]["video"] == str(tmp_path / "videos" / "b.mp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"movie": "a.mp4", "caption": "x"}, "no video in one of video, file_name, path; there is movie, caption"),
        ({"video": "a.mp4", "label": "x"}, "has a caption in caption or .*: there are video, label"),
        ({"video": "../a.mp4", "caption": "x"}, "leads out of"),
        ({"video": "/etc/a.mp4", "caption": "x"}, "leads out of"),
        ({"video": "b.mp4", "caption": "x"}, "None of the 1 videos exists: 'b.mp4'"),
        ({"video": "a.mp4", "caption": 3}, "its captions in 'caption' hold 3, which is no text"),
        ({"video": "a.mp4", "caption": [3]}, "hold 3, which is no text"),
        ({"video": 7, "caption": "x"}, "metadata.jsonl/0: its video column 'video' holds 7"),
        ({"video": "a.mp4", "caption": []}, "No video of the split 'train' .* has a caption in"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(tmp_path, row, message):
    touch_videos(tmp_path, "a.mp4")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        open_videos(str(tmp_path), "train")


def test_a_named_column_that_is_not_there(tmp_path):
    touch_videos(tmp_path, "a.mp4")
    write_csv(tmp_path / "metadata.csv", [{"video": "a.mp4", "caption": "x"}])
    for kind in ("video", "caption"):
        with pytest.raises(
            ValueError,
            match=f"it has no {kind} in 'it'; there is video, caption|caption in it; .*: there are video, caption",
        ):
            open_videos(str(tmp_path), "train", **{f"{kind}_column": "it"})


def test_nothing_to_open(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_videos(str(tmp_path / "nowhere"), "train")
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match="empty"):
        open_videos(str(tmp_path), "train")


# Items


def test_seeds_change_with_epoch_and_item_but_not_with_workers(msrvtt):
    opened = open_videos(str(msrvtt), "train", seed=3)

    def seeds(workers: int) -> list[int]:
        return [item["seed"] for item in DataLoader(opened, batch_size=None, num_workers=workers)]

    first = seeds(0)
    assert len(set(first)) == 2 and first == seeds(1)
    opened.set_epoch(1)
    assert not set(first) & set(seeds(0))
    assert open_videos(str(msrvtt), "train", seed=4)[0]["seed"] not in first


def test_items_by_index(msrvtt):
    opened = open_videos(str(msrvtt), "test")
    assert opened[-1] == opened[1]
    opened[0]["captions"].clear()
    assert opened[0]["captions"]
    with pytest.raises(IndexError):
        opened[2]


def test_the_path_is_what_the_reader_takes(tmp_path):
    write_video(tmp_path / "a.mp4", range(8))
    write_csv(tmp_path / "metadata.csv", [{"file_name": "a.mp4", "caption": "grey, lighter and lighter"}])
    frames, _ = read_video(open_videos(str(tmp_path), "train")[0]["video"])
    assert numbers_of(frames) == list(range(8))


def test_moving_scenes_are_written_once_and_opened_by_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(moving, "SPLIT_SIZES", {"train": 3, "validation": 2})
    folder = tmp_path / "generated"
    opened = open_video_dataset("moving_scenes", "train", generated_folder=str(folder), image_size=48, seed=4)
    assert (opened.name, len(opened)) == ("moving_scenes", 3)
    frames, _ = read_video(opened[2]["video"])
    assert frames.shape == (24, 48, 48, 3)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = open_video_dataset("moving_scenes", "train", generated_folder=str(folder), image_size=48)
    assert again.captions == opened.captions and again[0]["seed"] != opened[0]["seed"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written
    with pytest.raises(ValueError, match="moving_scenes is generated: leave out video_folder"):
        open_video_dataset("moving_scenes", "train", generated_folder=str(folder), video_folder="videos")
    reopened = open_video_dataset(str(folder), "train", generated_folder="unused", protocol=None)
    assert reopened.name == "generated" and reopened.captions == opened.captions
