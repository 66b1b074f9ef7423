"""Shards for the tests of streams: small images in whole and damaged tar files, and a server that serves them."""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

from loopback import serve
from PIL import Image


def png(number: int, size: int = 4) -> bytes:
    """An image that no other number has."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256 % 256, 20)).save(file, "PNG")
    return file.getvalue()


def tar_bytes(members: list[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return file.getvalue()


def sample_members(number: int, as_json: bool = False) -> list[tuple[str, bytes]]:
    caption = f"caption {number}"
    text = ("json", json.dumps({"caption": caption}).encode()) if as_json else ("txt", caption.encode())
    return [(f"{number:05d}.png", png(number)), (f"{number:05d}.{text[0]}", text[1])]


def shard_bytes(numbers) -> bytes:
    return tar_bytes([member for number in numbers for member in sample_members(number)])


def write_shards(folder: Path, sizes: list[int]) -> list[Path]:
    """Write train-000.tar and so on, with the given numbers of samples, which are counted through."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, first = [], 0
    for shard, size in enumerate(sizes):
        paths.append(folder / f"train-{shard:03d}.tar")
        paths[-1].write_bytes(shard_bytes(range(first, first + size)))
        first += size
    return paths


def number_of(item: dict) -> int:
    """The number of the sample that an item was made from."""
    return int(item["captions"][0].split()[-1])


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """The files of a folder on the loopback, while the context lasts; without range requests, as plain servers are."""
    with serve(partial(_Quiet, directory=str(folder))) as address:
        yield address
