"""`open_videos`: a user's own videos and captions as a data set with one item for each video and all its captions.

Frames are decoded in the collator, not here: it skips and counts videos that it cannot read. msrvtt.py reads the
annotation files of MSR-VTT, and files.py the metadata of a folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
from torch.utils.data import Dataset

from .columns import check_any_exists, check_inside, drop_uncaptioned, find_column
from .files import load_rows
from .items import EpochSeeds
from .messages import shown
from .msrvtt import is_msrvtt, load_msrvtt
from .rows import list_captions

VIDEO_COLUMNS = ("video", "file_name", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov")


def open_videos(
    dataset: str,
    split: str,
    *,
    protocol: str | None = None,
    video_folder: str | None = None,
    video_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
) -> "VideoDataset":
    """
    Open a split of videos with their captions. A video without a caption is left out and reported by name.

    Args:
        dataset: The annotations of MSR-VTT (see `load_msrvtt`); a folder of videos with metadata.jsonl or
            metadata.csv, in it or in one sub-folder for each split; or such a file.
        split: Its name. MSR-VTT has train, validation and test.
        protocol: "msrvtt-full" (the default) or "msrvtt-1ka", for MSR-VTT only.
        video_folder: Where the video files are, by default where the annotations are. Those of MSR-VTT may be in any
            sub-folder.
        video_column: Holds paths of videos. By default the first that exists of video, file_name, path.
        caption_column: Holds a string or a list of strings. By default the first that exists of caption, captions,
            text, sentence. Captions of rows with the same video are joined.
        seed: Seed of the random draws for each item in training.

    Raises `ValueError` for a data set, split, protocol or column that does not exist, an empty data set, captions that
    are no strings, paths that leave the folder, two files of the same MSR-VTT video, and a folder without any of the
    videos. Single missing videos are named when they are read.
    """
    if is_msrvtt(dataset):
        if video_column is not None or caption_column is not None:
            raise ValueError("MSR-VTT's annotations have no columns to choose.")
        captions = load_msrvtt(dataset, split, **({} if protocol is None else {"protocol": protocol}))
        path = Path(dataset).expanduser()
        root = path if path.is_dir() else path.parent
        files = _find_msrvtt_files(Path(video_folder).expanduser() if video_folder else root, captions)
    else:
        if protocol is not None:
            raise ValueError(f"The protocol {protocol!r} is MSR-VTT's, and {dataset!r} holds none of its files.")
        rows, root = load_rows(dataset, split)
        captions = _group_captions(rows, video_column, caption_column)
        if video_folder is None and root is None:
            raise ValueError(f"Give `video_folder`: the files of {dataset!r} lie in no one folder.")
        folder = Path(video_folder).expanduser() if video_folder else root
        files = check_inside(captions, folder, "video")
        check_any_exists(files, folder, "video")
    names = drop_uncaptioned(list(captions), [len(known) for known in captions.values()], str, "video")
    if not names:
        raise ValueError(f"No video of the split {split!r} of {dataset!r} has a caption.")
    return VideoDataset(names, [files[name] for name in names], [captions[name] for name in names], seed)


class VideoDataset(Dataset):
    """
    Map-style data set of N videos with their captions.

    An item is {"video": path, "captions": list of strings, "pair_id": its number, "name": for reports, "seed": int}.

    Args:
        names: N names.
        paths: N paths of video files.
        captions: N lists of captions.
        seed: Seed of the random draws for each item in training.
    """

    modality = "video"

    def __init__(self, names: list[str], paths: list[str], captions: list[list[str]], seed: int = 0):
        self.names, self.paths, self.captions = names, paths, captions
        self._seeds = EpochSeeds(seed)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        index = int(index) % len(self)
        return {
            "video": self.paths[index],
            "captions": list(self.captions[index]),
            "pair_id": index,
            "name": self.names[index],
            "seed": self._seeds(index),
        }

    def iter_captions(self) -> Iterator[str]:
        """All captions."""
        for captions in self.captions:
            yield from captions

    def set_epoch(self, epoch: int) -> None:
        """Give every item a fresh seed."""
        self._seeds.set_epoch(epoch)


def _find_msrvtt_files(folder: Path, videos: dict[str, list[str]]) -> dict[str, str]:
    """The file of each video: in any sub-folder, named by the video's id, with any suffix; .mp4 if it is missing."""
    files: dict[str, str] = {}
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            video, suffix = os.path.splitext(name)
            if video not in videos or suffix.lower() not in VIDEO_SUFFIXES:
                continue
            file = os.path.join(place, name)
            if video in files:
                raise ValueError(
                    f"{files[video]!r} and {file!r} are both {video}: let `video_folder` say which to take."
                )
            files[video] = file
    if not files:
        raise ValueError(f"None of the {len(videos)} videos is in {str(folder)!r}: name the folder by `video_folder`.")
    check_inside((f"{video}.mp4" for video in videos), folder, "video")
    return {video: files.get(video, os.path.join(folder, f"{video}.mp4")) for video in videos}


def _group_captions(
    rows: datasets.Dataset, video_column: str | None, caption_column: str | None
) -> dict[str, list[str]]:
    """Captions by path, in the order in which paths first appear."""
    if len(rows) == 0:
        raise ValueError("The data set is empty.")
    video_column = find_column(rows, video_column, VIDEO_COLUMNS, "video")
    caption_column = find_column(rows, caption_column, CAPTION_COLUMNS, "caption")
    grouped: dict[str, list[str]] = {}
    for number, row in enumerate(rows.select_columns([video_column, caption_column])):
        path, captions = row[video_column], row[caption_column]
        if not isinstance(path, str) or not path:
            raise ValueError(f"The column {video_column!r} must hold paths; row {number} holds {shown(path)}.")
        try:
            grouped.setdefault(os.path.normpath(path), []).extend(list_captions(captions))
        except TypeError:
            raise ValueError(
                f"Captions must be strings or lists of strings; {caption_column!r} holds {shown(captions)}."
            ) from None
    return grouped
