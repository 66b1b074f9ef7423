"""`TokenWriter`: what the files hold, and that training on them gives the same weights as training without them."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenize_images
import torch
from collator_items import draw_image, encode
from pair_writers import CAPTIONS, NAMES, image_of, write_jsonl
from transformers import set_seed

from modeling_cots import ImageTokenizer, ScenesDataset
from modeling_cots.data import image_token_writing
from modeling_cots.data.image_token_cache import TokenSource
from modeling_cots.data.image_token_writing import TokenWorker, TokenWriter, encoded_image
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.streaming.dataset import open_stream, pair_id_of

SIZE, PATCH = (32, 32), (8, 8)


@pytest.fixture
def image_tokenizer() -> ImageTokenizer:
    return ImageTokenizer.random(50, [0.5] * 3, [0.5] * 3)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of three images, the second of which is damaged, with two captions each."""
    contents = [encode(draw_image(i, 40 + i, 60), "JPEG") for i in range(3)]
    contents[1] = contents[1][:300]
    (tmp_path / "photos").mkdir()
    for name, content in zip(NAMES, contents, strict=True):
        (tmp_path / "photos" / name).write_bytes(content)
    rows = [{"file_name": name, "captions": captions} for name, captions in zip(NAMES, CAPTIONS, strict=True)]
    write_jsonl(tmp_path / "photos" / "metadata.jsonl", rows)
    return tmp_path / "photos"


def write(dataset, output_dir, image_tokenizer, **options) -> list[Path]:
    return TokenWriter(image_tokenizer, SIZE, PATCH, **options).write(
        dataset, str(output_dir), "train", progress=False
    )


# The files


@pytest.mark.parametrize("flipped", [False, True])
def test_images_captions_and_names_stay_and_tokens_are_beside(folder, tmp_path, image_tokenizer, flipped):
    before = open_pairs(str(folder), "train")
    write(before, tmp_path / "out", image_tokenizer, flipped=flipped, batch_size=2)
    after = open_pairs(str(tmp_path / "out"), "train")
    images = [image_of(item) for item in before]
    assert [image_of(item) for item in after] == [images[0], b"", images[2]], "of what is no image nothing is copied"
    for name in ("captions", "name", "pair_id", "seed"):
        assert [item[name] for item in after] == [item[name] for item in before]
    tokens = [item["image_tokens"] for item in after]
    assert tokens[1] is None, "the damaged one"
    assert np.asarray(tokens[0]).shape == np.asarray(tokens[2]).shape == (1 + flipped, 16)
    assert after.metadata(0) == before.metadata(0) == {}


def test_tokens_are_small(folder, tmp_path, image_tokenizer):
    (path,) = write(open_pairs(str(folder), "train"), tmp_path / "out", image_tokenizer)
    assert str(pq.read_schema(path).field("image_tokens").type.value_type.value_type) == "uint16"


def test_shards_are_numbered_and_a_stopped_run_goes_on(tmp_path, image_tokenizer):
    scenes = ScenesDataset("train", 10, 32)
    paths = write(scenes, tmp_path / "out", image_tokenizer, shard_rows=4)
    assert [path.name for path in paths] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    contents = [path.read_bytes() for path in paths]
    paths[1].unlink()
    (tmp_path / "out" / "train-00001-of-00003.unfinished").write_bytes(b"half of it")
    stamps = [os.stat(paths[i]).st_mtime_ns for i in (0, 2)]
    write(scenes, tmp_path / "out", image_tokenizer, shard_rows=4)
    assert [path.read_bytes() for path in paths] == contents
    assert [os.stat(paths[i]).st_mtime_ns for i in (0, 2)] == stamps, "not written anew"
    assert sorted(os.listdir(tmp_path / "out")) == [path.name for path in paths]
    after = open_pairs(str(tmp_path / "out"), "train")
    assert [item["captions"] for item in after] == [item["captions"] for item in scenes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :],
    ],
)
def test_a_resumed_run_writes_a_damaged_shard_anew(tmp_path, image_tokenizer, monkeypatch, damage):
    """Empty, cut off, or with zeros before a sound footer: as a crash of the machine may leave a file."""
    messages = []
    monkeypatch.setattr(image_token_writing.logger, "warning", messages.append)
    scenes = ScenesDataset("train", 10, 32)
    paths = write(scenes, tmp_path / "out", image_tokenizer, shard_rows=4)
    contents = [path.read_bytes() for path in paths]
    paths[1].write_bytes(damage(contents[1]))
    stamps = [os.stat(paths[i]).st_mtime_ns for i in (0, 2)]
    write(scenes, tmp_path / "out", image_tokenizer, shard_rows=4)
    assert [path.read_bytes() for path in paths] == contents
    assert [os.stat(paths[i]).st_mtime_ns for i in (0, 2)] == stamps, "not written anew"
    (message,) = messages
    assert str(paths[1]) in message and "is damaged" in message and "written anew" in message


