"""`check_output_dir`: nothing that stands in the folder of a run is written over, unless its user says so."""

import os
import re
from pathlib import Path

from ..data.skip_report import and_more
from ..training.arguments import COTSTrainingArguments
from ..training.checkpoints import latest_checkpoint
from ..training.recovery import LOCK_NAME

MAX_NAMES = 3  # in a message
# What a run leaves that was stopped before its first checkpoint was whole; what it moves aside; TensorBoard's logs; an
# image tokenizer that it has fitted.
LEFT_BEHIND = r"checkpoint-\d+|other_run_\d+|runs|image_tokenizer"


def check_output_dir(args: COTSTrainingArguments, overwrite: bool) -> None:
    """
    Raise `ValueError` for an `output_dir` that is not empty, unless a run in it goes on, and for one without access.

    Args:
        args: Of the run. A run goes on by a checkpoint in `output_dir`, or by "latest", also where it was stopped
            before it had one.
        overwrite: Whether the user wants the folder to be written into as it is.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file: name a folder.")
    wanted = args.resume_from_checkpoint
    if wanted not in (None, "latest") and not os.path.isdir(wanted):
        raise ValueError(
            f"There is no checkpoint {wanted} to go on from; `latest` means the newest one of output_dir."
        )
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"Nothing can be written to output_dir={folder}: {place} is read-only for you.")
    if overwrite or not folder.is_dir():
        return
    names = sorted(name for name in os.listdir(folder) if name != LOCK_NAME and not name.startswith("."))
    if not names or (wanted is not None and _goes_on(wanted, folder, names, args.filter_log)):
        return
    go_on = "go on with its run by --resume_from_checkpoint latest, "
    has_checkpoint = any(name.startswith("checkpoint-") for name in names)
    raise ValueError(
        f"output_dir={folder} is not empty, it holds {and_more(names, MAX_NAMES)}: choose another folder, "
        f"{go_on if wanted is None and has_checkpoint else ''}or write over what is there with --overwrite_output_dir."
    )


def _goes_on(wanted: str, folder: Path, names: list[str], filter_log: str | None) -> bool:
    """Whether a run in `folder` is resumed; `names` are what it holds."""
    if wanted != "latest":
        return folder.resolve() in Path(wanted).resolve().parents
    if latest_checkpoint(folder) is not None:
        return True
    log = None if filter_log is None else Path(filter_log).resolve()
    return all(re.fullmatch(LEFT_BEHIND, name) or (folder / name).resolve() == log for name in names)
