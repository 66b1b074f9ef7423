"""Small real files of every form that `open_pairs` takes, and what must come out of them."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAMES = ["a.png", "b.png", "c.png"]
IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
CAPTIONS = [["a one", "a two"], ["b one", "b two"], ["c one", "c two"]]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 10, 20)).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(shade) for shade in (50, 100, 150)]


def write_images(folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(NAMES, IMAGES, strict=True):
        (folder / name).write_bytes(image)


def write_jsonl(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def embedded(names=NAMES, images=IMAGES) -> list[dict]:
    return [{"bytes": image, "path": name} for name, image in zip(names, images, strict=True)]


def a_row_an_image(column: str = "image") -> list[dict]:
    return [{column: name, "caption": captions} for name, captions in zip(NAMES, CAPTIONS, strict=True)]


def a_row_a_caption(column: str = "image") -> list[dict]:
    """The rows of one image do not stand together."""
    return [{column: name, "caption": CAPTIONS[i][k]} for k in (0, 1) for i, name in enumerate(NAMES)]


def image_of(item: dict) -> bytes:
    image = item["image"]
    if image["bytes"] is not None:
        return image["bytes"]
    with open(image["path"], "rb") as file:
        return file.read()


def check_pairs(pairs, captions=CAPTIONS) -> None:
    items = list(pairs)
    assert [item["captions"] for item in items] == captions
    assert [image_of(item) for item in items] == IMAGES
    assert [item["pair_id"] for item in items] == [0, 1, 2] and len(pairs) == 3
    assert [set(item) for item in items] == [{"image", "captions", "pair_id", "name", "seed"}] * 3
    assert list(pairs.iter_captions()) == [caption for item in items for caption in item["captions"]]
