"""Data set repositories: Hub ids, and folders with a card that says which files belong to which split."""

import os
from pathlib import Path

import datasets
from huggingface_hub import snapshot_download

from .files import METADATA_FILES
from .messages import MAX_TEXT, shorten
from .revisions import refuse_version
from .sources import use_cache_if_unreachable
from .splits import MissingSplitError

HUB = "hf://"
# Builders of `datasets` whose files our own reader reads.
OUR_BUILDERS = ("parquet", "webdataset", "json", "csv")


def open_builder(
    dataset: str, dataset_config: str | None = None, revision: str | None = None, cached: Path | None = None
):
    """
    What `datasets` knows of a repository: its format, and the files of each split. Nothing else is downloaded.

    Args:
        dataset: A Hub id, or a folder with a card.
        dataset_config: One of several configurations.
        revision: Branch, tag or commit of a Hub id.
        cached: The folder of a Hub id in the cache, to be opened in place of the Hub's.

    Raises `ValueError` for a repository that cannot be opened: not found, gated, offline, several configurations, ...
    """
    if os.path.isdir(dataset):
        refuse_version(dataset, revision=revision)
    elif cached is None:
        use_cache_if_unreachable(f"the data set {dataset}")
    source = dataset if cached is None else str(cached)
    try:
        return datasets.load_dataset_builder(source, dataset_config, revision=revision if cached is None else None)
    except Exception as error:
        raise _unopened(dataset, dataset_config, revision, source, error) from error


def _unopened(
    dataset: str, dataset_config: str | None, revision: str | None, source: str, error: Exception
) -> ValueError:
    """The error for a repository that `datasets` cannot open; it names the configurations where one must be chosen."""
    try:
        names = datasets.get_dataset_config_names(source, revision=revision)
    except Exception:  # the repository itself is the problem
        names = []
    if dataset_config not in names and (len(names) > 1 or (names and dataset_config is not None)):
        got = "none is given" if dataset_config is None else f"got {dataset_config!r}"
        return ValueError(f"{dataset!r} has the configurations {', '.join(names)}: name one as dataset_config; {got}.")
    what = "data set repository" if os.path.isdir(source) else "path does not exist, and as a data set of the Hub it"
    at = "" if revision is None else f" at the revision {revision!r}"
    reason = shorten(" ".join(str(error).split()), 2 * MAX_TEXT)
    return ValueError(f"{dataset!r}: this {what} cannot be opened{at}: {reason}")


def files_of_split(builder, dataset: str, split: str) -> list[str]:
    """The paths or hf:// addresses of the files of a split. Raises `ValueError` for a split that is not there."""
    files = {str(name): list(map(str, found)) for name, found in (builder.config.data_files or {}).items()}
    if split not in files:
        raise MissingSplitError.of(dataset, split, files)
    return files[split]


def readable_files(builder, files: list[str]) -> list[str] | None:
    """Those of a split's files that our own reader reads, with images beside them or inside; `None` if it cannot."""
    if builder.name in OUR_BUILDERS:
        return files
    metadata = [file for file in files if file.rpartition("/")[2] in METADATA_FILES]
    return metadata if builder.name in ("imagefolder", "videofolder") and metadata else None


def download(dataset: str, revision: str | None, files: list[str]) -> tuple[Path, list[Path]]:
    """
    Put files of a Hub data set, and the card, into the Hub's cache.

    Args:
        dataset: The Hub id.
        revision: Branch, tag or commit.
        files: Addresses: hf://datasets/OWNER/NAME@COMMIT/PATH.

    Returns the folder of the repository in the cache, and the files in it.
    """
    names = [file.partition("@")[2].partition("/")[2] for file in files]
    patterns = [name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") for name in names]
    folder = snapshot_download(
        dataset, repo_type="dataset", revision=revision, allow_patterns=[*patterns, "README.md"]
    )
    return Path(folder), [Path(folder, name) for name in names]


def cached_repository(dataset: str, revision: str | None) -> Path | None:
    """The folder of a Hub data set in the cache, as an earlier `download` left it; `None` without one."""
    try:
        return Path(snapshot_download(dataset, repo_type="dataset", revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or no valid name
        return None
