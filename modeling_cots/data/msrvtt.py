"""Reads MSR-VTT's own annotation files: the videos of each split and their captions. Video files are not here.

Xu et al., "MSR-VTT: A Large Video Description Dataset for Bridging Video and Language", CVPR 2016.
"""

from pathlib import Path

from transformers.utils import logging

from .formats import read_annotations, read_rows
from .messages import shown
from .rows import BadRowError, Columns, list_captions
from .skip_report import and_more
from .splits import MissingSplitError

logger = logging.get_logger(__name__)

MAX_NAMES = 5  # in a warning

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

    A caption that is no text is left out, counted and named. A video that is listed twice has all of its captions.

    Raises `ValueError` for an unknown protocol, a split or a file that is not there, a video in two splits, and files
    of another form.
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
        there = sorted(set(splits.values()))
        raise MissingSplitError(f"{names} has no split {split!r}; it has {', '.join(there)}.", there, can_be_cut=False)
    return chosen


def _annotation_files(folder: Path) -> list[Path]:
    found = [folder / name for name in ANNOTATION_FILES if (folder / name).is_file()]
    return found[:1] if found and found[0].name == ANNOTATION_FILES[0] else found


def _read_annotations(files: list[Path]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The split of each video, and the captions of each that has any."""
    splits: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    odd: list[str] = []
    for file in files:
        content = read_annotations(file, "MSR-VTT's")
        for number, video in enumerate(_objects(content, "videos", file)):
            name, split = _text(video, "video_id", number, file), _text(video, "split", number, file)
            split = "validation" if split == "validate" else split  # the files' own word
            if splits.setdefault(name, split) != split:
                raise ValueError(f"{file} lists {name!r} in the splits {splits[name]!r} and {split!r}.")
        for number, sentence in enumerate(_objects(content, "sentences", file)):
            name = _text(sentence, "video_id", number, file)
            found, odd_ones = list_captions(sentence.get("caption"))
            captions.setdefault(name, []).extend(found)
            odd += [f"{shown(each)} of {name}" for each in odd_ones]
    if odd:
        logger.warning(f"Left out {len(odd)} captions of MSR-VTT, which are no texts: {and_more(odd, MAX_NAMES)}.")
    return splits, captions


def _objects(content, name: str, file: Path) -> list[dict]:
    """The list of that name, of which every element is an object."""
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{file} is not in MSR-VTT's form: it has no list of objects {name!r}.")
    return found


def _text(row: dict, name: str, number: int, file: Path) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{file} is not in MSR-VTT's form: {name!r} of entry {number} is {shown(value)} and no text.")
    return value


def _load_1ka(folder: Path, split: str) -> dict[str, list[str]]:
    if split not in SPLIT_FILES_1KA:
        message = f"{SPLIT_1KA} has the splits {', '.join(SPLIT_FILES_1KA)}, got {split!r}."
        raise MissingSplitError(message, SPLIT_FILES_1KA, can_be_cut=False)
    table = folder / SPLIT_FILES_1KA[split]
    if not table.is_file():
        raise ValueError(f"{SPLIT_1KA} needs {table.name}, which is not in {str(folder)!r}.")
    rows = _read_table(table)
    columns = ("video_id", "sentence") if split == "test" else ("video_id",)
    missing = [column for column in columns if not rows or column not in rows[0]]
    if missing:
        raise ValueError(f"{table} has no column {', '.join(missing)}, or no rows.")
    captions = _read_annotations(_annotation_files(folder))[1] if split == "train" else {}
    chosen: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        video = _text(row, "video_id", number, table)
        own = list_captions(row.get("sentence"))[0] if split == "test" else captions.get(video, [])
        chosen[video] = chosen.get(video, []) + own if split == "test" else own
    return chosen


def _read_table(table: Path) -> list[dict]:
    """The rows of a csv file; a warning names those that cannot be read."""
    columns = Columns("video", ("video_id",), ("sentence",))
    try:
        with table.open("rb") as stream:
            found = list(read_rows(stream, ".csv", columns))
    except BadRowError as error:
        raise ValueError(f"{table} cannot be read: {error}.") from error
    odd = [f"row {number} ({row})" for number, row in found if isinstance(row, BadRowError)]
    if odd:
        logger.warning(f"Left out {len(odd)} rows of {table}: {and_more(odd, MAX_NAMES)}.")
    return [row for _, row in found if not isinstance(row, BadRowError)]
