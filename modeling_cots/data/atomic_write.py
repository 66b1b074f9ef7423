"""`atomic_write`: writes a file beside its place and renames it, so that no reader and no crash meets half of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL_SUFFIX = ".partial"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a path beside `path` to write to. When the block ends, the file is flushed to the disk and renamed to `path`.

    Where the block raises, the partial file is removed and `path` stays as it was. A process that is killed leaves a
    file that ends in `.partial`; the next write to the same path replaces it.

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
