"""`cots-search` from the first image to the page, in this process."""

import json
import re
import shlex

import pytest
import torch
from PIL import Image
from programs import TORCHRUN, run_python

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.search.cli import main

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
    main(["delete", "IDX", "--where", "year == 2021"])
    assert "Deleted 1 images; 8 are left." in capsys.readouterr().out
    main("rebuild IDX --engine hnsw".split())
    assert "index type 'hnsw' and 8 images" in capsys.readouterr().out
    main("query IDX --image photos/train-00004.png --top 20".split())
    assert len(capsys.readouterr().out.splitlines()) == 8
    main("index photos --model model --index IDX".split())  # the deleted file is still in the folder
    assert "Added 1 images; IDX has 9." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("query nowhere dog", "no index in 'nowhere'"),
        ("index nothing/ --model model --index I", "does not exist"),
        ("index photos --model nothing --index I", "no COTS model in 'nothing'"),
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
    import io
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


@pytest.mark.slow
def test_several_processes_make_one_index(folder, capsys):
    command = "modeling_cots.scripts.cots_search index photos --model model --index IDX".split()
    said = run_python("-m", *TORCHRUN, "2", "-m", *command).stdout
    assert said.count("Added 6 images; IDX has 6.") == 1
    main("query IDX --image photos/train-00004.png --top 20".split())
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 6 and "1.  1.000" in found[0] and "train-00004.png" in found[0]
