"""What data sets of images and of videos share: finding columns, checking paths, dropping items without a caption."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import datasets
from transformers.utils import logging

from .files import is_inside
from .messages import shown
from .rows import first_available
from .skip_report import and_more

logger = logging.get_logger(__name__)

MAX_NAMES = 10  # in one warning
MAX_PATH = 4_096  # the longest path of Linux
ENCODED = ("data:", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how data URLs, JPEG, PNG, GIF and WebP begin in base64
Item = TypeVar("Item")


def find_column(rows: datasets.Dataset, wanted: str | None, usual: Sequence[str], kind: str) -> str:
    """
    The column to read: the wanted one, or else the first of the usual ones that the table has.

    Args:
        rows: The table.
        wanted: What the user named, if anything.
        usual: Names to try otherwise, in order.
        kind: "image", "video" or "caption", for the messages.

    Raises `ValueError` where the table has no such column, and names those that it has.
    """
    column = first_available(rows.column_names, wanted, usual)
    if column is not None:
        return column
    available = ", ".join(rows.column_names)
    if wanted is not None:
        raise ValueError(f"There is no {kind} column {wanted!r}; there are {available}.")
    raise ValueError(f"Name the {kind} column: it is none of {', '.join(usual)}, and there are {available}.")


def check_inside(paths: Iterable[str], root: str | os.PathLike, kind: str) -> dict[str, str]:
    """
    The full path for each path of a data set's metadata, which could name any file of this machine.

    Links are not followed here but where a file is read: one that leads out is no reason to refuse all others.

    Args:
        paths: Relative to `root`.
        root: The folder that no path may leave.
        kind: "image" or "video", for the message.

    Raises `ValueError` for a path that leaves the folder.
    """
    folder = os.path.join(os.path.abspath(Path(root)), "")
    paths = list(paths)
    for path in paths:
        if len(path) > MAX_PATH or path.startswith(ENCODED):
            raise ValueError(
                f"The {kind}s are encoded in a text ({shown(path)}), which is no path: decode them, for example by "
                "base64.b64decode, and store them as bytes in a column of a parquet file."
            )
    files = {path: os.path.abspath(os.path.join(folder, path)) for path in paths}
    for path, file in files.items():
        if not is_inside(file, folder, follow_links=False):
            raise ValueError(f"The {kind} path {shown(path)} leads out of {folder!r}; it must stay inside.")
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
