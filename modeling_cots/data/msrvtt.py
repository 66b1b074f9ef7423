"""Reads MSR-VTT's own annotation files: the videos of each split and their captions. Video files are not here.

Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016.
"""

import csv
import json
from pathlib import Path

# Each holds one or two whole splits; the first holds all three.
ANNOTATION_FILES = ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
# The 1k-A split of Yu et al. (JSFusion, ECCV 2018) as it is passed on: its test set brings its own captions.
SPLIT_FILES_1KA = {"train": "MSRVTT_train.9k.csv", "test": "MSRVTT_JSFUSION_test.csv"}
FULL, SPLIT_1KA = "msrvtt-full", "msrvtt-1ka"


def is_msrvtt(dataset: str) -> bool:
    """Whether this is one of the annotation files, by its name, or a folder that holds one of them."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return bool(_annotation_files(path))
    return path.is_file() and path.name in ANNOTATION_FILES


def load_msrvtt(dataset: str, split: str, protocol: str = FULL) -> dict[str, list[str]]:
    """
    Captions of each video of a split, in the order of the files: {"video7010": ["a girl sings", ...], ...}.

    Args:
        dataset: MSRVTT_data.json, train_val_videodatainfo.json or test_videodatainfo.json, or a folder with one or
            more of them; 1k-A needs its two csv files beside them.
        split: "train", "validation" or "test".
        protocol: "msrvtt-full" for the split of the authors (6,513, 497 and 2,990 videos, 20 captions each), or
            "msrvtt-1ka" (train: 9,000 videos with 20 captions; test: 1,000 with one; there is no validation).

    Raises `ValueError` for an unknown protocol, a split or a file that is not there, and files of another form.
    """
    path = Path(dataset).expanduser()
    if protocol == SPLIT_1KA:
        return _load_1ka(path.parent if path.is_file() else path, split)
    if protocol != FULL:
        raise ValueError(f"MSR-VTT has the protocols {FULL!r} and {SPLIT_1KA!r}, got {protocol!r}.")
    files = [path] if path.is_file() else _annotation_files(path)
    splits, captions = _read_annotations(files)
    chosen = {video: captions.get(video, []) for video, its_split in splits.items() if its_split == split}
    if not chosen:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{names} has no split {split!r}; it has {', '.join(sorted(set(splits.values())))}.")
    return chosen


def _annotation_files(folder: Path) -> list[Path]:
    found = [folder / name for name in ANNOTATION_FILES if (folder / name).is_file()]
    return found[:1] if found and found[0].name == ANNOTATION_FILES[0] else found


def _read_annotations(files: list[Path]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The split of each video, and the captions of each that has any."""
    splits: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for video in content["videos"]:
                is_validation = video["split"] == "validate"  # the files' own word
                splits[video["video_id"]] = "validation" if is_validation else video["split"]
            for sentence in content["sentences"]:
                captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not in the form of MSR-VTT: {type(error).__name__}: {error}") from error
    return splits, captions


def _load_1ka(folder: Path, split: str) -> dict[str, list[str]]:
    if split not in SPLIT_FILES_1KA:
        raise ValueError(f"{SPLIT_1KA} has the splits {', '.join(SPLIT_FILES_1KA)}, got {split!r}.")
    table = folder / SPLIT_FILES_1KA[split]
    if not table.is_file():
        raise ValueError(f"{SPLIT_1KA} needs {table.name}, which is not in {str(folder)!r}.")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ("video_id", "sentence") if split == "test" else ("video_id",)
    missing = [column for column in columns if not rows or rows[0].get(column) is None]
    if missing:
        raise ValueError(f"{table} has no column {', '.join(missing)}, or no rows.")
    if split == "test":
        return {row["video_id"]: [row["sentence"]] for row in rows}
    _, captions = _read_annotations(_annotation_files(folder))
    return {row["video_id"]: captions.get(row["video_id"], []) for row in rows}
