"""A small collection of generated images in each form that `cots-search embed` takes."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_cots import ScenesDataset

SIDE = 32


def png_of(number: int) -> bytes:
    """The encoded image of a scene."""
    file = io.BytesIO()
    ScenesDataset("train", number + 1, SIDE)[number]["image"].save(file, "PNG")
    return file.getvalue()


def write_photos(folder: Path, num_images: int) -> Path:
    """A folder of images, and one file among them that is none."""
    folder.mkdir()
    for number in range(num_images):
        (folder / f"{number:03d}.png").write_bytes(png_of(number))
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A WebDataset shard."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, num_shards: int, per_shard: int) -> Path:
    """WebDataset shards 000.tar, 001.tar, ... of images with captions."""
    folder.mkdir()
    for shard in range(num_shards):
        members = {}
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            members |= {f"{number:03d}.png": png_of(number), f"{number:03d}.txt": b"caption %d" % number}
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def write_parquet(path: Path, num_images: int) -> Path:
    """A table of images with captions and years."""
    numbers = range(num_images)
    columns = {
        "image": [{"bytes": png_of(number), "path": f"{number}.png"} for number in numbers],
        "caption": [f"caption {number}" for number in numbers],
        "year": [2000 + number for number in numbers],
    }
    pq.write_table(pa.table(columns), path)
    return path
