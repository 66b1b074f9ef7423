"""Opens the rows of a split by the name of a data set: Hub id, folder, file or glob. Columns are not chosen here."""

import glob
import os
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils import logging

from .messages import MAX_TEXT, shorten
from .revisions import refuse_version
from .skip_report import and_more

logger = logging.get_logger(__name__)

MAX_FILES = 3  # named in a message

# In a folder the first of these suffixes that occurs decides.
BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # what `datasets` writes into a folder that only it reads
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
OTHER_SEPARATORS = (";", "\t", "|")
MAX_HEADER = 10_000  # characters
COMMON_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")


def load_rows(
    dataset: str, split: str, dataset_config: str | None = None, revision: str | None = None
) -> tuple[datasets.Dataset, Path | None]:
    """
    Open one split, memory-mapped, with images still encoded.

    A single file is the split. So are all files of a glob if none of their names contains a split. Files of a folder
    belong to the split that their name or sub-folder contains; if none contains one, all are "train".

    Args:
        dataset: A file (.parquet, .tar, .jsonl, .json, .csv), a glob of such files, a folder of them, a folder of
            images with metadata.jsonl or metadata.csv (in it, or in one sub-folder for each split), or a Hub id.
        split: Its name, with a slice if wanted ("train[:1000]").
        dataset_config: The configuration of a Hub id, or of a folder whose README.md lists configurations.
        revision: Branch, tag or commit of a Hub id.

    Returns the rows, and the folder that image paths in them are relative to, which is `None` for the Hub.

    Raises `ValueError` where nothing is found or readable, and for a split that does not exist.
    """
    files = find_files(dataset, split)
    if files is None:
        path = Path(dataset).expanduser()
        if path.is_dir():
            refuse_version(dataset, revision=revision)
            return _load_repository(str(path), split, dataset_config, None), path
        return _load_repository(dataset, split, dataset_config, revision), None
    refuse_version(dataset, dataset_config, revision)
    folders = {file.parent for file in files}
    return _load_files(files, split), folders.pop() if len(folders) == 1 else None


def is_inside(path: str | os.PathLike, folder: str | os.PathLike, *, follow_links: bool = True) -> bool:
    """
    Whether a path stays below `folder`.

    Args:
        path: It need not exist.
        folder: Where the path must stay. The Hub's cache, where all files of a repository are links into its folder of
            blobs, has that folder allowed, too.
        follow_links: Whether symbolic links are followed first. Without, only the path as it is written counts.
    """
    resolve = os.path.realpath if follow_links else os.path.abspath
    place, root = resolve(path), resolve(folder)
    allowed = [root]
    if follow_links and os.path.basename(os.path.dirname(root)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    return any(place.startswith(os.path.join(each, "")) for each in allowed)


def find_files(dataset: str, split: str) -> list[Path] | None:
    """The files of a split, see `load_rows`. `None` for a repository, that is a Hub id or a folder with a card."""
    if not dataset:
        raise ValueError("Name a data set: a file, a folder, a glob or a Hub id; got an empty string.")
    path = Path(dataset).expanduser()
    if path.is_file():
        files = [path]
        _warn_if_unsplit(dataset, files, split)
    elif path.is_dir():
        if any((path / name).is_file() for name in SAVED_TO_DISK):
            raise ValueError(
                f"{dataset!r} was written by `save_to_disk`: write the data set by `to_parquet` instead, and name the "
                "folder of these files."
            )
        if _has_dataset_card(path):
            return None
        files = _files_in_folder(path, split)
    elif glob.has_magic(dataset):
        files = _files_of_glob(str(path), split)
    elif path.is_absolute() or dataset.startswith(".") or path.suffix in BUILDERS or not _is_hub_id(dataset):
        raise ValueError(f"The data set {dataset!r} does not exist.")
    else:
        return None
    return files


def _load_files(files: list[Path], split: str) -> datasets.Dataset:
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= BUILDERS.keys():
        raise ValueError(f"Expected files of one kind out of {', '.join(BUILDERS)}; got {and_more(files, MAX_FILES)}.")
    builder = BUILDERS[suffixes.pop()]
    if builder == "csv":
        for file in files:
            _check_separator(file)
    # pandas would read the captions "null" and "nan" as missing.
    options = {"keep_default_na": False} if builder == "csv" else {}
    try:
        # Builders fail at a file without rows; one such shard must not spoil the rest.
        patterns = [glob.escape(os.path.abspath(file)) for file in files if not _is_empty(file)]
        if not patterns:
            return datasets.Dataset.from_dict({})
        return datasets.load_dataset(builder, data_files={_base(split): patterns}, split=split, **options)
    except Exception as error:  # each builder has its own: pyarrow's, pandas', tarfile's, UnicodeDecodeError, ...
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):  # datasets' words for no rows, as in a csv file of a header alone
            return datasets.Dataset.from_dict({})
        raise ValueError(f"{and_more(files, MAX_FILES)} cannot be read: {type(cause).__name__}: {cause}") from error


