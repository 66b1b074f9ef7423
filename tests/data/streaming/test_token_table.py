"""Image tokens beside the shards of a stream: joined by the images, whatever their names, files and order."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_files import number_of, png, write_shards

from modeling_cots.data.rows import IMAGE_TOKENS, TOKEN_SOURCE
from modeling_cots.data.streaming.dataset import open_stream, pair_id_of
from modeling_cots.data.streaming.token_table import PAIR_ID, TokenTable

SOURCE = json.dumps({"vocab_size": 50})


def write_tokens(folder, numbers: list[int]) -> None:
    """Of each image its number as the only token, in two files, the second in a sub-folder."""
    (folder / "more").mkdir(parents=True)
    half = len(numbers) // 2
    for path, part in ((folder / "a.parquet", numbers[:half]), (folder / "more" / "b.parquet", numbers[half:])):
        rows = [{PAIR_ID: pair_id_of(png(n)), IMAGE_TOKENS: [[n]], TOKEN_SOURCE: SOURCE} for n in part]
        schema = pa.schema(
            {PAIR_ID: pa.int64(), IMAGE_TOKENS: pa.list_(pa.list_(pa.uint16())), TOKEN_SOURCE: pa.string()}
        )
        pq.write_table(pa.Table.from_pylist(rows, schema), path)


def test_each_image_gets_its_own_tokens_and_one_without_is_left_out(tmp_path):
    write_shards(tmp_path / "shards", [20, 30])
    numbers = list(range(5, 60))
    random.Random(0).shuffle(numbers)
    write_tokens(tmp_path / "tokens", numbers)
    for folder in (str(tmp_path / "tokens"), f"file://{tmp_path}/tokens"):
        pairs = open_stream(str(tmp_path / "shards"), "train", image_tokens=folder)
        items = list(pairs)
        assert sorted(map(number_of, items)) == list(range(5, 50))
        assert all(item[IMAGE_TOKENS] == [[number_of(item)]] and item[TOKEN_SOURCE] == SOURCE for item in items)
        assert pairs.report.skipped_samples >= 5 and "it has no image tokens in" in pairs.report.last
    assert len(TokenTable(str(tmp_path / "tokens"))) == 55


def test_tokens_with_names_are_joined_by_the_names_of_the_stream(tmp_path):
    """As a cluster writes them, which may have other names of other shards beside them."""
    write_shards(tmp_path / "shards", [4, 3])
    names = [f"{tmp_path}/shards/train-{n // 4:03d}.tar/{n:05d}" for n in (6, 2, 0, 5, 1, 3, 4)]
    rows = [{"row_id": "x", "name": name, IMAGE_TOKENS: [[int(name[-5:])]], TOKEN_SOURCE: SOURCE} for name in names]
    (tmp_path / "tokens").mkdir()
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "name": "other"}]), tmp_path / "tokens" / "part-0.parquet")
    items = list(open_stream(str(tmp_path / "shards"), "train", image_tokens=str(tmp_path / "tokens")))
    assert sorted(map(number_of, items)) == list(range(7))
    assert all(item[IMAGE_TOKENS] == [[number_of(item)]] for item in items)


def test_what_holds_no_tokens_is_refused(tmp_path):
    write_shards(tmp_path / "shards", [2])
    pq.write_table(pa.table({"pair_id": [1]}), tmp_path / "x.parquet")
    for tokens, message in [
        (tmp_path / "gone", "gone has no parquet file"),
        (tmp_path, "has files without image_tokens and image_tokens_source"),
        ("memory://nothing", "No file matches memory://nothing"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_stream(str(tmp_path / "shards"), "train", image_tokens=str(tokens))
    write_tokens(tmp_path / "tokens", [7, 8])
    with pytest.raises(ValueError, match="None of the 1 shards gives a pair.*no image tokens"):
        open_stream(str(tmp_path / "shards"), "train", image_tokens=str(tmp_path / "tokens"))
