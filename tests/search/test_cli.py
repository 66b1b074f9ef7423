"""`cots-search` from the first image to the page, in this process."""

import io
import itertools
import json
import re
import shlex
import socket
from contextlib import closing
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from programs import TORCHRUN, run_python
from video_files import write_video

from modeling_cots import COTSModel, ScenesDataset, SearchIndex
from modeling_cots.search.cli import main
from modeling_cots.search.embedding import ImageFolder
from modeling_cots.search.stores import open_store

pytest.importorskip("faiss")


@pytest.fixture
def folder(saved_model, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for item in ScenesDataset("train", 6, 32):
        item["image"].save(tmp_path / "photos" / f"{item['name']}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_index_query_add_delete_rebuild(folder, capsys):
    main("index photos --model model --index IDX --batch_size 4".split())
    assert "Added 6 images; IDX has 6." in capsys.readouterr().out
    main(["query", "IDX", "a red circle", "--top", "3", "--html", "out.html"])
    printed = capsys.readouterr().out
    assert printed.count("train-0000") == 3 and "The page is in out.html" in printed
    assert "“a red circle”" in (folder / "out.html").read_text(encoding="utf-8")
    main("query IDX --image photos/train-00004.png --top 1".split())
    assert "1.  1.000" in (printed := capsys.readouterr().out) and "train-00004.png" in printed

    # a folder with captions and metadata, added to the same index
    (folder / "more").mkdir()
    rows = []
    for item in ScenesDataset("validation", 4, 32):
        item["image"].save(folder / "more" / f"{item['name']}.png")
        rows.append({"file_name": f"{item['name']}.png", "text": item["captions"], "year": 2020 + item["pair_id"]})
    rows[1]["text"] = []  # an image without a caption is an image
    (folder / "more" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    main("add IDX more".split())
    assert "Added 4 images; IDX has 10." in capsys.readouterr().out
    main(["query", "IDX", "a red circle", "--where", "year >= 2021", "--where", "year != 2023"])
    printed = capsys.readouterr().out.splitlines()
    assert sorted(line.split("/")[-1][:16] for line in printed) == ["validation-00001", "validation-00002"]

    main(["delete", "IDX", "photos/train-00004.png"])
    with pytest.raises(ValueError, match="finds 1 of 9 images .*validation-00001.png.: nothing is deleted. Add --yes"):
        main(["delete", "IDX", "--where", "year == 2021"])
    capsys.readouterr()
    main(["delete", "IDX", "--where", "year == 2021", "--dry-run"])
    assert re.fullmatch(r".*validation-00001.png\nThese 1 of 9 .* nothing is.\n", capsys.readouterr().out)
    main(["delete", "IDX", "photos/train-00002.png", "--dry-run"])
    assert re.fullmatch(r".*train-00002.png\nThese 1 of 9 .* nothing is.\n", capsys.readouterr().out)
    main(["delete", "IDX", "--where", "year == 2021", "--yes"])
    assert "Deleted 1 images; 8 are left." in capsys.readouterr().out
    main("rebuild IDX --engine hnsw".split())
    assert "index type 'hnsw' and 8 images" in capsys.readouterr().out
    main("query IDX --image photos/train-00004.png --top 20".split())
    assert len(capsys.readouterr().out.splitlines()) == 8
    main("index photos --model model --index IDX".split())  # the deleted file is still in the folder, and stays so
    said = capsys.readouterr().out
    assert "1 of 6 images were deleted from it and stay so" in said and "Added 0 images; IDX has 8." in said
    main("index photos --model model --index IDX --restore".split())
    assert "Added 1 images; IDX has 9." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("query nowhere dog", "no index in 'nowhere'"),
        ("index nothing/ --model model --index I", "does not exist"),
        ("index photos --model nothing --index I", "model=nothing does not exist"),
        ("index photos --model model --index I --engine magic", "must be one of exact"),
        ("index photos --model model --index photos", "not an empty folder: name a new folder"),
        ("delete nowhere x", "no index"),
    ],
)
def test_says_what_is_wrong_in_one_line(folder, command, message):
    with pytest.raises(ValueError, match=message):
        main(command.split())


def test_a_path_is_never_taken_for_a_text(folder, capsys):
    main("index photos --model model --index IDX".split())
    capsys.readouterr()
    for text, state in [
        ("photos/train-00004.png", "which is a file"),
        ("photos/trian-00004.png", "which looks like a file that is not there"),
        ("dog.JPG", "which looks like a file"),
        ("my dog.webp", "which looks like a file"),
        ("/photos/dog", "which looks like a file"),
        ("./dog", "which looks like a file"),
        ("~/dog", "which looks like a file"),
        ("C:\\photos\\dog", "which looks like a file"),
        ("https://host/dog", "which looks like a file"),
        ("data:image/png;base64," + "A" * 100_000, "which looks like a file"),
    ]:
        with pytest.raises(ValueError, match=state) as caught:
            main(["query", "IDX", text])
        assert "--image" in str(caught.value) and len(str(caught.value)) < 500
    for text in ("a black/white cat", "red. green", "10:30", "and/or"):
        main(["query", "IDX", text])
    with pytest.raises(ValueError, match="No such file"):
        main("query IDX --image photos/trian-00004.png".split())


def test_images_of_a_data_set_are_not_taken_for_files_that_have_moved(folder, capsys):
    """Their names are those of rows, behind the data set's and the split's."""
    rows = []
    for item in ScenesDataset("validation", 4, 32):
        (folder / "more").mkdir(exist_ok=True)
        item["image"].save(folder / "more" / f"{item['name']}.png")
        rows.append({"file_name": f"{item['name']}.png", "text": item["captions"]})
    (folder / "more" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    main("index more --model model --index IDX".split())
    main("query IDX dog --top 2".split())
    printed = capsys.readouterr()
    assert "more" in printed.out and "no longer" not in printed.err


def test_a_folder_that_has_moved(folder, capsys):
    main("index photos --model model --index IDX".split())
    main("query IDX dog --top 2".split())
    assert capsys.readouterr().err.count("no longer") == 0
    (folder / "photos").rename(folder / "old 'photos'")
    main("query IDX dog --top 2 --html out.html".split())
    said = capsys.readouterr().err
    assert "2 of these images are no longer at their paths" in said and "index the folder at its new place" in said
    (command,) = re.findall("cots-search (delete .*)", said)
    main(shlex.split(command))
    assert "Deleted 6 images; 0 are left." in capsys.readouterr().out


def test_deletes_by_a_path_whose_file_is_gone_and_names_what_is_not_there(folder, capsys):
    main("index photos --model model --index IDX".split())
    (folder / "photos" / "train-00004.png").unlink()
    main("delete IDX photos/train-00004.png".split())
    assert "Deleted 1 images; 5 are left." in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 2 names are not in the index .photos/trian-1.png.: give the names"):
        main("delete IDX photos/train-00001.png photos/trian-1.png".split())
    assert "Deleted 1 images; 4 are left." in capsys.readouterr().out


def test_an_image_of_a_captioned_folder_goes_by_its_path_however_the_folder_is_named(folder, capsys):
    names = sorted(path.name for path in (folder / "photos").iterdir())
    rows = [json.dumps({"file_name": name, "text": "a drawing"}) for name in names]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    main("index photos --model model --index IDX".split())
    main(["add", "IDX", str(folder / "photos")])
    assert "6 of 6 images are in the index already" in capsys.readouterr().out
    main(f"delete IDX photos/{names[0]} {folder}/photos/{names[1]}".split())
    assert "Deleted 2 images; 4 are left." in capsys.readouterr().out


def test_refuses_another_model_and_index_type(folder, tiny_config, tiny_processor):
    main("index photos --model model --index IDX".split())
    torch.manual_seed(5)
    COTSModel(tiny_config).save_pretrained(folder / "other")
    tiny_processor.save_pretrained(folder / "other")
    with pytest.raises(ValueError, match="another one"):
        main("query IDX dog --model other".split())
    with pytest.raises(ValueError, match="rebuild IDX --engine hnsw"):
        main("index photos --model model --index IDX --engine hnsw".split())


def test_indexes_shards_and_tables(folder, capsys):
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    def encoded(seed: int) -> bytes:
        file = io.BytesIO()
        Image.effect_noise((32, 32), 20 + seed).convert("RGB").save(file, "PNG")
        return file.getvalue()

    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for number in range(3):
                for suffix, content in (("png", encoded(number)), ("txt", b"a caption")):
                    info = tarfile.TarInfo(f"{shard}{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    main(["index", "train-*.tar", "--model", "model", "--index", "IDX"])
    assert "Added 6 images" in capsys.readouterr().out
    table = {
        "image": [{"bytes": encoded(9), "path": None}, {"bytes": b"broken", "path": "b.png"}],
        "place": ["Oslo"] * 2,
    }
    pq.write_table(pa.table(table), folder / "train.parquet")
    main(["add", "IDX", "train.parquet"])  # without captions
    assert "Added 1 images; IDX has 7." in capsys.readouterr().out
    main(["query", "IDX", "x", "--where", "place == Oslo"])
    assert "row 0" in capsys.readouterr().out


@pytest.fixture
def no_model(monkeypatch):
    """Nothing may load a model."""
    monkeypatch.setattr("modeling_cots.search.cli.load_model", Mock(side_effect=AssertionError("loads a model")))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("query IDX photos/train-00001.png", "which is a file"),
        ("query IDX \udce9", "bytes that are not UTF-8"),
        ("query IDX --image broken.png", "UnidentifiedImageError"),
        ("query IDX dog --where color==red", "no metadata 'color'"),
        ("query IDX dog --where red", "A condition reads like"),
        ("query photos dog", "no index in 'photos'"),
        ("add IDX empty", "has no captions|has no image|no metadata"),
        ("add photos photos", "no index in 'photos'"),
        ("index nothing.parquet --model model --index NEW", "does not exist"),
        ("index photos --model model --index NEW --engine magic", "must be one of exact"),
        ("index photos --model model --index NEW --target_recall 0.9", "'exact' compares all vectors exactly"),
        ("index photos --model model --index IDX --target_recall 0.9", "'exact' compares all vectors exactly"),
        ("rebuild IDX --engine hnsw --target_recall 0.9", "'hnsw' rescores no candidates"),
        ("rebuild IDX --engine magic --target_recall 0.9", "must be one of exact"),
        ("index photos --model model --index IDX --engine hnsw", "rebuild IDX --engine hnsw"),
        ("index photos --model model --index photos", "name a new folder"),
        ("serve photos", "no index in 'photos'"),
        ("serve IDX --host 203.0.113.7", "Cannot listen at 203.0.113.7"),
    ],
)
def test_refuses_before_a_model_is_loaded(folder, no_model, tiny_processor, command, message):
    model = COTSModel.from_pretrained("model")
    SearchIndex.create("IDX", model, tiny_processor).add(ImageFolder("photos"), progress=False)
    (folder / "empty").mkdir()
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=message):
        main(command.split())


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(folder, no_model, tiny_processor):
    SearchIndex.create("IDX", COTSModel.from_pretrained("model"), tiny_processor).close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"Cannot listen at 127.0.0.1, port {port} .*: give another --port"):
            main(["serve", "IDX", "--port", str(port)])


