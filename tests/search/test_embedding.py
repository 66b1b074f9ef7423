"""Images become entries: folders, stable names, the model's identity."""

import copy
import datetime
import math
import os
from decimal import Decimal
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import write_video

from modeling_cots import COTSModel, ScenesDataset, export_repository
from modeling_cots.hub.identity import model_identity
from modeling_cots.search import embedding
from modeling_cots.search.embedding import (
    Embedder,
    ImageFolder,
    as_image_folder,
    content_of,
    entry_names,
    row_ids_of,
)
from modeling_cots.search.rows import join_tables

ODD_METADATA = [  # of the items 3, 1 and 4, and 2 and 5
    {"hash": 2**53 + 1, "price": math.inf},
    {
        "captions": 1,
        "captions_": 2,
        "": 3,
        "$meta": 4,
        "_seq": 5,
        "score": 0.4,
        "price": Decimal("9.5"),
        "day": datetime.date(2020, 2, 1),
        "hash": 2**63,
    },
    {"hash": math.nan, "price": 10**20},
]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name in ("b.JPG", "a.png", "sub/c.webp", ".hidden/x.png", "sub/.y.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), "red").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    outside = tmp_path / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    (folder / "link.png").symlink_to(outside)
    return folder


def test_a_folder_gives_its_visible_images_and_those_it_links_to(photos, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(embedding.logger, "warning", messages.append)
    (photos / "again.png").symlink_to("a.png")
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "circle").symlink_to(photos)
    (tmp_path / "disk").mkdir()
    for name in ("d.avif", "e.jp2", "f.ppm", "g.jfif", "h.jpe"):
        (tmp_path / "disk" / name).touch()
    (photos / "disk").symlink_to(tmp_path / "disk")
    folder = ImageFolder(photos)
    linked = [f"disk/{name}" for name in ("d.avif", "e.jp2", "f.ppm", "g.jfif", "h.jpe")]
    found = [os.path.relpath(path, photos) for path in folder.names()]
    assert found == ["a.png", "b.JPG", *linked, "link.png", "sub/c.webp"]
    assert len(messages) == 1 and "Left out 2 files" in messages[0] and messages[0].endswith("gone.png, notes.txt.")
    assert folder[1]["image"]["path"] == str(photos / "b.JPG")
    assert entry_names(folder, "any") == folder.names()
    assert as_image_folder(str(photos)) == photos
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}')
    assert as_image_folder(str(photos)) is None and as_image_folder("scenes") is None
    with pytest.raises(ValueError, match="no folder"):
        ImageFolder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        ImageFolder(tmp_path / "empty")


