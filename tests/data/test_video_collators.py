"""From videos to batches: which frames, one crop for all of them, and files of every kind, sound or not."""

import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from forks import server_with_package
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset
from video_files import LEVELS, write_audio, write_video

from modeling_cots import COTSVideoProcessor, ScenesDataset
from modeling_cots.data import skip_report
from modeling_cots.data.items import modality_of
from modeling_cots.data.video_collators import (
    COTSVideoDataCollator,
    COTSVideoEvaluationCollator,
    check_videos_readable,
)
from modeling_cots.data.videos import VideoDataset

SIZE, NUM_FRAMES = 16, 16


@pytest.fixture
def processor(tiny_tokenizer) -> SimpleNamespace:
    """Frames of 16 x 16 whose pixels tell their numbers: not normalized."""
    size = {"height": SIZE, "width": SIZE}
    return SimpleNamespace(
        tokenizer=tiny_tokenizer, video_processor=COTSVideoProcessor(size=size, do_normalize=False, do_rescale=False)
    )


def collators(processor, **options) -> tuple[COTSVideoDataCollator, COTSVideoEvaluationCollator]:
    training = COTSVideoDataCollator(processor, max_text_length=24, **options)
    return training, COTSVideoEvaluationCollator(processor, max_text_length=24)


def dataset_of(*paths, captions=("a red circle", "the white dog runs"), seed: int = 0) -> VideoDataset:
    return VideoDataset([Path(path).name for path in paths], list(paths), [list(captions) for _ in paths], seed)


def numbers(videos: torch.Tensor) -> list[list[int]]:
    """The numbers that the gray levels of frames (B, T, 3, H, W) tell."""
    return (videos.float().mean(dim=(2, 3, 4)) / LEVELS).round().int().tolist()


def texts_of(batch: dict, processor) -> list[str]:
    """What the tokens say, without spaces: the tiny tokenizer cuts words into several tokens."""
    decoded = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    return [text.replace(" ", "").replace("##", "") for text in decoded]


# Which frames


def test_evaluation_takes_the_middle_of_each_segment_and_all_captions(tmp_path, processor):
    dataset = dataset_of(write_video(tmp_path / "a.mp4", range(32)), write_video(tmp_path / "b.mp4", range(8, 40)))
    batch = collators(processor)[1]([dataset[0], dataset[1]])
    assert batch["pixel_values_videos"].shape == (2, NUM_FRAMES, 3, SIZE, SIZE)
    assert numbers(batch["pixel_values_videos"]) == [[2 * k + 1 for k in range(16)], [2 * k + 9 for k in range(16)]]
    assert batch["valid"].tolist() == [True, True] and batch["pair_ids"].tolist() == [0, 1]
    assert batch["caption_pair_ids"].tolist() == [0, 0, 1, 1]
    assert texts_of(batch, processor) == ["aredcircle", "thewhitedogruns"] * 2


