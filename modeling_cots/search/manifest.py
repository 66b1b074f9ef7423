"""The manifest of a local search index, index.json: one generation of the index, with a checksum of every file.

Files of an index are never changed: a writer adds files with new names, writes the manifest last, and removes what the
new manifest does not list. Whoever holds an older generation sees another manifest at the next call. What the files
hold is in `rows.py` and `faiss_vectors.py`.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from ..data.atomic_write import atomic_write

MANIFEST = "index.json"
EIGHT_DIGITS = "[0-9]" * 8  # a generation in the name of a file, for `glob`
LAYOUT = 3  # of the folder; 1 had no manifest, 2 had row ids of 63 bits


class DamagedIndexError(ValueError):
    """A file of an index is missing, or its bytes are not those that were written; says which, and what to do."""


class MissingFileError(DamagedIndexError):
    """A file of an index is missing: the index is damaged, or a newer generation has replaced it."""


class WrittenPart(NamedTuple):
    """A part on the disk: its files with their bytes and CRC-32, the columns that conditions look at, and the names of
    the parts whose rows it has in place of them."""

    name: str
    num_rows: int
    files: dict[str, tuple[int, int]]
    looked_at: pa.Schema
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """
    One generation of an index.

    Args:
        generation: Counts the manifests that were written.
        info: What `FaissStore.create` was given, with the index type as `engine`.
        parts: Names of the parts of the rows, in order, each with its number of rows.
        deleted: The file with the positions of deleted rows; `None` if there are none.
        vectors: The file of the vectors' index; `None` before it is built.
        thresholds: The file of the binary codes' thresholds; `None` for other index types.
        num_vectors: How many rows the vectors' index covers: the first ones.
        removed: The file with the ids of all entries that were ever deleted; `None` if there are none.
        unfinished: The runs that have begun to add and have not ended, by their sources; see `VectorStore.adding`.
        files: Every file of the index, with its number of bytes and its CRC-32.
    """

    generation: int
    info: dict
    parts: tuple[tuple[str, int], ...] = ()
    deleted: str | None = None
    vectors: str | None = None
    thresholds: str | None = None
    num_vectors: int = 0
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    removed: str | None = None
    unfinished: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(num_rows for _, num_rows in self.parts)

    def with_files(self, files: dict[str, tuple[int, int]], **changes) -> "Manifest":
        """This manifest with more files and other values, and without the files that these values replace."""
        changed = replace(self, **changes)
        before = {self.deleted, self.vectors, self.thresholds, self.removed}
        replaced = before - {changed.deleted, changed.vectors, changed.thresholds, changed.removed}
        kept = {name: stored for name, stored in self.files.items() if name not in replaced}
        return replace(changed, files={**kept, **files})

    def with_parts(self, parts: Sequence[WrittenPart]) -> "Manifest":
        """This manifest with more parts."""
        files = {name: stored for part in parts for name, stored in part.files.items()}
        return self.with_files(files, parts=(*self.parts, *((part.name, part.num_rows) for part in parts)))

    def with_merged(self, part: WrittenPart) -> "Manifest":
        """This manifest with one part in place of those that it replaces, which stand one after the other."""
        place = [name for name, _ in self.parts].index(part.replaces[0])
        end = place + len(part.replaces)
        assert [name for name, _ in self.parts[place:end]] == list(part.replaces)
        parts = (*self.parts[:place], (part.name, part.num_rows), *self.parts[end:])
        gone = {f"{name}.arrow" for name in part.replaces} | {f"metadata/{name}.parquet" for name in part.replaces}
        kept = {name: stored for name, stored in self.files.items() if name not in gone}
        return replace(self, parts=parts, files={**kept, **part.files})

    def write(self, folder: Path) -> None:
        """Make this the generation of the index; every file that it lists is complete and on the disk."""
        content = {"layout": LAYOUT, **asdict(self)}
        with atomic_write(folder / MANIFEST) as partial:
            partial.write_text(json.dumps({**content, "checksum": _checksum_of(content)}, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> bytes:
    """The bytes of the manifest; they differ between generations.

    Raises `ValueError` where there is no index, and `DamagedIndexError` where it has lost its manifest.
    """
    path = folder / MANIFEST
    try:
        return path.read_bytes()
    except FileNotFoundError:
        if holds_rows(folder):
            raise MissingFileError(_damaged(path, "is missing")) from None
        raise ValueError(f"There is no index in {str(folder)!r}: make one with `cots-search index`.") from None
    except OSError as error:
        raise ValueError(f"The index {str(folder)!r} cannot be read: {error}.") from error


def parse_manifest(raw: bytes, folder: Path) -> Manifest:
    """The manifest that `write` wrote. Raises `DamagedIndexError` for other bytes."""
    path = folder / MANIFEST
    try:
        content = json.loads(raw)
        layout, checksum = content.pop("layout", 1), content.pop("checksum", None)
    except (ValueError, AttributeError, RecursionError):
        raise DamagedIndexError(_damaged(path, "is damaged")) from None
    if checksum is None and content.get("format") == 1:
        raise _made_by_older(folder, "whose files have no checksums")
    if checksum != _checksum_of({"layout": layout, **content}):
        raise DamagedIndexError(_damaged(path, "is damaged"))
    if layout < LAYOUT:
        raise _made_by_older(folder, "whose ids of two images could be the same")
    if layout > LAYOUT:
        raise ValueError(f"The index {str(folder)!r} was made by a newer version: update modeling_cots.")
    content["parts"] = tuple((name, num_rows) for name, num_rows in content["parts"])
    content["files"] = {name: (size, checksum) for name, (size, checksum) in content["files"].items()}
    return Manifest(**content)


def holds_rows(folder: Path) -> bool:
    """Whether a folder has parts of an index, with or without a manifest."""
    return folder.is_dir() and any(folder.glob(f"data-{EIGHT_DIGITS}-*.arrow"))


def describe_file(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file, as the manifest lists them."""
    return describe_bytes(_map(path))