def test_a_model_that_has_moved_is_named(folder, tiny_processor):
    SearchIndex.create("IDX", COTSModel.from_pretrained("model"), tiny_processor).add(ImageFolder("photos"))
    (folder / "model").rename(folder / "moved")
    with pytest.raises(ValueError, match="model=.*model does not exist; did you mean .*moved"):
        main("query IDX dog".split())
    main("query IDX dog --model moved".split())


def test_an_empty_index_says_so(folder, no_model, tiny_processor, capsys):
    SearchIndex.create("IDX", COTSModel.from_pretrained("model"), tiny_processor).close()
    main("query IDX dog".split())
    assert capsys.readouterr().out == "IDX has no images: add some by `cots-search add IDX PHOTOS/`.\n"


def test_answers_the_lines_of_the_input(folder, capsys, monkeypatch):
    main("index photos --model model --index IDX".split())
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("a red circle\n\n  犬 dog \n"))
    main("query IDX --top 2".split())
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == ["a red circle:", "犬 dog:"] and len(lines) == 6
    assert "1 of 2 words is unknown to this model: 犬." in said.err
    main(["query", "IDX", "a red circle", "--top", "2"])
    assert capsys.readouterr().out.splitlines() == lines[1:3]

    monkeypatch.setattr("sys.stdin", io.StringIO("dog.png\na dog\n"))
    with pytest.raises(ValueError, match="1 of 2 queries were refused"):
        main("query IDX".split())
    said = capsys.readouterr()
    assert "which looks like a file" in said.err and len(said.out.splitlines()) == 2 + 6
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="There is no query: give a text or --image"):
        main("query IDX".split())
    # Bytes of another encoding cost one line.
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\na dog\n"), encoding="utf-8"))
    main("query IDX".split())
    assert capsys.readouterr().out.startswith("caf\\xe9:\n")