def test_training_takes_a_random_frame_of_each_segment_by_the_items_seed(tmp_path, processor):
    dataset = dataset_of(*[write_video(tmp_path / "a.mp4", range(40))] * 4)
    training, _ = collators(processor)
    batch = training([dataset[index] for index in range(4)])
    found = numbers(batch["pixel_values_videos"])
    for video in found:
        assert all(int(k * 2.5) <= number <= int((k + 1) * 2.5) for k, number in enumerate(video))
    assert len({tuple(video) for video in found}) > 1
    assert batch["input_ids"].shape[0] == 4 and set(batch) == {
        "pixel_values_videos",
        "input_ids",
        "attention_mask",
        "pair_ids",
        "caption_ids",
        "valid",
    }
    torch.manual_seed(5)  # neither the ambient randomness nor the neighbors count
    alone = training([dataset[2]])
    assert numbers(alone["pixel_values_videos"]) == [found[2]]
    dataset.set_epoch(1)
    assert numbers(training([dataset[2]])["pixel_values_videos"]) != [found[2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(tmp_path, processor, workers):
    dataset = dataset_of(*[write_video(tmp_path / "a.mp4", range(40))] * 4)
    training, _ = collators(processor, min_crop_scale=0.3)
    expected = training([dataset[index] for index in range(4)])
    (batch,) = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=training)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_every_caption_is_drawn(tmp_path, processor):
    dataset = dataset_of(write_video(tmp_path / "a.mp4", range(16)))
    training, drawn = collators(processor)[0], set()
    for epoch in range(12):
        dataset.set_epoch(epoch)
        drawn.update(texts_of(training([dataset[0]]), processor))
    assert drawn == {"aredcircle", "thewhitedogruns"}


# Crops


def test_all_frames_of_a_video_are_cropped_and_flipped_alike(tmp_path, processor):
    """All frames of a still video come out the same. Without a crop they are those of evaluation."""
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    dataset = dataset_of(*[write_video(tmp_path / "a.mp4", [image] * 20, options={})] * 8)
    items = [dataset[index] for index in range(8)]
    cropped = collators(processor, min_crop_scale=0.2, horizontal_flip=0.5)[0](items)["pixel_values_videos"].float()
    # Compression changes pixels a little from frame to frame; another crop would change them by a whole image.
    apart = (cropped - cropped[:, :1]).abs().mean(dim=(1, 2, 3, 4))
    between = (cropped[1:, 0] - cropped[:-1, 0]).abs().mean(dim=(1, 2, 3))
    assert apart.max() < 4 < 15 < between.min()
    training, evaluation = collators(processor)
    whole = evaluation(items)["pixel_values_videos"].float()
    assert (training(items)["pixel_values_videos"].float() - whole).abs().mean() < 2
    flipped = collators(processor, horizontal_flip=1.0)[0](items)["pixel_values_videos"].float()
    assert (flipped - whole.flip(-1)).abs().mean() < 2 < 15 < (flipped - whole).abs().mean()


# Files of every kind


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mkv", ".mov"])
def test_containers(tmp_path, processor, suffix):
    dataset = dataset_of(write_video(tmp_path / f"a{suffix}", range(32)))
    for collator in collators(processor):
        (found,) = numbers(collator([dataset[0]])["pixel_values_videos"])
        assert found == sorted(found) and all(2 * k <= number <= 2 * k + 1 for k, number in enumerate(found))


@pytest.mark.parametrize("length", [1, 5, 15])
def test_short_videos_repeat_frames(tmp_path, processor, length):
    dataset = dataset_of(write_video(tmp_path / "a.webm", range(length)))
    training, evaluation = (numbers(each([dataset[0]])["pixel_values_videos"])[0] for each in collators(processor))
    assert len(training) == len(evaluation) == NUM_FRAMES and set(evaluation) == set(range(length))
    assert training == sorted(training) and set(training) <= set(range(length))


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_variable_frame_rate_counts_frames_and_not_seconds(tmp_path, processor, suffix):
    """Half of the frames pass within a fiftieth of the time."""
    times = [*range(0, 160, 10), *range(200, 8200, 500)]
    dataset = dataset_of(write_video(tmp_path / f"a{suffix}", range(32), times=times))
    batch = collators(processor)[1]([dataset[0]])
    assert numbers(batch["pixel_values_videos"]) == [[2 * k + 1 for k in range(16)]]


def bad_files(folder: Path) -> dict[str, str]:
    sound = write_video(folder / "sound.mp4", range(20))
    return {
        "missing.mp4": str(folder / "missing.mp4"),
        "empty.mp4": str((folder / "empty.mp4").touch() or folder / "empty.mp4"),
        "text.avi": str((folder / "text.avi").write_text("<html>") and folder / "text.avi"),
        "truncated.mp4": str(
            (folder / "truncated.mp4").write_bytes(Path(sound).read_bytes()[:300]) and folder / "truncated.mp4"
        ),
        "without_frames.avi": write_video(folder / "without_frames.avi", []),
        "audio_only.mp3": write_audio(folder / "audio_only.mp3"),
        "folder.mp4": str((folder / "folder.mp4").mkdir() or folder / "folder.mp4"),
    }


def test_files_that_cannot_be_read_keep_their_row_and_are_named_once(tmp_path, processor, monkeypatch):
    messages = []
    monkeypatch.setattr(skip_report.logger, "warning", messages.append)
    bad = bad_files(tmp_path)
    dataset = dataset_of(*bad.values(), write_video(tmp_path / "good.mp4", range(20)))
    for collator in collators(processor):
        messages.clear()
        for _ in range(2):
            batch = collator([dataset[index] for index in range(len(dataset))])
        assert batch["valid"].tolist() == [False] * len(bad) + [True]
        assert not batch["pixel_values_videos"][:-1].any() and batch["pixel_values_videos"][-1].any()
        assert len(messages) == len(bad)
        for name, message in zip(bad, messages, strict=True):
            assert message.startswith(f"Skipped the video {name}, which cannot be read (")


def test_nothing_readable_is_found_out_before_training(tmp_path):
    bad = bad_files(tmp_path)
    good = write_video(tmp_path / "good.mp4", range(20))
    check_videos_readable(dataset_of(*bad.values(), good))
    with pytest.raises(ValueError, match=r"None of the first 7 videos can be read, beginning with missing.mp4 \("):
        check_videos_readable(dataset_of(*bad.values()))
    with pytest.raises(ValueError, match="None of the first 1 videos"):
        check_videos_readable(dataset_of(bad["text.avi"], good), num_tries=1)


def test_a_long_file_is_never_in_memory(tmp_path):
    """2,400 raw frames, 277 MB in the file and 553 MB as RGB: a process needs less than a tenth of it more."""
    if sys.platform != "linux":
        pytest.skip("the peak of a process is read from /proc")
    path, size = tmp_path / "long.avi", (240, 320)
    write_video(path, (number % 40 for number in range(2400)), codec="rawvideo", size=size)
    short = write_video(tmp_path / "short.avi", range(20), codec="rawvideo", size=size)
    assert path.stat().st_size > 270e6
    code = f"""
from pathlib import Path
from types import SimpleNamespace
from modeling_cots import COTSVideoProcessor
from modeling_cots.data.video_collators import COTSVideoEvaluationCollator
from modeling_cots.scripts.factory import train_tokenizer

def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024

processor = SimpleNamespace(
    tokenizer=train_tokenizer(["a dog", "a dog"]),
    video_processor=COTSVideoProcessor(size={{"height": 32, "width": 32}}),
)
collate = COTSVideoEvaluationCollator(processor, max_text_length=8)
def item(path):
    return {{"video": path, "captions": ["a dog"], "pair_id": 0, "name": "it"}}
collate([item({short!r})])
before = peak()
batch = collate([item({str(path)!r})])
assert batch["valid"].all()
print(peak() - before)
"""
    assert float(server_with_package().run_python("-c", code).stdout) < 27


# What is no data set of videos, and no processor for them


def test_which_data_sets_hold_videos(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([{"video": "a.mp4"}])

    class Unread(VideoDataset):
        def __getitem__(self, index):
            raise AssertionError("no item has to be read")

    assert modality_of(dataset_of("a.mp4")) == modality_of([{"video": "a.mp4"}]) == "video"
    unread = Unread(["a"], ["a.mp4"], [["b"]])
    assert modality_of(Subset(Subset(unread, [0]), [0])) == "video"
    assert modality_of(Subset(ConcatDataset([unread, unread]), [1])) == "video"
    table = datasets.Dataset.from_dict({"video": ["missing.mp4"]}).cast_column("video", datasets.Video())
    assert modality_of(table) == modality_of(Subset(table, [0])) == "video"
    assert modality_of(datasets.Dataset.from_dict({"image": ["a.png"]})) == "image"
    for other in (None, [], Stream(), ScenesDataset("train", 2, 32), Subset(ScenesDataset("train", 2, 32), [1])):
        assert modality_of(other) == "image"


@pytest.mark.parametrize("changes", [{"num_frames": None}, {"num_frames": None, "fps": 2}])
def test_a_processor_that_gives_videos_of_any_length_is_refused(processor, changes):
    processor.video_processor = COTSVideoProcessor(**changes)
    for collator in (COTSVideoDataCollator, COTSVideoEvaluationCollator):
        with pytest.raises(ValueError, match="equally many frames"):
            collator(processor, max_text_length=8)
    processor.video_processor = None
    with pytest.raises(ValueError, match="this one has none"):
        COTSVideoDataCollator(processor, max_text_length=8)
