"""Reads WebDataset shards as they arrive: turns a tar stream of any length into samples, in bounded memory.

`tarfile` and the WebDataset builder of `datasets` do not suffice. Both take a shard for whole that ends between two
members or whose next header is damaged, and both read names and extended headers of any length into memory. The
content of a shard is never written to a disk or unpacked, and its names are never opened.
"""

import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
ENCODING, ERRORS = "utf-8", "surrogateescape"
MAX_MEMBER_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 2**16  # of a member's long name or extended header
CHUNK = 2**20

FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
REFUSED_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
TYPES_WITHOUT_DATA = set(REFUSED_TYPES) - {tarfile.GNUTYPE_SPARSE}


class DamagedShardError(ValueError):
    """Raised where a shard ends too early or is no tar archive any more. The samples before that are sound."""


class Member(NamedTuple):
    """One file of a shard: its name, and its content or the reason why it is refused."""

    name: str
    content: bytes | None
    refusal: str | None = None


def read_members(stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[Member]:
    """
    The files of an uncompressed tar stream, in order. Directories and files that are not wanted are skipped.

    Links, devices, pipes, sparse files, names that are absolute or contain "..", and files over 64 MiB are refused.

    Args:
        stream: Opened for reading bytes; it need not seek.
        wanted: Whether a file of this name is to be read.

    Raises [`DamagedShardError`] where the archive ends without its end mark, or is no archive.
    """
    long_name = None
    while (header := _read_header(stream)) is not None:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = _read_small(stream, header.size).rstrip(b"\0").decode(ENCODING, ERRORS)
            continue
        if header.type in PAX_TYPES:
            long_name = _read_pax(_read_small(stream, header.size)).get("path", long_name)
            continue
        if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):  # about all members; the target of a link
            _pass_over(stream, header.size)
            continue
        name = header.name if long_name is None else long_name
        long_name = None
        if header.type == tarfile.DIRTYPE:
            continue
        refusal = _refusal(header, name)
        if refusal is None and wanted(name):
            content = _read_exactly(stream, header.size)
            _pass_over(stream, 0, -header.size % BLOCK)
            yield Member(name, content)
            continue
        _pass_over(stream, 0 if header.type in TYPES_WITHOUT_DATA else header.size)
        if refusal is not None:
            yield Member(name, None, refusal)


def gather_samples(members: Iterable[Member]) -> Iterator[tuple[dict[str, bytes | str], list[Member]]]:
    """
    The samples of a WebDataset shard: neighboring files whose names agree up to the first dot of the file name.

    Args:
        members: The files to take, in their order.

    Yields a dict {"__key__": name up to that dot, extension: bytes}, and the members refused since the last sample.
    Raises [`DamagedShardError`] as `read_members` does, after the last whole sample.
    """
    sample: dict[str, bytes | str] = {}
    refused: list[Member] = []
    for member in members:
        if member.content is None:
            refused.append(member)
            continue
        key, extension = key_of(member.name)
        if sample and sample["__key__"] != key:
            yield sample, refused
            sample, refused = {}, []
        if extension in sample:
            refused.append(Member(member.name, None, "a second file of this name in its sample"))
            continue
        sample["__key__"] = key
        sample[extension] = member.content
    if sample or refused:
        yield sample, refused


def key_of(name: str) -> tuple[str, str]:
    """
    The sample and the field of a file: "a/b.seg.JPG" -> ("a/b", "seg.jpg").

    Hidden files, such as macOS adds, get no field, and are not read.
    """
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, _, extension = base.partition(".")
    if base.startswith((".", "__")):
        return name, ""
    return posixpath.join(folder, stem), extension.lower()


def _refusal(header: tarfile.TarInfo, name: str) -> str | None:
    if header.type in REFUSED_TYPES:
        return REFUSED_TYPES[header.type]
    if header.type not in FILE_TYPES:
        return f"of the unknown type {header.type!r}"
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return "an absolute path"
    if ".." in name.replace("\\", "/").split("/"):
        return "a path that climbs out with '..'"
    if header.size > MAX_MEMBER_BYTES:
        return f"of {header.size:,} bytes, more than the {MAX_MEMBER_BYTES:,} that one file may have"
    return None


def _read_header(stream: BinaryIO) -> tarfile.TarInfo | None:
    """The next header; `None` at the end mark, which is a block of zeros."""
    block = _read_exactly(stream, BLOCK)
    try:
        header = tarfile.TarInfo.frombuf(block, ENCODING, ERRORS)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        raise DamagedShardError(f"no tar archive from here on: {error}") from error
    if header.size < 0:
        raise DamagedShardError(f"a member of {header.size} bytes")
    return header


def _read_pax(records: bytes) -> dict[str, str]:
    """ "27 path=a/long/name.jpg\\n..." -> {"path": ...}: each record begins with its own length."""
    fields = {}
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(records):
            raise DamagedShardError("a damaged extended header")
        key, _, value = records[len(length) + 1 : int(length)].rstrip(b"\n").partition(b"=")
        fields[key.decode(ENCODING, ERRORS)] = value.decode(ENCODING, ERRORS)
        records = records[int(length) :]
    if "size" in fields:
        raise DamagedShardError("a member of 8 GiB or more")
    return fields


def _read_small(stream: BinaryIO, size: int) -> bytes:
    if size > MAX_HEADER_BYTES:
        raise DamagedShardError(f"an extended header of {size:,} bytes")
    content = _read_exactly(stream, size)
    _pass_over(stream, 0, -size % BLOCK)
    return content


def _pass_over(stream: BinaryIO, size: int, padding: int | None = None) -> None:
    """Skip `size` bytes and the padding to a whole block."""
    left = size + (-size % BLOCK if padding is None else padding)
    while left > 0:
        left -= len(_read_exactly(stream, min(left, CHUNK)))


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    parts, left = [], size
    while left > 0:
        part = stream.read(min(left, CHUNK))
        if not part:
            raise DamagedShardError("it ends too early")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
