"""Streams over shards: each pass gives every sample once, and damage costs only what is damaged."""

import itertools
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from programs import run_python
from stream_files import http_server, number_of, png, sample_members, shard_bytes, tar_bytes, write_shards
from torch.utils.data import DataLoader

from modeling_cots.data import skip_report
from modeling_cots.data.streaming.dataset import (
    READER_STATE,
    EndlessPairs,
    SkippingCollator,
    open_stream,
    pair_id_of,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture
def warnings_logged(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(skip_report.logger, "warning", messages.append)
    return messages


def numbers(items) -> list[int]:
    return [number_of(item) for item in items]


def read_by(pairs, num_processes: int, num_workers: int) -> list[list[int]]:
    """What each process reads in one pass, through a real data loader."""
    parts = [pairs.split_by_process(index, num_processes) for index in range(num_processes)]
    return [numbers(itertools.chain(*DataLoader(part, 4, num_workers=num_workers, collate_fn=list))) for part in parts]


# Splitting


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[5, 0, 9, 3, 7], [11], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]])
def test_every_sample_exactly_once_a_pass(tmp_path, sizes, num_processes, num_workers):
    write_shards(tmp_path, sizes)
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=5)
    seen = read_by(pairs, num_processes, num_workers)
    assert sorted(itertools.chain(*seen)) == list(range(sum(sizes)))
    if len(sizes) == 10 and num_processes * num_workers in (2, 3, 6):
        assert max(map(len, seen)) - min(map(len, seen)) <= len(sizes), "nobody idles"


def test_passes_differ_in_order_and_are_repeated_exactly_by_the_seed(tmp_path):
    write_shards(tmp_path, [20, 20, 20])
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=10, seed=3)
    first = list(pairs)
    assert list(pairs) == first == list(open_stream(str(tmp_path), "train", shuffle_buffer=10, seed=3))
    pairs.set_epoch(1)
    second = list(pairs)
    assert sorted(numbers(first)) == sorted(numbers(second)) and numbers(first) != numbers(second)
    seeds = [{item["name"]: item["seed"] for item in items} for items in (first, second)]
    assert all(seeds[0][name] != seeds[1][name] for name in seeds[0])
    other = open_stream(str(tmp_path), "train", shuffle_buffer=10, seed=4)
    assert numbers(other) != numbers(first)
    as_written = open_stream(str(tmp_path), "train", shuffle_buffer=0)
    as_written.set_epoch(5)
    assert numbers(as_written) == list(range(60))


def test_shards_come_in_a_new_order_and_the_buffer_mixes_them(tmp_path):
    write_shards(tmp_path, [10] * 8)
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=1)
    orders = set()
    for epoch in range(5):
        pairs.set_epoch(epoch)
        orders.add(tuple(number // 10 for number in numbers(pairs))[::10])
    assert len(orders) == 5
    mixed = numbers(open_stream(str(tmp_path), "train", shuffle_buffer=40))
    assert len({number // 10 for number in mixed[:10]}) > 2


# Items


def test_items_are_those_of_the_other_data_sets(tmp_path):
    path = write_shards(tmp_path, [2])[0]
    items = list(open_stream(str(path), "train", shuffle_buffer=0))
    assert [set(item) for item in items] == [{"image", "captions", "pair_id", "name", "seed"}] * 2
    assert items[1]["image"] == {"bytes": png(1), "path": None}
    assert items[1]["captions"] == ["caption 1"] and items[1]["name"] == f"{path}/00001"
    assert items[1]["pair_id"] == pair_id_of(png(1)) >= 0


def test_equal_images_have_one_pair_id_wherever_they_stand(tmp_path):
    for shard, keys in enumerate(("ab", "cd")):
        members = [(f"{key}.{kind}", content) for key in keys for kind, content in (("jpg", png(7)), ("txt", b"x"))]
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members))
    items = list(open_stream(str(tmp_path), "train"))
    assert len(items) == 4 and len({item["pair_id"] for item in items}) == 1
    assert len({item["seed"] for item in items}) == 4, "but each is cropped and masked in its own way"


def test_parquet_shards_and_their_columns(tmp_path):
    for shard in range(3):
        rows = range(20 * shard, 20 * shard + 20)
        images = [{"bytes": png(number), "path": f"{number}.png"} for number in rows]
        captions = [[f"caption {number}"] for number in rows]
        pq.write_table(pa.table({"image": images, "texts": captions, "id": list(rows)}), tmp_path / f"{shard}.parquet")
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-40])
    pairs = open_stream(str(tmp_path), "train", caption_column="texts", shuffle_buffer=4)
    assert sorted(numbers(pairs)) == [*range(20), *range(40, 60)]
    assert pairs.report.skipped_shards == 1
    with pytest.raises(ValueError, match="gives a pair.*no caption in one of caption, .*; there is image"):
        open_stream(str(tmp_path), "train")


