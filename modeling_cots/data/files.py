"""Finds the files of a split: of one file, a glob, a list in braces or a folder. What is not read is named."""

import glob
import os
import re
from itertools import islice
from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils import logging

from ..image_reading_cots import IMAGE_SUFFIXES
from ..video_reading_cots import VIDEO_SUFFIXES
from .formats import READERS, read_rows
from .karpathy import is_karpathy
from .messages import printable, shorten
from .paths import RefusedPathError, is_inside, open_door, report_linked_folders, walk_visible
from .rows import BadRowError, Columns, image_columns, read_media, video_columns
from .skip_report import and_more
from .sources import is_path
from .splits import MissingSplitError
from .streaming.names import expand_braces

logger = logging.get_logger(__name__)

MAX_FILES = 3  # named in a message
MAX_TRIED_ROWS = 20
FORMATS = tuple(READERS)  # in a folder the first of these suffixes that occurs decides
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED_FILES = ("state.json", "dataset_info.json")  # beside the arrow files of `save_to_disk`, and of a search index
SAVED_SPLITS = "dataset_dict.json"  # beside the folders of a data set of several splits
COMMON_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")
CAPTION_SUFFIXES = (".txt", ".json")  # beside an image in a folder of samples


def find_files(dataset: str, split: str) -> list[Path] | None:
    """
    The files of a split; `None` for a repository, that is a Hub id or a folder with a card.

    A single file is the split, and so are all files of a glob and of a list in braces. Files of a folder belong to the
    split that they, or a sub-folder, are named after ("train.tar", "train-00000-of-00002.parquet", "train2014/"); the
    others are "train", unless there are several splits. A word in the middle of a name ("flickr-train.tar") counts
    only if all files have such a word.

    Args:
        dataset: A file (.parquet, .tar, .jsonl, .json, .csv), a glob or a list in braces of such files, a folder of
            them, a folder of images with metadata.jsonl, metadata.csv or metadata.parquet (in it, or in one sub-folder
            for each split), img2dataset's output folder, or a Hub id.
        split: Its name, with a slice if wanted ("train[:1000]").

    Raises `ValueError` where nothing is found, and for a split that does not exist.
    """
    if not dataset:
        raise ValueError("Name a data set: a file, a folder, a glob or a Hub id; got an empty string.")
    if "\0" in dataset:
        raise ValueError(f"{dataset!r} is no name of a data set.")
    path, name = Path(dataset).expanduser(), base_of(split)
    if path.is_file():
        _warn_if_unsplit(dataset, [path], name)
        return _only_readable([path])
    if path.is_dir():
        return None if has_dataset_card(path) else _files_in_folder(path, name)
    if "{" in dataset:
        return _files_in_braces(str(path))
    if glob.has_magic(dataset):
        return _files_of_glob(str(path), name)
    if is_path(dataset) or path.suffix in FORMATS or not is_hub_id(dataset):
        raise ValueError(f"The data set {dataset!r} does not exist. (A Hub id has the form owner/name.)")
    return None


def base_of(split: str) -> str:
    """The name of a split without its slice."""
    return split.split("[")[0]


def has_dataset_card(folder: Path) -> bool:
    """Whether a folder is a Hub repository: its card then says which files belong to which split."""
    card = folder / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except (ValueError, yaml.YAMLError) as error:
        raise broken_card(card, error) from error


def broken_card(card: str | os.PathLike, error: Exception) -> ValueError:
    """The error for a README.md whose head is no YAML: one sentence, which says where."""
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f" in line {mark.line + 2}"  # the first line is ---
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return ValueError(
        f"The YAML between the first two lines of --- in {os.fspath(card)} cannot be read{place} ({shorten(problem)}):"
        " mend it, or leave it out."
    )


def holds_dataset(folder: Path, split: str = "train") -> bool:
    """
    Whether a folder declares itself a data set, and is not just images or videos beside foreign files.

    Without images and videos it is one if it has data. With them it takes metadata that names some of them (its own,
    or in sub-folders of splits which hold all of them), a card, an annotation file of Karpathy's form, or a caption
    beside each image, as img2dataset writes them. Of a stray table or archive nobody can say what it is for.

    Args:
        folder: A folder that is there.
        split: Name of the split that is wanted, which a sub-folder may have beside the common ones.
    """
    found = _visible_files(folder)
    media = [file for file in found if file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)]
    if not media:
        is_declared = bool(_metadata_files(folder)) or is_karpathy(str(folder)) or has_dataset_card(folder)
        return is_declared or any(file.suffix in FORMATS for file in found)
    images = [file for file in media if file.suffix.lower() in IMAGE_SUFFIXES]
    has_captions = len(_captioned(images, set(found))) == len(media)
    return (
        any(_names_media(folder / name) for name in METADATA_FILES)
        or _has_split_folders(folder, media, {base_of(split), *COMMON_SPLITS})
        or is_karpathy(str(folder))
        or (has_captions and not any(file.name in METADATA_FILES for file in found))
        or _has_sound_card(folder)
    )


