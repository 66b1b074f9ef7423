"""`atomic_write`: a file that is there is whole; a reader, or a crash at any moment, sees the old or the new one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    A path beside `path` to write to; when the block ends, its bytes are flushed to the disk and renamed to `path`.

    Where the block raises, the partial file is removed and `path` is as it was. After a crash or a full disk what is
    left ends in `.partial`, and the next write to the same path replaces it.

    Args:
        path: The file to write or to replace; its folder exists.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)  # the rename itself


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until the bytes of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
