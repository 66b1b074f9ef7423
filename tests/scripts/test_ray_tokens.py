"""`tokenize_images.py --ray`: the tokens of the script without it, each image once, and no images."""

import shutil
import sys
from collections import Counter

import pyarrow.parquet as pq
import pytest
import tokenize_images
from shard_collection import write_shards

from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.streaming.dataset import open_stream

pytest.importorskip("ray")
SHARDS = "data/{000..002}.tar"


def tokenize(monkeypatch, tmp_path, dataset: str, *options: str) -> None:
    words = [dataset, "--image_tokenizer", "random", "--model_config", str(tmp_path / "config.json"), *options]
    monkeypatch.setattr(sys, "argv", ["tokenize_images.py", *words])
    tokenize_images.main()


@pytest.fixture
def folder(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "config.json").write_text(tiny_config.to_json_string())
    write_shards(tmp_path / "data", 3, 4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ray", "--ray and --checkpoint belong together"),
        ("--checkpoint noted", "--ray and --checkpoint belong together"),
        ("--actors 2", "are for --ray"),
        (
            "--ray --checkpoint noted --without_images",
            "--ray writes no images in any case: leave --without_images out",
        ),
        ("--ray --checkpoint noted --device cpu", "--device is for one machine"),
    ],
)
def test_options_of_ray_belong_together(folder, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit):
        tokenize(monkeypatch, folder, SHARDS, "--output_dir", "out", *words.split())
    assert message in capsys.readouterr().err


def test_addresses_need_ray(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tokenize(monkeypatch, folder, f"file://{folder}/{SHARDS}", "--output_dir", "out")
    assert "read with --ray alone" in capsys.readouterr().err


@pytest.mark.slow
def test_actors_write_the_tokens_of_the_script(folder, monkeypatch, capsys, ray_address):
    tokenize(monkeypatch, folder, SHARDS, "--output_dir", "rewritten")
    expected = {item["name"]: item["image_tokens"] for item in open_pairs("rewritten", "train")}
    ray_options = ["--ray", "--actors", "1", "--output_dir", "out", "--checkpoint", "noted"]
    place = f"file://{folder}/{SHARDS}"
    for num_written in (12, 0):  # the second time nothing is left to do
        tokenize(monkeypatch, folder, place, *ray_options)
        assert f"tokens of {num_written} images; out has 12." in capsys.readouterr().out
    rows = [row for path in (folder / "out").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert set(rows[0]) == {"row_id", "name", "pair_id", "image_tokens", "image_tokens_source"}
    streamed = Counter(item["name"] for item in open_stream(place, "train", shuffle_buffer=0))
    assert Counter(row["name"] for row in rows) == streamed
    shutil.copytree("data", "moved")  # training finds the tokens by the images
    items = open_stream(f"file://{folder}/moved/*.tar", "train", shuffle_buffer=0, image_tokens="out")
    assert sum(1 for _ in items) == 12
    found = {row["name"].rpartition("/")[2] + ".png": row["image_tokens"] for row in rows}
    assert found == {name: [list(row) for row in tokens] for name, tokens in expected.items()}
