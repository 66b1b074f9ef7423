"""What data sets of images and of videos share: the choice of columns, the check of paths, the need of a caption."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import datasets
from transformers.utils import logging

from .skip_report import and_more

logger = logging.get_logger(__name__)

MAX_NAMES = 10
Item = TypeVar("Item")


def find_column(rows: datasets.Dataset, wanted: str | None, usual: Sequence[str], kind: str) -> str:
    """
    The column that was asked for, or the first usual one that is there.

    Args:
        wanted: Its name, or `None`.
        usual: Names to try, in order.
        kind: What it holds, in messages.

    Raises `ValueError` where there is none, with the columns that there are.
    """
    available = ", ".join(rows.column_names)
    if wanted is not None and wanted not in rows.column_names:
        raise ValueError(f"There is no {kind} column {wanted!r}; there are {available}.")
    found = [wanted] if wanted is not None else [name for name in usual if name in rows.column_names]
    if not found:
        raise ValueError(f"Name the {kind} column: it is none of {', '.join(usual)}, and there are {available}.")
    return found[0]


def check_inside(paths: Sequence[str], root: str | os.PathLike, kind: str) -> dict[str, str]:
    """
    The full path of each path of the data; metadata from elsewhere could name any file of this machine.

    Raises `ValueError` for a path that leaves `root`, and where none of the files exists.
    """
    folder = os.path.join(os.path.abspath(Path(root)), "")
    files = {path: os.path.abspath(os.path.join(folder, path)) for path in paths}
    for path, file in files.items():
        if not file.startswith(folder):
            raise ValueError(f"The {kind} path {path!r} leads out of {folder!r}; it must stay inside.")
    if files and not any(os.path.exists(file) for file in files.values()):
        first = next(iter(files))
        raise ValueError(f"None of the {len(files)} {kind}s exists: {first!r}, for one, is not in {folder!r}.")
    return files


def drop_uncaptioned(
    items: Sequence[Item], num_captions: Sequence[int], name_of: Callable[[Item], str], kind: str
) -> list[Item]:
    """The items that have a caption; the others are counted and named in the log."""
    kept = [item for item, count in zip(items, num_captions, strict=True) if count > 0]
    if len(kept) < len(items):
        without = [name_of(item) for item, count in zip(items, num_captions, strict=True) if count == 0]
        shown = and_more(without, MAX_NAMES)
        logger.warning(f"Left out {len(without)} of {len(items)} {kind}s, which have no caption: {shown}.")
    return kept
