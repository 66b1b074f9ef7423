"""`cots-search embed`: the rows of `cots-search index`, each once, whatever is killed. Ray runs in slow tests only."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shard_collection import png_of, write_parquet, write_photos, write_shards, write_tar

pytest.importorskip("faiss")
pytest.importorskip("ray")

from modeling_cots import COTSModel, COTSProcessor, ScenesDataset, SearchIndex  # noqa: E402
from modeling_cots.data import ray_parts  # noqa: E402
from modeling_cots.search import cli, ray_embedding  # noqa: E402
from modeling_cots.search.options import build_parser  # noqa: E402
from modeling_cots.search.parquet_rows import INFO_KEY  # noqa: E402

NUM_IMAGES, PER_PART = 48, 4
LARGE_SIDE = 1_200  # takes long enough to decode that a run can be met in its middle


def options(words: str) -> argparse.Namespace:
    return build_parser().parse_args(f"embed {words} --model model --output out --checkpoint noted".split())


def embed_here(words: str) -> tuple[pa.Table, list]:
    """The rows that one actor would write, without Ray, and what it left out."""
    args = options(words)
    parts, read, source = ray_embedding._find_parts(args, cli.open_images)
    info = ray_embedding.describe_model(*cli.load_model("model"))
    worker = ray_embedding._EmbeddingWorker(
        lambda: cli.load_model("model"), read, source, info, args.batch_size, args.num_workers, args.thumbnails
    )
    done = [worker(table) for part in parts for table in part()]
    tables = [table for table, _ in done if len(table)]
    rows = pa.concat_tables(tables, promote_options="default")
    rows = rows.replace_schema_metadata({INFO_KEY: json.dumps(info)})  # as all files of the command have it
    return rows, [each for _, skipped in done for each in skipped]


def rows_of(index: str) -> dict[str, dict]:
    """The entries of an index by their names, with their embeddings."""
    with SearchIndex(index, COTSModel.from_pretrained("model"), COTSProcessor.from_pretrained("model")) as opened:
        rows = opened.store._newest().rows
        entries = rows.take(np.arange(len(rows)))
        return {
            entry["name"]: {**entry, "embedding": embedding}
            for entry, embedding in zip(entries, rows.embeddings(np.arange(len(rows))), strict=True)
        }


def assert_same_rows(index: str, expected: str) -> None:
    """Two indexes have the same entries, but for the last bit of their embeddings."""
    found, wanted = rows_of(index), rows_of(expected)
    assert found.keys() == wanted.keys()
    for name, row in wanted.items():
        np.testing.assert_allclose(found[name].pop("embedding"), row.pop("embedding"), atol=1e-6)
    assert found == wanted


@pytest.fixture
def folder(saved_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["folder", "shards", "table"])
def test_an_actor_makes_the_rows_of_an_index(folder, form, capsys, monkeypatch):
    monkeypatch.setattr(ray_parts, "ROWS_PER_PART", 5)
    if form == "folder":
        write_photos(folder / "data", 12)
        data = "data"
    elif form == "shards":
        write_shards(folder / "data", 2, 6)
        data = "data/{000..001}.tar"
    else:
        data = write_parquet(folder / "data.parquet", 12).name
    table, skipped = embed_here(data)
    assert [name for name, _ in skipped] == ([str(folder / "data/broken.png")] if form == "folder" else [])
    (folder / "out").mkdir()
    pq.write_table(table, "out/0.parquet")
    cli.main("load IDX out".split())
    cli.main(f"index {data} --model model --index EXPECTED".split())
    assert "Added 12 images; IDX has 12." in capsys.readouterr().out
    assert_same_rows("IDX", "EXPECTED")
    if form == "table":
        assert {row["year"] for row in rows_of("IDX").values()} == set(range(2000, 2012))


def test_shards_at_addresses_are_read_one_by_one(folder, capsys):
    """Keys that occur again get a number, and what is broken or refused is named."""
    write_shards(folder / "data", 2, 3)
    broken = write_tar(folder / "data" / "002.tar", {"000.png": png_of(9), "001.png": b"no image"})
    broken.write_bytes(broken.read_bytes()[:-1_024][: 3 * 512 + 512 * (len(png_of(9)) // 512)])
    write_parquet(folder / "data" / "table.parquet", 4)
    place = f"file://{folder}/data"
    table, skipped = embed_here(f"{place}/{{000..002}}.tar")
    expected = [
        f"{place}/{shard:03d}.tar/{number:03d}" for shard in range(2) for number in range(3 * shard, 3 * shard + 3)
    ]
    names = table["name"].to_pylist()
    assert names[:6] == expected and len(names) == len(set(names))
    assert table["captions"].to_pylist()[4] == ["caption 4"]
    assert set(table["source"].to_pylist()) == {place + "/{000..002}.tar[train]"}
    assert any(name.startswith(f"{place}/002.tar") for name, _ in skipped)
    table, _ = embed_here(f"{place}/table.parquet")
    assert table["year"].to_pylist() == [2000, 2001, 2002, 2003]
    write_tar(folder / "data" / "again.tar", {"a.png": png_of(0), "b.png": png_of(1)})
    twice = folder / "data" / "twice.parquet"
    pq.write_table(pa.table({"image": [png_of(0), None], "caption": ["a", "b"]}), twice)
    table, skipped = embed_here(f"{place}/twice.parquet")
    assert table["name"].to_pylist() == [f"{place}/twice.parquet/0"] and "has no image" in skipped[0][1]


def test_says_what_addresses_are_refused(folder):
    write_shards(folder / "data", 1, 1)
    for words, message in (
        (f"file://{folder}/data/*.zip", "No file matches"),
        (f"file://{folder}/data/000.tar --split train[:5]", "have no length to cut"),
        (f"file://{folder}/data/000.tar --dataset_revision v1", "000.tar"),
        ("http://127.0.0.1:1/a.tar?c={1,2}", "differ in the query"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_here(words)


def test_another_model_on_another_machine_is_refused(folder):
    other = {**ray_embedding.describe_model(*cli.load_model("model")), "model_identity": "else"}
    with pytest.raises(ValueError, match="is another one on"):
        ray_embedding._EmbeddingWorker(lambda: cli.load_model("model"), None, "s", other, 4, 0, 0)


# With Ray


@pytest.fixture
def large(folder, monkeypatch):
    """Images that take their time, in parts of a few."""
    (folder / "photos").mkdir()
    for number in range(NUM_IMAGES):
        image = ScenesDataset("train", number + 1, 32)[number]["image"]
        image.resize((LARGE_SIDE, LARGE_SIDE), Image.Resampling.NEAREST).save(folder / "photos" / f"{number:03d}.png")
    (folder / "photos" / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(ray_parts, "ROWS_PER_PART", PER_PART)
    monkeypatch.setattr(ray_embedding, "ROWS_PER_PART", PER_PART)
    return folder


EMBED = "embed photos --model model --output out --checkpoint noted --actors 2 --batch_size 4 --dtype float32"
DRIVER = f"""
import sys
from modeling_cots.data import ray_parts
from modeling_cots.search import cli, ray_embedding
ray_parts.ROWS_PER_PART = ray_embedding.ROWS_PER_PART = {PER_PART}
cli.main(sys.argv[1:])
"""


def wait_for_files(folder: Path, least: int, stop: threading.Event | None = None) -> None:
    """Return as soon as the checkpoint has noted some whole files."""
    from watchfiles import watch  # is installed with Ray Serve

    folder.mkdir(exist_ok=True)
    for _ in watch(folder, stop_event=stop, debounce=50):
        if sum(".pending." not in path.name for path in folder.iterdir()) >= least:
            return


def names_written(output: Path) -> Counter[str]:
    return Counter(name for path in output.glob("*.parquet") for name in pq.read_table(path)["name"].to_pylist())


def assert_every_name_once(output: Path) -> None:
    names = names_written(output)
    assert len(names) == NUM_IMAGES and set(names.values()) == {1}


@pytest.mark.slow
def test_a_killed_actor_costs_nothing(ray_address, large, capsys):
    killed = []

    def kill_an_actor():
        wait_for_files(large / "noted", 1)
        processes = psutil.process_iter(["cmdline"])  # of one that has ended in between, there is none
        actors = [each for each in processes if "".join(each.info["cmdline"] or []).startswith("ray::MapWorker")]
        os.kill(actors[0].pid, signal.SIGKILL)
        killed.append(actors[0].pid)

    (large / "noted").mkdir()
    thread = threading.Thread(target=kill_an_actor)
    thread.start()
    cli.main(EMBED.split())
    thread.join()
    assert len(killed) == 1
    assert f"Embedded {NUM_IMAGES} images; out has {NUM_IMAGES}." in capsys.readouterr().out
    assert_every_name_once(large / "out")
    cli.main("load IDX out".split())
    cli.main("index photos --model model --index EXPECTED --dtype float32".split())
    assert_same_rows("IDX", "EXPECTED")

    # Again: nothing is new, and another model is refused.
    cli.main(EMBED.split())
    assert f"Embedded 0 images; out has {NUM_IMAGES}." in capsys.readouterr().out
    with pytest.raises(ValueError, match="knows of none: name the checkpoint"):
        cli.main(EMBED.replace("noted", "fresh").split())
    with pytest.raises(ValueError, match="is of rows that are not in"):
        cli.main(EMBED.replace("--output out", "--output fresh").split())
    other = COTSModel.from_pretrained("model")
    other.text_projection.weight.data += 1
    other.save_pretrained("other")
    COTSProcessor.from_pretrained("model").save_pretrained("other")
    with pytest.raises(ValueError, match="by another command, or with another model"):
        cli.main(EMBED.replace("--model model", "--model other").split())


@pytest.mark.slow
def test_a_killed_driver_goes_on(ray_address, large, capsys):
    """Its output and its checkpoint are at addresses, as they are on a cluster."""
    command = EMBED.replace("--output out", f"--output file://{large}/out")
    command = command.replace("--checkpoint noted", f"--checkpoint file://{large}/noted").split()
    (large / "noted").mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *command],
        env={**os.environ, "RAY_ADDRESS": ray_address},
        stderr=subprocess.DEVNULL,
    )
    wait_for_files(large / "noted", 2)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert 0 < len(names_written(large / "out")) < NUM_IMAGES
    cli.main(command)
    assert f"out has {NUM_IMAGES}." in capsys.readouterr().out
    assert_every_name_once(large / "out")
    assert not [path for path in (large / "noted").iterdir() if ".pending." in path.name]
    cli.main("load IDX out".split())
    assert f"Added {NUM_IMAGES} images" in capsys.readouterr().out