# Damage


def test_a_truncated_and_a_missing_shard_are_skipped_counted_and_named(tmp_path, warnings_logged):
    paths = write_shards(tmp_path, [5, 5, 5])
    cut = paths[1].read_bytes()
    paths[1].write_bytes(cut[: cut.index(b"00008.png")])
    pairs = open_stream(f"{tmp_path}/train-{{000..003}}.tar", "train", shuffle_buffer=0)
    for _ in range(2):  # of the last sample before the cut nobody knows whether it is whole
        assert numbers(pairs) == [*range(7), *range(10, 15)]
    assert pairs.report.skipped_shards == 4, "twice in each of two passes"
    assert len(warnings_logged) == 2, "named once"
    assert "train-001.tar after" in warnings_logged[0] and "it ends too early" in warnings_logged[0]
    assert "train-003.tar after 0 samples: FileNotFoundError" in warnings_logged[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_count_what_they_skip(tmp_path, num_workers):
    paths = write_shards(tmp_path, [5] * 6)
    paths[2].write_bytes(b"no archive at all" * 100)
    paths[4].write_bytes(b"")
    pairs = open_stream(str(tmp_path), "train")
    assert sorted(read_by(pairs, 1, num_workers)[0]) == [*range(10), *range(15, 20), *range(25, 30)]
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=0)
    for _ in DataLoader(pairs, None, num_workers=num_workers):
        pass
    assert pairs.report.skipped_shards == 2


def test_bad_samples_are_skipped_counted_and_named(tmp_path, warnings_logged):
    members = [
        *sample_members(0),
        ("no_caption.png", png(1)),
        ("no_image.txt", b"x"),
        ("latin.png", png(2)),
        ("latin.txt", b"caf\xe9"),
        ("brackets.png", png(3)),
        ("brackets.json", b"[" * 100_000),
        ("number.png", png(4)),
        ("number.json", b'{"caption": 5}'),
        ("../out.png", png(5)),
        *sample_members(9, as_json=True),
    ]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    pairs = open_stream(str(tmp_path / "a.tar"), "train", shuffle_buffer=0)
    assert numbers(pairs) == [0, 9]
    assert pairs.report.skipped_samples == 6 and pairs.report.skipped_shards == 0
    text = "\n".join(warnings_logged)
    for name in ("no_caption", "no_image", "latin", "brackets", "number", "../out.png"):
        assert text.count(f"a.tar/{name}:") == 1
    assert "climbs out" in text


# Addresses


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_read_over_http(tmp_path, num_workers, warnings_logged):
    write_shards(tmp_path, [6, 6, 6])
    with http_server(tmp_path) as address:
        pairs = open_stream(f"{address}/train-{{000..003}}.tar", "train", shuffle_buffer=4)
        loader = DataLoader(pairs, None, num_workers=num_workers)
        assert sorted(numbers(loader)) == list(range(18))
        assert pairs.report.skipped_shards == 1, "the fourth is not there"


@pytest.mark.parametrize("pattern", ["memory://bucket/train-{000..002}.tar", "memory://bucket/*.tar"])
def test_shards_are_read_from_a_bucket(pattern):
    store = fsspec.filesystem("memory")
    for shard in range(3):
        store.pipe(f"/bucket/train-{shard:03d}.tar", shard_bytes(range(4 * shard, 4 * shard + 4)))
    try:
        assert sorted(numbers(open_stream(pattern, "train"))) == list(range(12))
    finally:
        store.rm("/bucket", recursive=True)