def describe_bytes(content: pa.Buffer) -> tuple[int, int]:
    """Their number and CRC-32, as the manifest lists them."""
    return content.size, zlib.crc32(content)


def open_file(folder: Path, name: str, stored: tuple[int, int]) -> pa.Buffer:
    """
    Map a file of an index into memory, where it stays after a later generation has removed it.

    Its size is checked here, and its bytes by `check_bytes`, because some files are large. Raises `DamagedIndexError`.
    """
    path = folder / name
    try:
        content = _map(path)
    except FileNotFoundError:
        raise MissingFileError(_damaged(path, "is missing")) from None
    except OSError as error:
        raise DamagedIndexError(_damaged(path, f"cannot be read ({error})")) from error
    if content.size != stored[0]:
        raise DamagedIndexError(_damaged(path, f"is damaged: it has {content.size:,} bytes instead of {stored[0]:,}"))
    return content


def check_bytes(content: pa.Buffer, folder: Path, name: str, stored: tuple[int, int]) -> None:
    """Raise `DamagedIndexError` unless these are the bytes that were written."""
    if zlib.crc32(content) != stored[1]:
        raise DamagedIndexError(_damaged(folder / name, "is damaged: its bytes are not those that were written"))


def checked_bytes(folder: Path, name: str, stored: tuple[int, int]) -> pa.Buffer:
    """`open_file` and `check_bytes` in one, for a file that is read whole."""
    content = open_file(folder, name, stored)
    check_bytes(content, folder, name, stored)
    return content


def _map(path: Path) -> pa.Buffer:
    if os.path.getsize(path) == 0:  # cannot be mapped
        return pa.py_buffer(b"")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _made_by_older(folder: Path, fault: str) -> ValueError:
    return ValueError(
        f"The index {str(folder)!r} was made by an older version, {fault}: make a new one, under another name, with "
        "`cots-search index`."
    )


def _damaged(path: Path, fault: str) -> str:
    if path.name.startswith(("vectors-", "thresholds-")):
        cure = f"`cots-search rebuild {path.parent}` makes it again from the rows"
    else:
        cure = "restore it from a copy, or remove the folder and make the index again with `cots-search index`"
    return f"{str(path)!r} {fault}: {cure}."


def _checksum_of(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
