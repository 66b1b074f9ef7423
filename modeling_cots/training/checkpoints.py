"""Committed checkpoints: a manifest, written last, lists every file of the folder with its size and checksum.

A folder without a manifest, or whose files differ from it, is invalid: it is never resumed from. The manifest also
numbers the saves of a folder, so that the order of its checkpoints depends on no clock. `run_id.txt`, written first,
says which run a folder is of: no run deletes or overwrites what another one has written. What a checkpoint holds is
the trainer's business.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

from transformers.utils import logging

from ..data.atomic_write import atomic_write, flush_to_disk

logger = logging.get_logger(__name__)

MANIFEST_NAME = "checkpoint_manifest.json"
RUN_NAME = "run_id.txt"
WITHOUT_ID = ""  # the run of all checkpoints that 0.1 has written
CHUNK_BYTES = 1 << 22


def commit_checkpoint(folder: str | os.PathLike, num_processes: int) -> None:
    """
    Write the manifest of a folder whose files are complete; they are flushed to the disk before it.

    From then on it is the newest checkpoint beside its siblings, whatever steps they are of: a run that went back to
    an earlier checkpoint, or was started anew, saves lower steps later.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME):
        flush_to_disk(path)
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _checksum(path)]
    number = 1 + max((_order(sibling)[0] for sibling in _checkpoints(folder.parent)), default=0)
    manifest = {"save_number": number, "num_processes": num_processes, "files": files}
    with atomic_write(folder / MANIFEST_NAME) as partial:
        partial.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush_to_disk(folder.parent)


def begin_checkpoint(folder: str | os.PathLike, run_id: str) -> None:
    """Make a folder for a checkpoint of a run, or take one of it again: to be called before any file of it changes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    invalidate_checkpoint(folder)
    (folder / RUN_NAME).write_text(run_id, encoding="utf-8")


def run_of(folder: str | os.PathLike) -> str:
    """The id of the run that has written a checkpoint, also a half-written one; `WITHOUT_ID` where nobody says."""
    try:
        return (Path(folder) / RUN_NAME).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return WITHOUT_ID


def unfinished_run(output_dir: str | os.PathLike) -> str | None:
    """The run that was stopped in its first save: the one that half-written checkpoints are of, if it is one."""
    half_written = (folder for folder in _checkpoints(output_dir) if not (folder / MANIFEST_NAME).is_file())
    runs = {run_of(folder) for folder in half_written} - {WITHOUT_ID}
    return runs.pop() if len(runs) == 1 else None


def set_aside(output_dir: str | os.PathLike, run_id: str) -> None:
    """Move the checkpoints of other runs to a sub-folder, where this run neither finds nor deletes them."""
    others = [folder for folder in _checkpoints(output_dir) if run_of(folder) != run_id]
    if not others:
        return
    number = 1
    while (aside := Path(output_dir) / f"other_run_{number}").exists():
        number += 1
    aside.mkdir()
    for folder in others:
        folder.rename(aside / folder.name)
    logger.warning(
        f"Moved {len(others)} checkpoints of another run to {aside}: {', '.join(folder.name for folder in others)}."
    )


def invalidate_checkpoint(folder: str | os.PathLike) -> None:
    """Remove the manifest, if there is one; to be called before any file of the folder changes."""
    (Path(folder) / MANIFEST_NAME).unlink(missing_ok=True)


def check_checkpoint(folder: str | os.PathLike) -> dict:
    """The manifest of a whole checkpoint; raises `ValueError`, with the reason, for any other folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder}.")
    if not (folder / MANIFEST_NAME).is_file():
        raise ValueError(
            f"{folder} has no {MANIFEST_NAME}, which is written last: the run was stopped while it saved this "
            "checkpoint, or it is none of COTSTrainer."
        )
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST_NAME} is damaged: {error!r}.") from error
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} has no {name}, which belongs to this checkpoint.")
        if path.stat().st_size != size:
            raise ValueError(f"{path} is damaged: it has {path.stat().st_size:,} bytes and was saved with {size:,}.")
        if _checksum(path) != checksum:
            raise ValueError(f"{path} is damaged: its bytes are not those that were saved.")
    return manifest


def latest_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint that was written last, or `None`; invalid ones are named in the log and stay."""
    candidates = sorted(_checkpoints(output_dir), key=_order, reverse=True)
    for folder in candidates:
        try:
            check_checkpoint(folder)
        except ValueError as error:
            logger.warning(f"Skipped an invalid checkpoint. {error}")
        else:
            return str(folder)
    return None


def choose_checkpoint(wanted: str | bool | None, output_dir: str) -> str | None:
    """
    What to resume from.

    Args:
        wanted: A checkpoint folder; "latest": the newest whole one of `output_dir`, or `None` where there is none;
            `True`: the same, but there must be one; `None` or `False`: nothing.
        output_dir: Of the run.

    Raises `ValueError` for a folder that is not a whole checkpoint.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == "latest":
        found = latest_checkpoint(output_dir)
        if found is None and wanted is True:
            raise ValueError(f"There is no whole checkpoint in {output_dir} to resume from.")
        return found
    try:
        check_checkpoint(wanted)
    except ValueError as error:
        other = latest_checkpoint(os.path.dirname(os.path.abspath(wanted)))
        hint = "There is no whole one beside it." if other is None else f"The newest whole one beside it is {other}."
        raise ValueError(f"{error} {hint}") from error
    return str(wanted)


def rotate_checkpoints(
    output_dir: str | os.PathLike, limit: int | None, best: str | None = None, run_id: str = WITHOUT_ID
) -> None:
    """Delete the oldest checkpoints of a run beyond `limit`; never the one written last, nor `best`.

    Only whole ones count: an invalid one never displaces the only one to resume from.
    """
    if limit is None or limit <= 0:
        return
    folders = sorted((folder for folder in _checkpoints(output_dir) if run_of(folder) == run_id), key=_order)
    whole = [folder for folder in folders if (folder / MANIFEST_NAME).is_file()]
    if not whole:
        return
    best = None if best is None else os.path.abspath(best)
    kept = {whole[-1]} | {folder for folder in whole if os.path.abspath(folder) == best}
    for folder in reversed(whole):
        if len(kept) < limit:
            kept.add(folder)
    # Without an id, a folder that is not whole may be of any program.
    for folder in whole if run_id == WITHOUT_ID else folders:
        if folder not in kept:
            _delete(folder)


def _delete(folder: Path) -> None:
    """What is left of a deletion that is cut short is no checkpoint, and says whose it was."""
    invalidate_checkpoint(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != RUN_NAME:
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    if not os.path.isdir(output_dir):
        return []
    return [
        path for path in Path(output_dir).iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]


def _order(folder: Path) -> tuple[int, int]:
    """Sorts checkpoints by age: by the number of the save, then by the step. Those without a manifest are oldest."""
    step = int(folder.name.rpartition("-")[2])
    try:
        return int(json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["save_number"]), step
    except (OSError, ValueError, KeyError, TypeError):  # manifests of 0.1 have no number
        return 0, step


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