def names_videos(dataset: str, split: str) -> bool:
    """Whether the metadata of a folder, or a table of paths, names videos."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = [place / name for place in (path, path / base_of(split)) for name in METADATA_FILES]
    else:
        files = [path]
    return any(_first_named(file, video_columns(), VIDEO_SUFFIXES) for file in files)


def _names_media(file: Path) -> bool:
    """Whether a table names a file beside it that is there."""
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    return any(_first_named(file, columns, suffixes) for columns in (image_columns(), video_columns()))


def _first_named(file: Path, columns: Columns, suffixes: tuple[str, ...]) -> bool:
    """Whether a table of paths begins with rows of which one names a file that is there and ends in this way."""
    if not file.is_file() or file.suffix == ".tar":
        return False
    try:
        with file.open("rb") as stream:
            for _, row in islice(read_rows(stream, file.suffix, columns), MAX_TRIED_ROWS):
                if isinstance(row, BadRowError):
                    continue
                try:
                    path = read_media(row, columns)["path"]
                    if path and path.lower().endswith(suffixes) and os.path.exists(open_door(path, file.parent)):
                        return True
                except (BadRowError, RefusedPathError):
                    continue
    except Exception:  # a foreign file may be anything, and every format has its own errors
        pass
    return False


def _has_split_folders(folder: Path, media: list[Path], splits: set[str]) -> bool:
    """Whether all images and videos lie in sub-folders that are named after splits and have metadata."""
    places = {place for place in folder.iterdir() if place.name in splits}
    declared = {place for place in places if any(_names_media(place / name) for name in METADATA_FILES)}
    return bool(declared) and all(folder / file.relative_to(folder).parts[0] in declared for file in media)


def _has_sound_card(folder: Path) -> bool:
    try:
        return has_dataset_card(folder)
    except ValueError:  # a README.md that is no card
        return False


def _only_readable(files: list[Path]) -> list[Path]:
    if not {file.suffix for file in files} <= set(FORMATS):
        odd = [file for file in files if file.suffix not in FORMATS]
        raise ValueError(f"Expected files that end in {', '.join(FORMATS)}; got {and_more(odd, MAX_FILES)}.")
    return files


def _files_in_folder(folder: Path, split: str) -> list[Path]:
    has_splits = (folder / SAVED_SPLITS).is_file()
    if has_splits or all((folder / name).is_file() for name in SAVED_FILES):
        saved = f"datasets.load_from_disk(folder){'[split]' if has_splits else ''}"
        raise ValueError(
            f"The folder {str(folder)!r} was written by `save_to_disk`: write it as parquet instead, by "
            f"`{saved}.to_parquet(file)`, and give that file."
        )
    found = _refuse_links(_visible_files(folder), folder)
    metadata = _metadata_files(folder)
    samples = [] if metadata else _sample_folders(found)
    data = _without_side_files([file for file in found if file.suffix in FORMATS], samples)
    if metadata:
        by_split, used = {name: [file] for name, file in metadata.items()}, set(metadata.values())
    else:
        first = next((suffix for suffix in FORMATS if any(file.suffix == suffix for file in data)), None)
        chosen = samples or [file for file in data if file.suffix == first]
        if not chosen:
            raise ValueError(
                f"The folder {str(folder)!r} has no {', '.join(METADATA_FILES[:-1])} or {METADATA_FILES[-1]} with "
                f"captions, no image beside a file of its caption, and no file that ends in {', '.join(FORMATS)}."
            )
        by_split, used = _group_by_split(chosen, folder, split), set(chosen)
    _warn_of_unread([file for file in data if file not in used], folder, "is not part of the data set")
    if split not in by_split:
        raise MissingSplitError.of(str(folder), split, by_split)
    return by_split[split]


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without hidden ones and without those of a search index or `save_to_disk`."""
    return [
        Path(place, name)
        for place, names in walk_visible(folder)
        if not set(SAVED_FILES) <= set(names)
        for name in names
    ]


def _metadata_files(folder: Path) -> dict[str, Path]:
    """The metadata file of each split: of the folder itself, which is "train", and of its sub-folders."""
    metadata: dict[str, Path] = {}
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        for name in METADATA_FILES:
            file = place / name
            if place.name.startswith(".") or not file.is_file() or not is_inside(file, folder):
                continue
            split = "train" if place == folder else place.name
            if split in metadata:
                raise ValueError(
                    f"{str(metadata[split])!r} and {str(file)!r} are both metadata of the split {split!r}: name the "
                    "one that you mean, or remove the other."
                )
            metadata[split] = file
    return metadata


def _sample_folders(files: list[Path]) -> list[Path]:
    """The folders that hold images, each beside the text or JSON file of its caption, as img2dataset writes them."""
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    return sorted({file.parent for file in _captioned(images, set(files))})


def _captioned(images: list[Path], files: set[Path]) -> list[Path]:
    """The images that have a text or JSON file of the same name beside them."""
    return [file for file in images if any(file.with_suffix(suffix) in files for suffix in CAPTION_SUFFIXES)]