def test_a_shard_with_too_few_rows_is_written_anew(tmp_path, image_tokenizer):
    paths = write(ScenesDataset("train", 6, 32), tmp_path / "out", image_tokenizer, shard_rows=4)
    content = paths[0].read_bytes()
    pq.write_table(pq.read_table(paths[0]).slice(0, 3), paths[0])
    write(ScenesDataset("train", 6, 32), tmp_path / "out", image_tokenizer, shard_rows=4)
    assert paths[0].read_bytes() == content


def test_a_shard_that_fails_leaves_no_file(tmp_path, image_tokenizer, monkeypatch):
    def fail(*inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ImageTokenizer, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        write(ScenesDataset("train", 6, 32), tmp_path / "out", image_tokenizer)
    assert os.listdir(tmp_path / "out") == []


def test_files_of_something_else_are_not_mixed_with(tmp_path, image_tokenizer):
    scenes = ScenesDataset("train", 6, 32)
    write(scenes, tmp_path / "out", image_tokenizer, shard_rows=4)
    other = ImageTokenizer.random(50, [0.5] * 3, [0.5] * 3, seed=1)
    for changed in (
        lambda: write(scenes, tmp_path / "out", other, shard_rows=4),
        lambda: write(scenes, tmp_path / "out", image_tokenizer, shard_rows=4, flipped=True),
        lambda: write(scenes, tmp_path / "out", image_tokenizer, shard_rows=3),
        lambda: write(ScenesDataset("train", 7, 32), tmp_path / "out", image_tokenizer, shard_rows=4),
    ):
        with pytest.raises(ValueError, match="another folder"):
            changed()


def test_what_cannot_be_read_gets_no_bytes(tmp_path):
    (tmp_path / "secret").write_bytes(b"of somebody else")
    refused = {"bytes": None, "path": str(tmp_path / "secret"), "refused": "it leads out"}
    assert encoded_image(refused) == b""
    assert encoded_image({"bytes": None, "path": str(tmp_path / "missing")}) == b""
    assert encoded_image({"bytes": None, "path": None}) == b""
    assert encoded_image({"bytes": None, "path": str(tmp_path / "secret")}) == b"", "it is no image"


# Training


def test_a_worker_gives_the_same_tokens_without_the_images(folder, tmp_path, image_tokenizer):
    pairs = open_pairs(str(folder), "train")
    write(pairs, tmp_path / "out", image_tokenizer, flipped=True)
    source = TokenSource.of(image_tokenizer, SIZE, PATCH)
    rows = pa.table({"row_id": ["0", "1", "2"], "name": pairs.names(), "number": [0, 1, 2]})
    worker = TokenWorker(lambda: image_tokenizer, lambda rows: [pairs[i] for i in range(3)], source, True, 2, 0)
    table, skipped = worker(rows)
    expected = [item for item in open_pairs(str(tmp_path / "out"), "train") if item["image_tokens"] is not None]
    assert table.column_names == ["row_id", "name", "pair_id", "image_tokens", "image_tokens_source"]
    images = [Path(pairs[number]["image"]["path"]).read_bytes() for number in (0, 2)]
    assert table["pair_id"].to_pylist() == [pair_id_of(image) for image in images]
    assert table["image_tokens"].to_pylist() == [np.asarray(item["image_tokens"]).tolist() for item in expected]
    assert table["row_id"].to_pylist() == ["0", "2"] and [name for name, _ in skipped] == [pairs[1]["name"]]
    other = ImageTokenizer.random(40, [0.5] * 3, [0.5] * 3)
    with pytest.raises(ValueError, match="another one here.*vocab_size 40 and not 50"):
        TokenWorker(lambda: other, None, source, True, 2, 0)


@pytest.fixture
def trained(make_trainer, tmp_path):
    """A function that trains on the scenes of a folder, with cached tokens or without: losses and weights."""
    scenes = ScenesDataset("train", 24, 32)

    def train(folder: str, streaming: bool = False, beside: str | None = None, **options) -> tuple[list[dict], dict]:
        place = tmp_path / "data"  # the same for both: what a stream draws depends on the names of its samples
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(tmp_path / folder, place)
        tokens = {} if beside is None else {"image_tokens": str(tmp_path / beside)}
        streamed = {"shuffle_buffer": 4, **tokens}
        dataset = open_stream(str(place), "train", **streamed) if streaming else open_pairs(str(place), "train")
        set_seed(0)
        trainer = make_trainer(train_dataset=dataset, min_crop_scale=1.0, **options)
        trainer.train()
        logs = [{name: entry[name] for name in entry if "loss" in name} for entry in trainer.state.log_history]
        return logs[:-1], trainer.model.state_dict()

    tokenizer = make_trainer().image_tokenizer
    write(scenes, tmp_path / "cached", tokenizer, flipped=True, shard_rows=10, batch_size=7)
    write(scenes, tmp_path / "ids", tokenizer, flipped=True, shard_rows=10, batch_size=7, with_images=False)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in sorted((tmp_path / "cached").iterdir()):
        pq.write_table(pq.read_table(path).drop(["image_tokens", "image_tokens_source"]), plain / path.name)
    return train


@pytest.mark.parametrize("horizontal_flip", [0.0, 0.5])
def test_training_on_cached_tokens_is_training_on_computed_ones(trained, horizontal_flip):
    """Bit for bit, losses and weights, flipped images too; with the tokenizer and without."""
    logs, weights = trained("plain", horizontal_flip=horizontal_flip)
    assert len(logs) == 3 and logs[0]["loss_cmvm"] > 0
    for options in ({}, {"image_tokenizer": None}):
        cached_logs, cached_weights = trained("cached", horizontal_flip=horizontal_flip, **options)
        assert cached_logs == logs
        assert all(torch.equal(weights[name], cached_weights[name]) for name in weights)


def test_a_stream_brings_its_tokens_along(trained):
    logs, weights = trained("plain", streaming=True, horizontal_flip=0.5)
    cached_logs, cached_weights = trained("cached", streaming=True, horizontal_flip=0.5, image_tokenizer=None)
    assert cached_logs == logs
    assert all(torch.equal(weights[name], cached_weights[name]) for name in weights)


def test_a_stream_joins_tokens_that_are_beside_its_shards(trained, tmp_path):
    """Ids and tokens alone: losses and weights are those of tokens in the shards, bit for bit."""
    logs, weights = trained("plain", streaming=True, horizontal_flip=0.5)
    beside = {"streaming": True, "beside": "ids", "horizontal_flip": 0.5, "image_tokenizer": None}
    joined_logs, joined_weights = trained("plain", **beside)
    assert joined_logs == logs
    assert all(torch.equal(weights[name], joined_weights[name]) for name in weights)
    assert pq.read_schema(next((tmp_path / "ids").iterdir())).names == [
        "pair_id",
        "image_tokens",
        "image_tokens_source",
    ]


# The script


def test_the_script_writes_what_pre_training_opens(folder, tmp_path, monkeypatch, capsys):
    config = tmp_path / "sizes.json"
    config.write_text(
        '{"vision_config": {"hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}, '
        '"image_vocab_size": 50}'
    )
    output = tmp_path / "out"
    options = ["--model_config", config, "--image_tokenizer", "random", "--mirrored", "--device", "cpu"]
    arguments = ["tokenize_images.py", folder, "--output_dir", output, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    tokenize_images.main()
    assert "3 images" in capsys.readouterr().out
    tokens = [item["image_tokens"] for item in open_pairs(str(output), "train")]
    assert np.asarray(tokens[0]).shape == (2, 16) and tokens[1] is None
