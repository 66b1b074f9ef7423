"""Scenes as files, in every form in which people keep pairs of images and captions."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, scenes: list[dict]) -> Path:
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for index, item in enumerate(scenes):
            item["image"].save(folder / f"{index}.png")
            metadata.write(json.dumps({"file_name": f"{index}.png", "caption": item["captions"][0]}) + "\n")
    return folder


def write_parquet(folder: Path, scenes: list[dict]) -> Path:
    folder.mkdir()
    images = [{"bytes": png(item["image"]), "path": f"{i}.png"} for i, item in enumerate(scenes)]
    table = pa.table({"photo": images, "sentences": [item["captions"] for item in scenes]})
    for split in ("train", "validation"):
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def write_jsonl(folder: Path, scenes: list[dict]) -> Path:
    write_folder(folder, scenes)
    (folder / "metadata.jsonl").unlink()
    rows = [{"image": f"{i}.png", "caption": caption} for i, item in enumerate(scenes) for caption in item["captions"]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def write_shards(folder: Path, scenes: list[dict]) -> Path:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"pairs-{shard:03d}.tar", "w") as archive:
            for index in range(4 * shard, 4 * shard + 4):
                members = {"png": png(scenes[index]["image"]), "txt": scenes[index]["captions"][0].encode()}
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{index:05d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder
