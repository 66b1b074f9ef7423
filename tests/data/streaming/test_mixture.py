"""Several streams mixed by weights: how often each gives a pair, ids, going on exactly, and what is refused."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_files import number_of, png, shard_bytes
from torch.utils.data import DataLoader

from modeling_cots.data.rows import IMAGE_TOKENS, TOKEN_SOURCE
from modeling_cots.data.streaming.dataset import READER_STATE, EndlessPairs, SkippingCollator, open_stream, pair_id_of
from modeling_cots.data.streaming.mixture import is_mixture, open_mixture

pytest.importorskip("torchdata.nodes", reason="needs torchdata: pip install 'modeling-cots[mixtures]'")


@pytest.fixture
def mix(tmp_path) -> str:
    """Three sources of 300, 40 and 7 pairs; images are numbered through, and keys begin anew in each source."""
    first = 0
    for name, sizes in {"large": [100, 100, 100], "middle": [25, 15], "small": [7]}.items():
        (tmp_path / name).mkdir()
        for shard, size in enumerate(sizes):
            (tmp_path / name / f"train-{shard:03d}.tar").write_bytes(shard_bytes(range(first, first + size)))
            first += size
    lines = [f"{name}:\n  dataset: {tmp_path / name}\n  weight: {weight}\n" for name, weight in WEIGHTS.items()]
    (tmp_path / "mix.yaml").write_text("".join(lines))
    return str(tmp_path / "mix.yaml")


WEIGHTS = {"large": 5, "middle": 3, "small": 2}


def source_of(item: dict) -> str:
    number = number_of(item)
    return "large" if number < 300 else "middle" if number < 340 else "small"


def read(endless: EndlessPairs, num_batches: int, num_workers: int = 0) -> list[dict]:
    collate = SkippingCollator(lambda items: {"items": items})
    loader = DataLoader(endless, endless.batch_size, num_workers=num_workers, collate_fn=collate)
    return list(itertools.islice(loader, num_batches))


def test_sources_come_as_often_as_their_weights_say_and_a_small_one_again_and_again(mix):
    pairs = open_mixture(mix, "train", shuffle_buffer=20)
    assert (pairs.name, pairs.num_shards) == ("large + middle + small", 6)
    items = [item for batch in read(EndlessPairs(pairs, 100), 30) for item in batch["items"]]
    counts = Counter(map(source_of, items))
    for name, weight in WEIGHTS.items():
        share = weight / 10
        assert abs(counts[name] - 3000 * share) < 4 * (3000 * share * (1 - share)) ** 0.5
    small = [item for item in items if source_of(item) == "small"]
    for start in range(0, 560, 7):
        assert len({item["pair_id"] for item in small[start : start + 7]}) == 7, "each pass has each pair once"
    orders = {tuple(item["pair_id"] for item in small[start : start + 7]) for start in range(0, 560, 7)}
    assert len(orders) > 40 and len({item["seed"] for item in small}) == len(small), "in a new order, with new crops"


def test_ids_of_sources_do_not_collide_where_keys_do(tmp_path):
    """The keys of both are 00000, 00001, ...; an image that both have is one image, and no negative of itself."""
    for name, colors in {"a": (1, 2, 3), "b": (4, 5, 3)}.items():
        rows = [{"image": png(color), "caption": f"{name} {row}"} for row, color in enumerate(colors)]
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "train.parquet")
    listed = "".join(f"{name}: {{dataset: {tmp_path / name}, weight: 1}}\n" for name in "ab")
    (tmp_path / "mix.yml").write_text(listed)
    items = [
        item
        for batch in read(EndlessPairs(open_mixture(str(tmp_path / "mix.yml"), "train"), 5), 20)
        for item in batch["items"]
    ]
    ids = {item["captions"][0]: item["pair_id"] for item in items}
    names = {item["captions"][0]: item["name"] for item in items}
    assert len(ids) == 6 and len(set(ids.values())) == 5 and ids["a 2"] == ids["b 2"]
    assert len(set(names.values())) == 6


@pytest.mark.parametrize("kind", ["pair_id", "name"])
def test_sources_with_equal_shards_keys_and_images_find_their_own_tokens(tmp_path, monkeypatch, kind):
    """Shards and keys are alike, image 7 is in both; its pairs are the same image, and no negatives of each other."""
    monkeypatch.chdir(tmp_path)
    for source, numbers in {"a": (0, 1, 7), "b": (2, 3, 7)}.items():
        for folder in (source, f"{source}_tokens"):
            (tmp_path / folder).mkdir()
        images = [{"image": png(number), "caption": f"{source}{number}"} for number in numbers]
        pq.write_table(pa.Table.from_pylist(images), tmp_path / source / "train.parquet")
        names = [item["name"] for item in open_stream(source, "train", shuffle_buffer=0)]
        rows = [
            {
                kind: name if kind == "name" else pair_id_of(png(number)),
                IMAGE_TOKENS: [[number, ord(source)]],
                TOKEN_SOURCE: "{}",
            }
            for name, number in zip(names, numbers, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{source}_tokens" / "part.parquet")
    listed = [f"{name}: {{dataset: {name}, weight: 1, image_tokens: {name}_tokens}}\n" for name in "ab"]
    (tmp_path / "mix.yaml").write_text("".join(listed))
    batches = read(EndlessPairs(open_mixture("mix.yaml", "train"), 5), 20)
    items = {item["captions"][0]: item for batch in batches for item in batch["items"]}
    assert {caption: item[IMAGE_TOKENS] for caption, item in items.items()} == {
        caption: [[int(caption[1:]), ord(caption[0])]] for caption in ("a0", "a1", "a7", "b2", "b3", "b7")
    }
    assert len({item["pair_id"] for item in items.values()}) == 5
    assert items["a7"]["pair_id"] == items["b7"]["pair_id"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("process_index", "num_processes"), [(0, 1), (1, 2)])
def test_from_any_place_comes_what_would_have_come(mix, num_workers, process_index, num_processes):
    def endless() -> EndlessPairs:
        pairs = open_mixture(mix, "train", shuffle_buffer=20, seed=3)
        return EndlessPairs(pairs.split_by_process(process_index, num_processes), 4)

    whole = read(endless(), 60, num_workers)
    states = [json.loads(batch.pop(READER_STATE)) for batch in whole]
    for num_given in (1, 37):
        resumed = endless()
        resumed.go_on(num_given, num_given, {state["worker"]: state for state in states[:num_given]})
        got = read(resumed, 60, num_workers)
        assert [batch["items"] for batch in got[num_given:]] == [batch["items"] for batch in whole[num_given:]]


def test_processes_and_workers_read_parts_that_do_not_overlap(mix):
    """Within a pass: each of four workers reads 48 pairs, and its part of the largest source has 50 or 100."""
    pairs = open_mixture(mix, "train", shuffle_buffer=20)
    seen = []
    for index in range(2):
        batches = read(EndlessPairs(pairs.split_by_process(index, 2), 4), 24, num_workers=2)
        seen += [item["pair_id"] for batch in batches for item in batch["items"] if source_of(item) == "large"]
    assert len(seen) == len(set(seen)) > 60


def test_what_a_mixture_had_to_leave_out_is_counted_together(mix):
    folder = Path(mix).parent
    (folder / "middle" / "train-002.tar").write_bytes(b"no archive")
    pairs = open_mixture(mix, "train", shuffle_buffer=20)
    read(EndlessPairs(pairs, 10), 40)
    assert pairs.report.skipped_shards >= 2


def tokens(folder: Path) -> None:
    for file in folder.glob("*.tar"):
        file.unlink()
    row = {"image": png(1), "caption": "c", IMAGE_TOKENS: [[1, 2]], TOKEN_SOURCE: "{}"}
    pq.write_table(pa.Table.from_pylist([row]), folder / "train.parquet")


def test_what_is_no_mixture_is_refused(mix, monkeypatch):
    file = Path(mix)
    monkeypatch.chdir(file.parent)
    with pytest.raises(ValueError, match="There is no mixture gone.yaml"):
        open_mixture("gone.yaml", "train")
    for content, message in [
        ("", "must hold a name for each source"),
        ("- large", "must hold a name for each source"),
        ("large: 3", "must hold a name for each source"),
        ("a: [", "is no YAML"),
        ("a: {dataset: large}", "mix.yaml: the weight of a must be a number above 0, got None"),
        ("a: {dataset: large, weight: 0}", "weight of a must be a number above 0, got 0"),
        ("a: {dataset: large, weight: .nan}", "weight of a must be a number above 0, got nan"),
        ("a: {dataset: large, weight: .inf}", "weight of a must be a number above 0, got inf"),
        ("a: {dataset: large, weight: true}", "weight of a must be a number above 0, got True"),
        ("a: {dataset: large, weight: '3'}", "weight of a must be a number above 0, got '3'"),
        ("a: {weight: 3}", "a has no dataset"),
        ("a: {dataset: 3, weight: 3}", "dataset of a must be a text, got 3"),
        ("a: {dataset: large, weight: 3, columns: x}", "a has no option columns; there are weight, dataset"),
        ("a: {dataset: large, weight: 1}\na: {dataset: small, weight: 1}", "line 2: a is there twice"),
        ("a: {dataset: large, weight: 1, weight: 2}", "line 1: weight is there twice"),
        ("a: {dataset: ./nowhere, weight: 1}", "mix.yaml: a: .*does not exist"),
        ("a: {dataset: large, weight: 1, caption_column: alt}", "mix.yaml: a: .*no caption in 'alt'"),
        (
            "a: {dataset: large, weight: 1}\nb: {dataset: middle, weight: 1, split: validation}",
            "mix.yaml: b: .*validation",
        ),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_mixture("mix.yaml", "train")
    tokens(file.parent / "small")
    file.write_text("".join(f"{name}: {{dataset: {name}, weight: 1}}\n" for name in WEIGHTS))
    with pytest.raises(ValueError, match="and large, middle has none: give them to all, or none"):
        open_mixture("mix.yaml", "train")
    monkeypatch.setitem(sys.modules, "torchdata", None)
    with pytest.raises(ValueError, match=r"needs torchdata: pip install 'modeling-cots\[mixtures\]'"):
        open_mixture("mix.yaml", "train")
    assert is_mixture("mix.yaml") and is_mixture("Mix.YML") and not is_mixture("shards/{a,b}.tar")