def _without_side_files(files: list[Path], samples: list[Path]) -> list[Path]:
    """Drop what belongs to the samples or shards of img2dataset: tables of metadata alone, statistics, captions."""
    shards = {file.with_suffix("") for file in files if file.suffix == ".tar"} | set(samples)
    tables = {file.with_suffix("") for file in files if file.suffix == ".parquet"} | shards
    return [
        file
        for file in files
        if not (file.suffix == ".parquet" and file.with_suffix("") in shards)
        and not (file.name.endswith("_stats.json") and file.parent / file.name.removesuffix("_stats.json") in tables)
        and not (file.suffix == ".json" and file.parent in samples)
    ]


def _refuse_links(files: list[Path], folder: Path) -> list[Path]:
    """Drop links that lead out of the folder, as a stranger may have packed it. A file that the user names is read."""
    refused = [file for file in files if file.suffix in FORMATS and file.is_symlink() and not is_inside(file, folder)]
    if refused:
        logger.warning(
            f"Refused {len(refused)} files of {folder}, which are links that lead out of it: "
            f"{and_more(refused, MAX_FILES)}. Name them, or the folder they lead to, if they are meant."
        )
        files = [file for file in files if file not in set(refused)]
    report_linked_folders([str(file) for file in files if file.suffix in FORMATS], folder)
    return files


def _files_in_braces(pattern: str) -> list[Path]:
    """The files of a list in braces: what is listed is the split, and stars in it are looked up."""
    files: list[Path] = []
    for name in expand_braces(pattern):
        files += _matches(name) if glob.has_magic(name) else [Path(name)]
    if not any(file.exists() for file in files):
        raise ValueError(f"None of the {len(files)} files of {pattern!r} exists.")
    return _only_readable(files)


def _files_of_glob(pattern: str, split: str) -> list[Path]:
    """All files that match: who names files means them, whatever they are called."""
    files = _only_readable(_matches(pattern))
    first = next(i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part))
    by_split = _named_after_splits(files, Path(*Path(pattern).parts[:first]), split, strict=True)
    others = [str(file) for name, named in by_split.items() if name != split for file in named]
    if others:
        logger.warning(
            f"{pattern} also matches {len(others)} files that are named after another split than {split!r}, and reads "
            f"them as {split!r}: {and_more(others, MAX_FILES)}. Give their folder to have files read by their splits."
        )
    elif not by_split:
        _warn_if_unsplit(pattern, files, split)
    return files


def _matches(pattern: str) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not files:
        raise ValueError(f"No file matches {pattern!r}.")
    return files


def _group_by_split(files: list[Path], folder: Path, split: str) -> dict[str, list[Path]]:
    """The files of a folder by their splits, see `find_files`. Warns of files that belong to none."""
    by_split = _named_after_splits(files, folder, split, strict=True)
    loosely = _named_after_splits(files, folder, split, strict=False)
    if sum(map(len, by_split.values())) < len(files) == sum(map(len, loosely.values())):
        others = [file for name, named in loosely.items() if name != split for file in named]
        _warn_of_unread(others if split in loosely else [], folder, f"is named after another split than {split!r}")
        return loosely
    grouped = {file for named in by_split.values() for file in named}
    rest = [file for file in files if file not in grouped]
    if len(by_split) < 2:
        return {**by_split, "train": sorted([*by_split.get("train", []), *rest])} if rest else by_split
    _warn_of_unread(rest, folder, f"is named after no split, where others are ({', '.join(sorted(by_split))})")
    return by_split


def _named_after_splits(files: list[Path], folder: Path, split: str, strict: bool) -> dict[str, list[Path]]:
    """
    Files by the split that their path below `folder` has. Files without one are left out.

    Args:
        files: Files or folders of samples.
        folder: What they are in.
        split: Counts as a split beside the common ones.
        strict: Whether a name must begin with the split, and nothing but numbers may follow ("train-00000-of-00002").
    """
    names = "|".join(re.escape(name) for name in (split, *COMMON_SPLITS))
    strictly = re.compile(rf"({names})([-_.]?\d[\w.-]*)?")
    anywhere = re.compile(rf"(?<![a-zA-Z0-9])({names})(?![a-zA-Z])")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        path = file.relative_to(folder)
        parts = path.with_suffix("").parts if file.suffix in FORMATS else path.parts
        matches = (strictly.fullmatch(part) if strict else anywhere.search(part) for part in parts)
        if match := next(filter(None, matches), None):
            by_split.setdefault(match[1], []).append(file)
    return by_split


def _warn_of_unread(files: list[Path], folder: Path, reason: str) -> None:
    if files:
        names = and_more([printable(str(file.relative_to(folder))) for file in files], MAX_FILES)
        logger.warning(
            f"Did not read {len(files)} files of {printable(str(folder))}: {names}. Each {reason}; a glob or the "
            "file's own name reads it."
        )


def _warn_if_unsplit(dataset: str, files: list[Path], split: str) -> None:
    if split != "train" and not any(split in file.name for file in files):
        logger.warning(f"{dataset} has no splits: all of it is read as {split!r}.")


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a data set of the Hub: one without an owner is more likely a mistyped path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