# Without end


def test_an_endless_stream_is_pass_after_pass(tmp_path):
    write_shards(tmp_path, [7, 5])
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=4)
    got = list(itertools.islice(EndlessPairs(pairs, 4), 36))
    assert [READER_STATE in item for item in got] == [False, False, False, True] * 9, (
        "with the last item of each batch"
    )
    got = [{name: value for name, value in item.items() if name != READER_STATE} for item in got]
    for epoch in range(3):
        pairs.set_epoch(epoch)
        assert got[12 * epoch : 12 * epoch + 12] == list(pairs)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(("num_given", "num_skipped"), [(1, 1), (5, 5), (17, 17), (5, 3)])
def test_behind_the_given_batches_come_those_that_would_have_come(tmp_path, num_workers, num_given, num_skipped):
    """The states come with the batches. A loop that throws away another number, as after another accumulation, too."""
    write_shards(tmp_path, [9, 6, 8])
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=6)

    def batches(endless: EndlessPairs) -> list:
        collate = SkippingCollator(lambda items: {"items": items})
        return list(itertools.islice(DataLoader(endless, 4, num_workers=num_workers, collate_fn=collate), 20))

    whole = batches(EndlessPairs(pairs, 4))
    states = [json.loads(batch.pop(READER_STATE)) for batch in whole[:num_given]]
    resumed = EndlessPairs(pairs, 4)
    resumed.go_on(num_skipped, num_given, {state["worker"]: state for state in states})
    got = batches(resumed)
    assert got[:num_skipped] == [{}] * num_skipped
    length = min(len(whole) - num_given, len(got) - num_skipped)
    assert got[num_skipped:][:length] == whole[num_given:][:length]


def test_more_workers_than_pairs_is_an_error_and_not_a_hang(tmp_path):
    write_shards(tmp_path, [2])
    part = open_stream(str(tmp_path), "train").split_by_process(2, 3)
    with pytest.raises(ValueError, match="found no pair in 20 passes"):
        next(iter(EndlessPairs(part, 1)))


# What is refused


def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "x", [1])
    (tmp_path / "a.txt").write_text("{}")
    for dataset, message in [
        ("x/train-{3..1}.tar", "runs backwards"),
        ("x/train-{abc}.tar", "neither a range"),
        ("x/*.parquet", "No file matches"),
        ("a.txt", "Expected files that end in .parquet, .tar, .*; got a.txt"),
        ("./nowhere", "does not exist"),
        ("x/gone-{000..002}.tar", "None of the 3 shards gives a pair.*gone-002.tar.*FileNotFoundError"),
        ("bucket3://x/a.tar", "Protocol not known"),
        ("memory://nothing/*.tar", "No file matches"),
        ("", "Name a data set"),
        ("some/pairs", "as a data set of the Hub it cannot be opened"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_stream(dataset, "train")
    with pytest.raises(ValueError, match="has no length to cut"):
        open_stream("x", "train[:10]")
    with pytest.raises(ValueError, match="shuffle_buffer must be 0 or more"):
        open_stream("x", "train", shuffle_buffer=-1)
    with pytest.raises(ValueError, match="no caption in 'alt'"):
        open_stream("x", "train", caption_column="alt")


@pytest.mark.slow
def test_memory_stays_flat_while_a_stream_goes_through():
    """Six times what may wait in memory at once; benchmarks/stream_memory.py does it with ten gigabytes."""
    options = ["--gigabytes", "0.6", "--num_workers", "1", "--shuffle_buffer", "20"]
    result = run_python(ROOT / "benchmarks" / "stream_memory.py", *options)
    points = [float(line.split()[2]) for line in result.stdout.splitlines() if line.endswith("MiB")]
    assert len(points) == 10
    assert max(points[2:]) - min(points[2:]) < 64, "MiB; four fifths of the stream came in between"
