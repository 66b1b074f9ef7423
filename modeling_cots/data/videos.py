"""`open_videos`: a user's own videos and captions as a data set with one item for each video and all its captions.

Frames are decoded in the collator, not here: it skips and counts videos that it cannot read. msrvtt.py reads the
annotation files of MSR-VTT, and files.py the metadata of a folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import datasets
from torch.utils.data import Dataset

from ..video_reading_cots import VIDEO_SUFFIXES
from .columns import check_any_exists, check_inside, drop_uncaptioned
from .files import is_hub_id
from .items import EpochSeeds
from .loading import load_rows
from .msrvtt import is_msrvtt, load_msrvtt
from .paths import RefusedPathError, open_door, walk_visible
from .rows import video_columns


def open_videos(
    dataset: str,
    split: str,
    *,
    protocol: str | None = None,
    video_folder: str | None = None,
    video_column: str | None = None,
    caption_column: str | None = None,
    seed: int = 0,
    keep_uncaptioned: bool = False,
) -> "VideoDataset":
    """
    Open a split of videos with their captions.

    What cannot be used is left out, counted and named: captions that are no texts, rows without a path, videos without
    a caption. A file that its folder may not give (`open_door`) is named when it is read.

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
        keep_uncaptioned: Keep videos without captions, and need no column of captions; for indexing videos.

    Raises `ValueError` for a data set, split or protocol that does not exist, a data set of which no row can be used,
    paths that leave the folder, two files of the same MSR-VTT video, and a folder without any of the videos. Single
    missing videos are named when they are read.
    """
    if is_msrvtt(dataset):
        if video_column is not None or caption_column is not None:
            raise ValueError("MSR-VTT's annotations have no columns to choose.")
        captions = load_msrvtt(dataset, split, **({} if protocol is None else {"protocol": protocol}))
        path = Path(dataset).expanduser()
        root = path if path.is_dir() else path.parent
        folder = Path(video_folder).expanduser() if video_folder else root
        files = _find_msrvtt_files(folder, captions)
    else:
        if protocol is not None:
            raise ValueError(f"The protocol {protocol!r} is MSR-VTT's, and {dataset!r} holds none of its files.")
        if is_hub_id(dataset) and not os.path.exists(os.path.expanduser(dataset)):
            raise ValueError(
                f"The data set {dataset!r} does not exist: videos are read from a folder or a file of it."
            )
        columns = video_columns(video_column, caption_column)
        table, root = load_rows(dataset, split, columns, need_captions=not keep_uncaptioned)
        captions = _group_captions(table)
        if video_folder is None and root is None:
            raise ValueError(f"Give `video_folder`: the files of {dataset!r} lie in no one folder.")
        folder = Path(video_folder).expanduser() if video_folder else root
        files = check_inside(captions, folder, "video")
        check_any_exists(files, folder, "video")
    names = list(captions)
    if not keep_uncaptioned:
        names = drop_uncaptioned(names, [len(captions[name]) for name in names], str, "video")
    if not names:
        raise ValueError(f"No video of the split {split!r} of {dataset!r} has a caption.")
    return VideoDataset(names, [files[name] for name in names], [captions[name] for name in names], seed, folder)


class VideoDataset(Dataset):
    """
    Map-style data set of N videos with their captions.

    An item is {"video": path, "captions": list of strings, "pair_id": its number, "name": for reports, "seed": int}.
    Where the file leads out of the folder, "video" is `None`, and the reason is under "refused".

    Args:
        names: N names.
        paths: N paths of video files.
        captions: N lists of captions.
        seed: Seed of the random draws for each item in training.
        folder: What no file may leave; `None` for paths that do not come out of data.
    """

    modality = "video"

    def __init__(
        self,
        names: list[str],
        paths: list[str],
        captions: list[list[str]],
        seed: int = 0,
        folder: str | os.PathLike | None = None,
    ):
        self.names, self.paths, self.captions, self.folder = names, paths, captions, folder
        self._seeds = EpochSeeds(seed)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Item {index} of {len(self)}.")
        index = int(index) % len(self)
        return {
            **self._located(self.paths[index]),
            "captions": list(self.captions[index]),
            "pair_id": index,
            "name": self.names[index],
            "seed": self._seeds(index),
        }

    def _located(self, path: str) -> dict:
        if self.folder is None:
            return {"video": path}
        try:
            return {"video": open_door(path, self.folder)}
        except RefusedPathError as error:
            return {"video": None, "refused": str(error)}

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
    for place, names in sorted(walk_visible(folder)):
        for name in names:
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
    missing = check_inside((f"{video}.mp4" for video in videos), folder, "video")
    return {video: files.get(video, missing[f"{video}.mp4"]) for video in videos}


def _group_captions(table: datasets.Dataset) -> dict[str, list[str]]:
    """Captions by path, in the order in which paths first appear."""
    grouped: dict[str, list[str]] = {}
    for path, captions in zip(table["path"], table["captions"], strict=True):
        if path is not None:
            grouped.setdefault(os.path.normpath(os.fsdecode(path)), []).extend(captions)
    return grouped
