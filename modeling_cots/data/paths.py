"""The one door for paths that come out of data: which file a path means, and whether it may be read.

Whoever wrote a data set can put any path into it. Its rows may name files of their own folder, and no others.
"""

import os
from collections.abc import Iterable, Iterator

from transformers.utils import logging

from .messages import printable, shown
from .skip_report import and_more

logger = logging.get_logger(__name__)

MAX_LINKS = 3  # named in a warning


class RefusedPathError(ValueError):
    """Raised for a path that does not mean a file inside its folder."""


def is_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """
    Whether a path stays below `folder` when all links are followed. It need not exist.

    The Hub's cache, where all files of a repository are links into its folder of blobs, has that folder allowed, too.
    """
    place, root = os.path.realpath(path), os.path.realpath(folder)
    repository, snapshots, _ = root.partition("/snapshots/")
    allowed = [root, os.path.join(repository, "blobs")] if snapshots else [root]
    return any(place.startswith(os.path.join(each, "")) for each in allowed)


def locate(path: str, root: str | os.PathLike | None) -> str:
    """
    The full path that a path of a data set means, as it is written: nothing is looked up on the disk.

    Args:
        path: As it stands in the data.
        root: The folder that it is relative to and must not leave; `None` where there is none: every path is refused.

    Raises [`RefusedPathError`].
    """
    if root is None:
        raise RefusedPathError(
            f"{shown(path)} is only the name of a file, and its data set has no one folder that paths start from"
        )
    if "\0" in path:
        raise RefusedPathError(f"{shown(path)} is no name of a file")
    folder = os.path.join(os.path.abspath(root), "")
    file = os.path.abspath(os.path.join(folder, path))
    if not file.startswith(folder):
        raise RefusedPathError(f"{shown(path)} leads out of {folder!r}; it must stay inside")
    return file


def open_door(path: str, root: str | os.PathLike | None) -> str:
    """
    The file that a path of a data set means, to be read now.

    Folders may be links, as `ln -s /disk/train2014 COCO/` makes them. A file may only be a link to where its own
    folder or `root` is. A file that is not there is left to its reader.

    Args:
        path, root: See `locate`.

    Raises [`RefusedPathError`] for a path that leaves the folder, a link that leads out, and what is no plain file.
    """
    file = locate(path, root)
    assert root is not None
    if not (is_inside(file, root) or is_inside(file, os.path.realpath(os.path.dirname(file)))):
        raise RefusedPathError(
            f"{printable(file)} is a link that leads out of its folder: put the file itself, or a link to its folder, "
            "in its place"
        )
    if os.path.exists(file) and not os.path.isfile(file):  # reading a pipe or a device would never end
        raise RefusedPathError(f"{printable(file)} is no plain file")
    return file


def report_linked_folders(files: Iterable[str], root: str | os.PathLike) -> None:
    """Warn of the folders that are links out of `root`, with where they lead: files in them are read from there."""
    places = {os.path.dirname(file) for file in files}
    home = os.path.realpath(root)
    linked = sorted(place for place in places if not (os.path.realpath(place) == home or is_inside(place, root)))
    if linked:
        leads = [f"{printable(place)} to {printable(os.path.realpath(place))}" for place in linked]
        logger.warning(
            f"Follows {len(linked)} linked folders out of {printable(str(root))}: {and_more(leads, MAX_LINKS)}."
        )


def walk_visible(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """
    Each folder from `folder` on down with the sorted names of its files, without hidden files and folders.

    Linked folders are followed, but no folder is entered twice, so that links in a circle come to an end.
    """
    seen: set[str] = set()
    for place, folders, names in os.walk(os.fspath(folder), followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield place, sorted(name for name in names if not name.startswith("."))