def test_a_folder_gives_its_videos_and_names_what_it_lacks_a_library_for(photos, monkeypatch):
    messages = []
    monkeypatch.setattr(embedding.logger, "warning", messages.append)
    for name in ("film.MP4", "sub/clip.webm", "a.heic", "b.HEIF", "table.csv"):
        (photos / name).touch()
    found = ["a.heic", "a.png", "b.HEIF", "b.JPG", "film.MP4", "link.png", "sub/c.webp", "sub/clip.webm"]
    pytest.importorskip("av")
    pytest.importorskip("pillow_heif")
    folder = ImageFolder(photos)
    assert [os.path.relpath(path, photos) for path in folder.names()] == found
    assert folder[4]["video"] == str(photos / "film.MP4") and "video" not in folder[3]
    assert any("table.csv" in message and "give its own name" in message for message in messages)

    messages.clear()
    monkeypatch.setattr(embedding, "FORMATS", [name for name in embedding.FORMATS if name != "HEIF"])
    monkeypatch.setattr(embedding, "is_av_available", lambda: False)
    folder = ImageFolder(photos)
    assert [os.path.relpath(path, photos) for path in folder.names()] == ["a.png", "b.JPG", "link.png", "sub/c.webp"]
    (heic,) = [message for message in messages if "HEIC" in message]
    assert "2 files" in heic and "modeling_cots[heic]" in heic and heic.endswith("a.heic, b.HEIF.")
    (videos,) = [message for message in messages if "videos (" in message]
    assert "2 files" in videos and "modeling_cots[video]" in videos and videos.endswith("film.MP4, sub/clip.webm.")
    for name in ("a.png", "b.JPG", "link.png", "sub/c.webp"):
        (photos / name).unlink()
    with pytest.raises(ValueError, match=r"no image .* no video .*modeling_cots\[heic\]"):
        ImageFolder(photos)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_videos_are_embedded_as_the_model_encodes_them(tiny_config, tiny_processor, tmp_path, num_workers, caplog):
    pytest.importorskip("av")
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", range(number, number + 20))
    (tmp_path / "1.mp4").write_bytes(b"no video")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "0.png")
    model, folder = COTSModel(tiny_config).eval(), ImageFolder(tmp_path)
    embedder = Embedder(model, tiny_processor, batch_size=20, num_workers=num_workers, thumbnail_side=16)
    tables = embedder.tables(folder, np.arange(4), folder.names(), "s", Mock())
    rows = {os.path.basename(row["name"]): row for row in join_tables(list(tables)).to_pylist()}
    assert set(rows) == {"0.png", "0.mp4", "2.mp4"}
    for name in ("0.mp4", "2.mp4"):
        pixels = tiny_processor(videos=[str(tmp_path / name)], return_tensors="pt")["pixel_values_videos"]
        expected = model.encode_video(pixels)[0].detach().numpy()
        np.testing.assert_allclose(rows[name]["embedding"], expected, atol=1e-5)
        assert rows[name]["thumbnail"]["bytes"][:2] == b"\xff\xd8"
    pixels = tiny_processor(images=[Image.new("RGB", (30, 20), "red")], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(rows["0.png"]["embedding"], model.encode_image(pixels)[0].detach().numpy(), atol=1e-5)
    assert [os.path.basename(name) for name, _ in embedder.skipped] == ["1.mp4"]
    assert len({row["content"] for row in rows.values()}) == 3


def test_the_content_is_that_of_the_pixels():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert content_of(pixels) == content_of(pixels.copy()) == content_of(np.asfortranarray(pixels))
    assert len({content_of(pixels), content_of(pixels.reshape(4, 2, 3)), content_of(pixels[::-1])}) == 3


def test_names_are_unique_and_ids_are_hashes_of_them():
    class Data:
        def names(self):
            return ["0.jpg", "1.jpg", "0.jpg"]

    assert entry_names(Data(), "shards") == ["shards: 0.jpg", "shards: 1.jpg", "shards: 0.jpg (2)"]
    ids = row_ids_of(["a", "b", "\udcff.png"])
    assert ids.dtype == "S32" and len(set(ids.tolist())) == 3
    assert len({int(row_id, base=16) for row_id in ids.tolist()}) == 3
    assert row_ids_of(["b"])[0] == ids[1]


def test_identity_is_that_of_weights_and_processing(tiny_config, tiny_processor, tmp_path):
    torch.manual_seed(0)
    model = COTSModel(tiny_config)
    identity = model_identity(model, tiny_processor)
    model.save_pretrained(tmp_path)
    for save in (tiny_processor.save_pretrained, lambda folder: export_repository(model, tiny_processor, folder)):
        save(tmp_path)
        loaded, processor = COTSModel.from_pretrained(tmp_path), type(tiny_processor).from_pretrained(tmp_path)
        assert model_identity(loaded, processor) == identity
    processor(text=["a", "b c"], padding=True, truncation=True)  # leaves its settings in the tokenizer
    assert model_identity(COTSModel.from_pretrained(tmp_path, dtype="bfloat16"), processor) == identity
    other = copy.deepcopy(processor)
    other.image_processor.image_mean = [0.1, 0.1, 0.1]
    assert model_identity(loaded, other) != identity
    for change in ({"num_attention_heads": 1}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}):
        config = copy.deepcopy(loaded.config)
        for name, value in change.items():
            setattr(config.vision_config, name, value)
        assert model_identity(COTSModel.from_pretrained(tmp_path, config=config), processor) != identity
    assert model_identity(COTSModel.from_pretrained(tmp_path, attn_implementation="eager"), processor) == identity
    with torch.no_grad():
        loaded.text_projection.bias[3] += 0.01
    assert model_identity(loaded, processor) != identity


@pytest.mark.parametrize("num_workers", [0, 2])
def test_embeds_chosen_items_and_leaves_out_what_cannot_be_read(tiny_config, tiny_processor, num_workers, caplog):
    class Data(ScenesDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "image": b"no image"} if index == 2 else item

        def metadata(self, index):
            return {"number": index, "name": "taken", "date": None, **ODD_METADATA[index % 3]}

    model, scenes = COTSModel(tiny_config), Data("train", 6, 32)
    embedder = Embedder(model, tiny_processor, batch_size=2, num_workers=num_workers, thumbnail_side=16)

    class Progress:
        total = 0

        def update(self, number):
            self.total += number

    progress, names = Progress(), [f"n{index}" for index in range(6)]
    tables = list(embedder.tables(scenes, np.array([1, 2, 3, 5]), names, "s", progress))
    rows = join_tables(tables).to_pylist()
    assert [row["name"] for row in rows] == ["n1", "n3", "n5"] and progress.total == 4
    assert [row["content"] for row in rows] == [content_of(np.asarray(scenes[i]["image"])) for i in (1, 3, 5)]
    assert [row["number"] for row in rows] == [1, 3, 5] and rows[0]["name_"] == "taken"
    # What stores keep for themselves gets another name, and what they do not hold alike another form.
    expected = {"captions__": 1, "captions_": 2, "_": 3, "$meta_": 4, "_seq_": 5, "score": 0.4}
    assert {name: rows[0][name] for name in expected} == expected
    assert [row["price"] for row in rows] == [9.5, None, 1e20] and rows[0]["day"] == "2020-02-01"
    assert [row["hash"] for row in rows] == [2.0**63, 2.0**53, None]
    assert rows[1]["captions"] == scenes[3]["captions"]
    pixels = tiny_processor.image_processor([scenes[5]["image"]], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(rows[2]["embedding"], model.encode_image(pixels)[0].detach().numpy(), atol=1e-5)
    assert rows[0]["thumbnail"]["bytes"][:2] == b"\xff\xd8"
    assert [name for name, _ in embedder.skipped] == ["train-00002"]
