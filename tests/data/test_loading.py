"""Tables in the cache, slices, repositories, and the Hub by its real client."""

import json
import os

import pytest
from dataset_hub import OWNER, dataset_hub
from pair_writers import (
    CAPTIONS,
    IMAGES,
    NAMES,
    check_pairs,
    embedded,
    write_images,
    write_jsonl,
    write_parquet,
    write_tar,
)
from programs import run_python

from modeling_cots.data.pairs import open_pairs

CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '*.jsonl'\n---\n"


def captions_of(dataset, split: str = "train") -> list[list[str]]:
    return [item["captions"] for item in open_pairs(str(dataset), split)]


@pytest.mark.parametrize("card", [CARD, None])
def test_two_folders_of_one_name_are_two_data_sets(tmp_path, card):
    for place in ("one", "two"):
        write_images(tmp_path / place / "photos")
        write_jsonl(tmp_path / place / "photos" / "pairs.jsonl", [{"image": NAMES[0], "caption": f"of {place}"}])
        if card is not None:
            (tmp_path / place / "photos" / "README.md").write_text(card)
    for place in ("one", "two", "one"):
        assert captions_of(tmp_path / place / "photos") == [[f"of {place}"]]


def test_a_file_that_is_written_anew_is_read_anew(tmp_path):
    write_images(tmp_path)
    for caption in ("old", "new"):
        write_jsonl(tmp_path / "pairs.jsonl", [{"image": NAMES[0], "caption": caption}])
        assert captions_of(tmp_path / "pairs.jsonl") == [[caption]]


def test_a_table_is_made_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", {"image": embedded(), "captions": CAPTIONS})
    check_pairs(open_pairs(str(tmp_path / "a.parquet"), "train"))

    def fail(*arguments):
        raise AssertionError("read again")

    monkeypatch.setattr("modeling_cots.data.tables.canonical_row", fail)
    check_pairs(open_pairs(str(tmp_path / "a.parquet"), "train"))


@pytest.mark.parametrize(
    ("split", "rows"), [("train[1:]", [1, 2]), ("train[:1]", [0]), ("train[34%:]", [1, 2]), ("train[-1:]", [2])]
)
def test_slices(tmp_path, split, rows):
    write_parquet(tmp_path / "train.parquet", {"image": embedded(), "captions": CAPTIONS})
    assert captions_of(tmp_path, split) == [CAPTIONS[row] for row in rows]
    with pytest.raises(ValueError, match="is no slice of a split"):
        open_pairs(str(tmp_path), "train[oops]")
    with pytest.raises(ValueError, match="is empty"):
        open_pairs(str(tmp_path), "train[3:]")


def test_a_repository_of_images_with_metadata(tmp_path):
    write_images(tmp_path / "data")
    rows = [{"file_name": name, "caption": captions} for name, captions in zip(NAMES, CAPTIONS, strict=True)]
    write_jsonl(tmp_path / "data" / "metadata.jsonl", rows)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*\n---\n"
    )
    check_pairs(open_pairs(str(tmp_path), "train"))
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        open_pairs(str(tmp_path), "test")


def test_configurations_are_chosen_by_name(tmp_path):
    write_images(tmp_path)
    for name in ("small", "large"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"image": NAMES[0], "caption": name}])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert open_pairs(str(tmp_path), "train", dataset_config="large")[0]["captions"] == ["large"]
    with pytest.raises(
        ValueError, match="has the configurations small, large: name one as dataset_config; none is given"
    ):
        open_pairs(str(tmp_path), "train")


SHARD = {f"{i}.{kind}": content for i in range(3) for kind, content in (("png", IMAGES[i]), ("txt", b"x"))}
OPEN_FROM_HUB = """
import json, sys
from modeling_cots.image_reading_cots import read_image
from modeling_cots.data.pairs import open_pairs
for repo_id in sys.argv[1:]:
    items = list(open_pairs(repo_id, "train"))
    found = [item["captions"] for item in items if read_image(item["image"])]
    print("FOUND", json.dumps([found, items[0]["name"].rpartition("/")[2]]))
"""


@pytest.mark.slow
def test_data_sets_of_the_hub_are_opened_by_the_real_client_and_again_offline(tmp_path):
    """In a process of its own, as huggingface_hub reads its endpoint when it is imported."""
    hub = tmp_path / "hub"
    write_tar(
        hub / "shards" / "train.tar", {f"{i}.{k}": c for i in range(3) for k, c in (("png", IMAGES[i]), ("txt", b"x"))}
    )
    write_parquet(hub / "tables" / "train.parquet", {"image": embedded(), "captions": CAPTIONS})
    write_images(hub / "images" / "train")
    rows = [{"file_name": name, "caption": captions} for name, captions in zip(NAMES, CAPTIONS, strict=True)]
    write_jsonl(hub / "images" / "train" / "metadata.jsonl", rows)
    expected = [[[["x"]] * 3, "0.png"], [CAPTIONS, "a.png"], [CAPTIONS, "a.png"]]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    names = [f"{OWNER}/{name}" for name in ("shards", "tables", "images")]
    with dataset_hub(hub) as address:
        environment = {**kept, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        online = run_python("-c", OPEN_FROM_HUB, *names, env=environment)
    offline = run_python("-c", OPEN_FROM_HUB, *names, env={**environment, "HF_HUB_OFFLINE": "1"})
    for result in (online, offline):
        found = [json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("FOUND ")]
        assert found == expected