@pytest.mark.parametrize("command", ["index photos --model model --index IDX", "add IDX photos"])
def test_an_interrupt_says_how_far_it_is(folder, capsys, monkeypatch, tiny_processor, command):
    SearchIndex.create("IDX", COTSModel.from_pretrained("model"), tiny_processor).close()
    read, calls = ImageFolder.__getitem__, itertools.count()

    def stop(dataset, index):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return read(dataset, index)

    monkeypatch.setattr(ImageFolder, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*command.split(), "--batch_size", "2"])
    assert "4 of 6 are in; run the same command to go on" in capsys.readouterr().err
    main("query IDX --image photos/train-00003.png --top 9".split())
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4 and "train-00003.png" in said.out.splitlines()[0]
    assert "4 of 6 are in; run the same command to go on" in said.err
    main(command.split())
    assert "Added 2 images; IDX has 6." in capsys.readouterr().out
    main("query IDX dog".split())
    assert "are in" not in capsys.readouterr().err


def test_indexes_videos_in_a_folder_and_in_a_data_set(folder, capsys):
    pytest.importorskip("av")
    write_video(folder / "photos" / "film.mp4", range(20))
    main("index photos --model model --index IDX --batch_size 2".split())
    assert "Added 7 images; IDX has 7." in capsys.readouterr().out
    (folder / "films").mkdir()
    (folder / "films" / "film.mp4").write_bytes((folder / "photos" / "film.mp4").read_bytes())
    (folder / "films" / "metadata.jsonl").write_text('{"video": "film.mp4", "caption": "gray"}\n')
    main("add IDX films".split())
    assert "Added 1 images; IDX has 8." in capsys.readouterr().out
    main(["query", "IDX", "gray", "--top", "9"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "film.mp4" in line]
    assert "copies: " in line and line.count("film.mp4") == 2


@pytest.mark.slow
def test_several_processes_make_one_index(folder, capsys):
    command = "modeling_cots.scripts.cots_search index photos --model model --index IDX".split()
    said = run_python("-m", *TORCHRUN, "2", "-m", *command).stdout
    assert said.count("Added 6 images; IDX has 6.") == 1
    main("query IDX --image photos/train-00004.png --top 20".split())
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 6 and "1.  1.000" in found[0] and "train-00004.png" in found[0]


def test_a_target_of_recall_is_reached_by_captions_or_by_vectors(folder, capsys, monkeypatch, tiny_processor):
    (folder / "data").mkdir()
    rows = []
    for item in ScenesDataset("train", 110, 32):
        item["image"].save(folder / "data" / f"{item['name']}.png")
        rows.append({"file_name": f"{item['name']}.png", "text": item["captions"]})
    (folder / "data" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    main("index data --model model --index IDX --engine int8 --target_recall 0.9".split())
    with closing(open_store("IDX")) as store:
        assert store.info["target_recall"] == 0.9 and store.info["candidates"] >= 10 and store.info["nprobe"] in (1, 2)
    assert "Chosen:" not in capsys.readouterr().out
    main("index data --model model --index IDX --target_recall 0.9".split())  # the same again is the same
    with pytest.raises(ValueError, match="has the target of recall 0.9: .* rebuild IDX --target_recall 0.8"):
        main("index data --model model --index IDX --target_recall 0.8".split())

    main(["query", "IDX", "a red circle", "--top", "3"])
    capsys.readouterr()
    main("rebuild IDX --target_recall 1".split())
    assert re.search(
        r"Chosen: nprobe \d and \d+ candidates, with recall@10 1.000 on \d+ of its captions\.", capsys.readouterr().out
    )
    main("rebuild IDX --engine binary".split())  # keeps its target, and chooses anew
    assert "of its captions" in capsys.readouterr().out
    (folder / "model").rename(folder / "moved")
    main("rebuild IDX --index_type int8 --target_recall 0.95".split())  # another name of --engine
    assert re.search(r"on its own vectors, as its model .*model' cannot be loaded; texts", capsys.readouterr().out)
    (folder / "moved").rename(folder / "model")
    main("rebuild IDX --engine exact".split())
    assert "Chosen" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="'exact' compares all vectors exactly"):
        main("rebuild IDX --target_recall 0.9".split())

    (folder / "data" / "metadata.jsonl").unlink()
    model = COTSModel.from_pretrained("model")
    with SearchIndex.create("BARE", model, tiny_processor, engine="int8", target_recall=0.9) as index:
        index.add(ImageFolder("data"), progress=False)
        assert "on its own vectors, as the index has 0 different captions" in index.tune(0.95)
        index.rebuild("int8", target_recall=0.8)
        assert index.store.info["target_recall"] == 0.8 and "candidates" in index.store.info
