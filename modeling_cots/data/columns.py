"""What data sets of images and of videos share: checking all paths at once, dropping items without a caption."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from transformers.utils import logging

from .messages import shown
from .paths import RefusedPathError, locate, report_linked_folders
from .skip_report import and_more

logger = logging.get_logger(__name__)

MAX_NAMES = 10  # in one warning
Item = TypeVar("Item")


def check_inside(paths: Iterable[str], root: str | os.PathLike, kind: str) -> dict[str, str]:
    """
    The full path for each path of a data set's metadata, which could name any file of this machine.

    Links are not followed here but by `open_door`, where a file is read: one that leads out is no reason to refuse all
    others. A warning names linked folders, which are followed.

    Args:
        paths: Relative to `root`.
        root: The folder that no path may leave.
        kind: "image" or "video", for the message.

    Raises `ValueError` for a path that leaves the folder.
    """
    try:
        files = {path: locate(path, root) for path in paths}
    except RefusedPathError as error:
        raise ValueError(f"The {kind} path {error}.") from error
    report_linked_folders(files.values(), root)
    return files


def check_any_exists(files: dict[str, str], root: str | os.PathLike, kind: str) -> None:
    """Raise `ValueError` where none of the files of `check_inside` exists. Single missing ones are no error."""
    if files and not any(os.path.exists(file) for file in files.values()):
        first, folder = next(iter(files)), os.path.join(os.path.abspath(Path(root)), "")
        raise ValueError(
            f"None of the {len(files)} {kind}s exists: {shown(first)}, for one, is not in {folder!r}; {_cure(first)}."
        )


def _cure(path: str) -> str:
    """What to do about a path that leads nowhere."""
    if re.match(r"\w\w+:/", path):  # of https://host, normalizing a path leaves one bar
        return "download what the addresses name, for example by img2dataset, and open its folder"
    if "\\" in path:
        return "write / in place of \\"
    return "move the files there, or mend their paths, which are relative to that folder"


def drop_uncaptioned(
    items: Sequence[Item], num_captions: Sequence[int], name_of: Callable[[Item], str], kind: str
) -> list[Item]:
    """
    The items that have a caption, in their order; a warning counts and names the others.

    Args:
        items: N items.
        num_captions: The number of captions of each.
        name_of: Gives the name of an item.
        kind: "image" or "video", for the warning.
    """
    kept = [item for item, count in zip(items, num_captions, strict=True) if count > 0]
    if len(kept) < len(items):
        without = [name_of(item) for item, count in zip(items, num_captions, strict=True) if count == 0]
        shown = and_more(without, MAX_NAMES)
        logger.warning(f"Left out {len(without)} of {len(items)} {kind}s, which have no caption: {shown}.")
    return kept
