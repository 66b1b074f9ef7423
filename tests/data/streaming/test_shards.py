"""Repositories on this machine as shards; rows that name files instead of holding images; the Hub."""

import json
import os

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_hub import OWNER, dataset_hub
from programs import run_python
from stream_files import number_of, png, write_shards

from modeling_cots.data.rows import image_columns
from modeling_cots.data.streaming.dataset import StreamingPairs, open_stream
from modeling_cots.data.streaming.shards import RowShards


def write_arrow(folder, numbers) -> None:
    rows = {
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "caption": [f"caption {number}" for number in numbers],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder, num_shards=2)


def write_parquet(folder, numbers) -> None:
    folder.mkdir()
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    pq.write_table(pa.table({"image": images, "text": [f"caption {n}" for n in numbers]}), folder / "0.parquet")


def write_tar(folder, numbers) -> None:
    write_shards(folder, [len(numbers)])


@pytest.mark.parametrize("write", [write_arrow, write_parquet, write_tar])
def test_a_repository_is_streamed_as_its_card_says(tmp_path, write):
    write(tmp_path / "x", range(6))
    suffix = write.__name__[6:]
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: odd\n    path: x/*.{suffix}\n---\n"
    )
    pairs = open_stream(str(tmp_path), "odd", shuffle_buffer=3)
    assert sorted(map(number_of, pairs)) == list(range(6))
    with pytest.raises(ValueError, match="has no split 'train'; it has odd"):
        open_stream(str(tmp_path), "train")


def rows_of(images: list, num_shards: int = 1) -> datasets.IterableDataset:
    columns = {"image": images, "caption": [f"caption {number}" for number in range(len(images))]}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards)


def test_images_beside_the_rows_are_read_from_the_repository_alone():
    store = fsspec.filesystem("memory")
    store.pipe("/repo/a.png", png(1))
    store.pipe("/secret/a.png", png(2))
    paths = [
        "memory://repo/a.png",
        "memory://secret/a.png",
        "memory://repo/../secret/a.png",
        "/etc/passwd",
        "memory://repo/gone.png",
    ]
    try:
        for repository, expected in [("memory://repo/", [0]), (None, [])]:
            rows = rows_of([{"bytes": None, "path": path} for path in paths[:4]])
            pairs = StreamingPairs(RowShards(rows, [], repository), image_columns(), shuffle_buffer=0)
            assert [number_of(item) for item in pairs] == expected
            assert pairs.report.skipped_samples == 4 - len(expected)
    finally:
        store.rm("/repo", recursive=True)
        store.rm("/secret", recursive=True)


def test_a_shard_that_fails_inside_datasets_ends_alone():
    def rows(shards):
        for shard in shards:
            yield {"image": {"bytes": png(shard), "path": None}, "caption": f"caption {shard}"}
            if shard == 1:
                raise OSError("connection lost")
            yield {"image": {"bytes": png(10 + shard), "path": None}, "caption": f"caption {10 + shard}"}

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})
    pairs = StreamingPairs(RowShards(stream, ["a", "b", "c"], None), image_columns(), shuffle_buffer=0)
    assert [number_of(item) for item in pairs] == [0, 10, 1, 2, 12]
    assert pairs.report.skipped_shards == 1 and "shard b after 1 samples" in pairs.report.last


STREAM_FROM_HUB = """
import json, sys
from modeling_cots.data.streaming.dataset import open_stream
for repo_id in sys.argv[1:]:
    pairs = open_stream(repo_id, "train", shuffle_buffer=2)
    captions = sorted(item["captions"][0] for item in pairs)
    print("FOUND", json.dumps([captions, pairs.report.skipped_shards, pairs.report.skipped_samples]))
"""


def write_images(folder, numbers) -> None:
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for number in numbers:
            (folder / f"{number}.png").write_bytes(png(number))
            metadata.write(json.dumps({"file_name": f"{number}.png", "caption": f"caption {number}"}) + "\n")


@pytest.mark.slow
def test_data_sets_of_the_hub_are_streamed_by_the_real_client(tmp_path):
    """In a process of its own, as huggingface_hub reads its endpoint when it is imported."""
    writers = {"shards": write_tar, "tables": write_parquet, "images": write_images}
    for name, write in writers.items():
        (tmp_path / "hub" / name).mkdir(parents=True)
        write(tmp_path / "hub" / name / "train", range(4))
    (tmp_path / "hub" / "shards" / "train" / "train-001.tar").write_bytes(b"no archive")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with dataset_hub(tmp_path / "hub") as address:
        environment = {**kept, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        result = run_python("-c", STREAM_FROM_HUB, *(f"{OWNER}/{name}" for name in writers), env=environment)
    found = [json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("FOUND ")]
    captions = [f"caption {number}" for number in range(4)]
    assert found == [[captions, 1, 0], [captions, 0, 0], [captions, 0, 0]]