def _check_separator(file: Path) -> None:
    """Raise `ValueError` for a csv file whose header has another separator than commas."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        header = lines.readline(MAX_HEADER)
    found = [separator for separator in OTHER_SEPARATORS if separator in header]
    if found and "," not in header:
        raise ValueError(
            f"The columns of {file} are separated by {found[0]!r}: write the file again with commas, for example by "
            f"pandas.read_csv({file.name!r}, sep={found[0]!r}).to_csv({file.name!r}, index=False)."
        )


def _is_empty(file: Path) -> bool:
    return file.stat().st_size == 0 or (file.suffix == ".parquet" and pq.read_metadata(file).num_rows == 0)


def _load_repository(dataset: str, split: str, dataset_config: str | None, revision: str | None) -> datasets.Dataset:
    try:
        available = datasets.get_dataset_split_names(dataset, dataset_config, revision=revision)
    except Exception as error:  # not found, gated, offline, several configurations, ...
        raise unopened_repository(dataset, dataset_config, revision, error) from error
    if _base(split) not in available:
        raise _missing_split(dataset, split, available)
    return datasets.load_dataset(dataset, dataset_config, split=split, revision=revision)


def unopened_repository(
    dataset: str, dataset_config: str | None, revision: str | None, error: Exception
) -> ValueError:
    """The error for a repository that `datasets` cannot open; it names the configurations where one must be chosen."""
    try:
        names = datasets.get_dataset_config_names(dataset, revision=revision)
    except Exception:  # the repository itself is the problem
        names = []
    if dataset_config not in names and (len(names) > 1 or (names and dataset_config is not None)):
        got = "none is given" if dataset_config is None else f"got {dataset_config!r}"
        return ValueError(f"{dataset!r} has the configurations {', '.join(names)}: name one as dataset_config; {got}.")
    what = "data set repository" if os.path.isdir(dataset) else "path does not exist, and as a data set of the Hub it"
    at = "" if revision is None else f" at the revision {revision!r}"
    reason = shorten(" ".join(str(error).split()), 2 * MAX_TEXT)
    return ValueError(f"{dataset!r}: this {what} cannot be opened{at}: {reason}")


def _files_in_folder(folder: Path, split: str) -> list[Path]:
    metadata = {
        "train" if place == folder else place.name: place / name
        for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir()))
        for name in METADATA_FILES
        if (place / name).is_file() and is_inside(place / name, folder)
    }
    if metadata:
        if _base(split) not in metadata:
            raise _missing_split(str(folder), split, metadata)
        return [metadata[_base(split)]]
    found = _refuse_links([Path(place, name) for place, _, names in os.walk(folder) for name in names], folder)
    for suffix in BUILDERS:
        files = sorted(file for file in found if file.suffix == suffix)
        if not files:
            continue
        by_split = _group_by_split(files, folder, split) or {"train": files}
        if _base(split) not in by_split:
            raise _missing_split(str(folder), split, by_split)
        return by_split[_base(split)]
    raise ValueError(
        f"The folder {str(folder)!r} has no {' or '.join(METADATA_FILES)} with captions, and no file that ends in "
        f"{', '.join(BUILDERS)}."
    )


def _refuse_links(files: list[Path], folder: Path) -> list[Path]:
    """Drop links that lead out of the folder, as a stranger may have packed it. A file that the user names is read."""
    refused = [file for file in files if file.suffix in BUILDERS and file.is_symlink() and not is_inside(file, folder)]
    if refused:
        logger.warning(
            f"Refused {len(refused)} files of {folder}, which are links that lead out of it: "
            f"{and_more(refused, MAX_FILES)}. Name them, or the folder they lead to, if they are meant."
        )
    return [file for file in files if file not in set(refused)]


def _files_of_glob(pattern: str, split: str) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not files:
        raise ValueError(f"No file matches {pattern!r}.")
    fixed = Path(*[part for part in Path(pattern).parts[: _first_magic(pattern)]])
    by_split = _group_by_split(files, fixed, split)
    if not by_split:
        _warn_if_unsplit(pattern, files, split)
        return files
    if _base(split) not in by_split:
        raise _missing_split(pattern, split, by_split)
    return by_split[_base(split)]


def _first_magic(pattern: str) -> int:
    return next(i for i, part in enumerate(Path(pattern).parts) if glob.has_magic(part))


def _group_by_split(files: list[Path], folder: Path, split: str) -> dict[str, list[Path]]:
    """Files by the split that their path below `folder` contains. Files without one are left out."""
    names = "|".join(re.escape(name) for name in (_base(split), *COMMON_SPLITS))
    named = re.compile(rf"(?<![a-zA-Z0-9])({names})(?![a-zA-Z])")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if match := named.search(file.relative_to(folder).with_suffix("").as_posix()):
            by_split.setdefault(match[1], []).append(file)
    return by_split


def _warn_if_unsplit(dataset: str, files: list[Path], split: str) -> None:
    if _base(split) != "train" and not any(_base(split) in file.name for file in files):
        logger.warning(f"{dataset} has no splits: all of it is read as {_base(split)!r}.")


def _missing_split(dataset: str, split: str, available) -> ValueError:
    return ValueError(f"{dataset!r} has no split {_base(split)!r}; it has {', '.join(sorted(available))}.")


def _base(split: str) -> str:
    return split.split("[")[0]


def _has_dataset_card(folder: Path) -> bool:
    """Whether a folder is a Hub repository: its card then says which files belong to which split."""
    card = folder / "README.md"
    try:
        return card.is_file() and "configs" in (metadata_load(card) or {})
    except (yaml.YAMLError, ValueError) as error:
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


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
