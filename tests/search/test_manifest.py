"""Damaged index folders: the right answer, or one sentence that names the file and what to do."""

import json
import random
import re
import shutil

import pytest
import torch
from PIL import Image
from search_stores import INFO, build_without_lists, fill, make_rows, make_vectors

from modeling_cots import COTSModel
from modeling_cots.search.cli import main
from modeling_cots.search.conditions import as_conditions
from modeling_cots.search.embedding import row_ids_of
from modeling_cots.search.manifest import DamagedIndexError, Manifest, parse_manifest, read_manifest

pytest.importorskip("faiss")

from modeling_cots.search.faiss_store import FaissStore
from modeling_cots.search.faiss_vectors import FaissVectors

VECTORS = make_vectors(130)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two parts, deleted rows, and binary codes of before, which have thresholds."""
    folder = tmp_path_factory.mktemp("whole") / "index"
    store = FaissStore.create(folder, INFO, "binary")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FaissVectors, "_build", build_without_lists)
        fill(store, make_rows(VECTORS[:100], year=[number % 4 for number in range(100)]))
    fill(store, make_rows(VECTORS[100:], first=100))
    store.delete(row_ids_of(["pic3", "pic101"]))
    return folder


def look(folder) -> list:
    """All that an index answers."""
    store, where = FaissStore(folder), as_conditions("year == 2")
    found = store.search(VECTORS[:3], 200, []) + store.search(VECTORS[:1], 200, where)
    return [len(store), found, store.find(where).tolist(), store.has(row_ids_of(["pic3", "pic4"])).tolist()]


def damages(path, seed: int):
    """Functions that damage a file."""
    content, rng = path.read_bytes(), random.Random(seed)

    def flip() -> None:
        changed = bytearray(content)
        for place in rng.sample(range(len(content)), min(3, len(content))):
            changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)

    def become_a_folder() -> None:
        path.unlink()
        path.mkdir()

    yield path.unlink
    yield become_a_folder
    if content:
        yield from (flip, flip, flip)
        for kept in (
            content[:-1],
            content[: len(content) // 2],
            content[1:],
            b"",
            content + b"\0",
            b"\0" * len(content),
        ):
            yield lambda kept=kept: path.write_bytes(kept)


def test_every_damage_of_one_file_is_noticed(whole, tmp_path):
    right, num_noticed = look(whole), {}
    for number, file in enumerate(sorted(path for path in whole.rglob("*") if path.is_file())):
        name = file.relative_to(whole)
        for kind in range(len(list(damages(file, number)))):
            folder = tmp_path / f"{number}-{kind}"
            shutil.copytree(whole, folder)
            list(damages(folder / name, 1000 * number + kind))[kind]()
            num_noticed[str(name)] = num_noticed.get(str(name), 0) + check_damaged(folder, str(name), right)
    assert {name for name, count in num_noticed.items() if count == 0} == {
        "dataset_info.json",
        "state.json",
        "writer.lock",
    }
    assert all(count >= 8 for count in num_noticed.values() if count > 0), num_noticed


def check_damaged(folder, name: str, right: list) -> bool:
    """Whether the damage of a file was noticed; if not, the answers are right. A rebuild mends what is derived."""
    try:
        assert look(folder) == right
        return False
    except ValueError as error:
        said = str(error)
    assert name in said or (name == "index.json" and "cannot be read" in said)
    assert "\n" not in said and said.endswith(".") and re.search("restore it|rebuild|index", said)
    if name.startswith(("vectors", "thresholds")) and not (folder / name).is_dir():
        assert f"`cots-search rebuild {folder}`" in said
        FaissStore(folder).rebuild("binary")
        assert look(folder)[0] == right[0] and look(folder)[2:] == right[2:]
    return True


def test_swapped_files_are_noticed(whole, tmp_path):
    right = look(whole)
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    read = [name for name in files if not name.startswith(("state", "dataset_info", "writer"))]
    for first in read:
        for second in read:
            if first >= second:
                continue
            folder = tmp_path / "swapped"
            shutil.copytree(whole, folder)
            shutil.copy(whole / first, folder / second)
            shutil.copy(whole / second, folder / first)
            with pytest.raises(DamagedIndexError, match=f"{re.escape(first)}|{re.escape(second)}"):
                assert look(folder) == right
            shutil.rmtree(folder)


def test_files_of_another_index_are_noticed(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(FaissVectors, "_build", build_without_lists)
    other = FaissStore.create(tmp_path / "other", INFO, "binary")
    fill(other, make_rows(make_vectors(130, seed=1), year=[2] * 130))
    for pattern in ("index.json", "data-*.arrow", "metadata/*.parquet", "vectors-*.faiss", "thresholds-*.npy"):
        folder = tmp_path / "mixed"
        shutil.copytree(whole, folder)
        path, source = next(folder.glob(pattern)), next(other.folder.glob(pattern))
        shutil.copy(source, path)
        with pytest.raises(DamagedIndexError, match=r"is damaged|is missing"):
            look(folder)
        shutil.rmtree(folder)


def test_a_folder_of_metadata_alone_is_missing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "metadata")
    with pytest.raises(DamagedIndexError, match=r"metadata/data-.*\.parquet' is missing: restore it"):
        look(tmp_path / "index")


def test_other_versions_are_refused(tmp_path, monkeypatch):
    old = {"format": 1, "model": "m", "model_identity": "i", "dim": 16, "engine": "exact"}
    (tmp_path / "index.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="made by an older version.*make a new one"):
        FaissStore(tmp_path)
    Manifest(generation=1, info=INFO).write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("modeling_cots.search.manifest.LAYOUT", 4)
        with pytest.raises(ValueError, match="older version, whose ids of two images could be the same: make a new"):
            FaissStore(tmp_path)
    monkeypatch.setattr("modeling_cots.search.manifest.LAYOUT", 1)
    with pytest.raises(ValueError, match="made by a newer version: update"):
        FaissStore(tmp_path)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ('"generation": ', '"generation": 1'),
        ('"dim": 16', '"dim": 17'),
        ('"model": "m"', '"model": "n"'),
        ('"engine": "binary"', '"engine": "exact"'),
        ('"num_vectors": 130', '"num_vectors": 100'),
        ('"deleted": "deleted-', '"deleted": null, "x": "'),
        ('"checksum": ', '"checksum": 1'),
    ],
)
def test_no_value_of_the_manifest_changes_unnoticed(whole, tmp_path, written, instead):
    shutil.copytree(whole, tmp_path / "index")
    content = (whole / "index.json").read_text()
    (tmp_path / "index" / "index.json").write_text(content.replace(written, instead))
    assert written in content
    with pytest.raises(DamagedIndexError, match=r"index.json' is damaged: restore it from a copy"):
        FaissStore(tmp_path / "index")


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = Manifest(3, INFO, (("data-1", 4),), "d", "v", None, 4, {"d": (1, 2), "v": (3, 4)})
    manifest.write(tmp_path)
    assert parse_manifest(read_manifest(tmp_path), tmp_path) == manifest
    replaced = manifest.with_files({"w": (5, 6)}, vectors="w")
    assert replaced.files == {"d": (1, 2), "w": (5, 6)} and replaced.num_rows == 4


@pytest.fixture
def photos(tiny_config, tiny_processor, tmp_path, monkeypatch):
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.effect_noise((32, 32), 20 + number).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    main("index photos --model model --index IDX".split())
    return tmp_path


def test_the_command_line_says_it_in_one_line(photos, capsys):
    files = [str(path.relative_to(photos)) for path in (photos / "IDX").rglob("*") if path.is_file()]
    commands = [
        "index photos --model model --index IDX",
        "query IDX dog",
        "add IDX photos",
        "delete IDX photos/1.png",
        "rebuild IDX",
    ]
    for name in files:
        content = (photos / name).read_bytes()
        for damaged in (None, content[: len(content) // 2], content[:-4] + b"oops"):
            for command in commands:
                (photos / name).unlink(missing_ok=True)
                if damaged is not None:
                    (photos / name).write_bytes(damaged)
                shutil.copytree("IDX", "damaged")
                try:
                    main(command.replace("IDX", "damaged").split())
                except ValueError as error:
                    assert name.removeprefix("IDX/") in str(error) and "\n" not in str(error)
                shutil.rmtree("damaged")
        (photos / name).write_bytes(content)
    main("query IDX --image photos/2.png --top 1".split())
    assert "1.000" in capsys.readouterr().out.splitlines()[-1]
