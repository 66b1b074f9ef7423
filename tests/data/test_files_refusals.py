"""Folders and files that look like data and are not: one sentence each, which says what to do."""

import datasets
import pytest
from PIL import Image

from modeling_cots.data.opening import open_dataset
from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.data.videos import open_videos
from modeling_cots.hub.model_card import load_card


def refusal(opening, *args) -> str:
    with pytest.raises(ValueError) as caught:
        opening(*args)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("opening", [open_dataset, open_stream, open_videos])
@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk(tmp_path, opening, splits):
    rows = datasets.Dataset.from_dict({"image": ["0.png"], "caption": ["a"]})
    (datasets.DatasetDict(train=rows) if splits else rows).save_to_disk(tmp_path / "saved")
    said = refusal(opening, str(tmp_path / "saved"), "train")
    code = f"`datasets.load_from_disk(folder){'[split]' if splits else ''}.to_parquet(file)`"
    assert f"was written by `save_to_disk`: write it as parquet instead, by {code}" in said


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("name", ["metadata.csv", "train.csv"])
def test_a_csv_file_with_another_separator(tmp_path, separator, name):
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    rows = [["file_name", "caption"], ["0.png", "red, green, and blue"], ["0.png", "one"]]
    (tmp_path / name).write_text("\ufeff" + "\n".join(separator.join(row) for row in rows), encoding="utf-8")
    said = refusal(open_dataset, str(tmp_path), "train")
    assert f"separated by {separator!r}: write the file again with commas" in said
    (tmp_path / name).write_text(f'file_name,caption\n0.png,"a{separator} b"\n')
    assert next(open_dataset(str(tmp_path), "train").iter_captions()) == f"a{separator} b"


BROKEN = {
    "---\nconfigs: [\n---\n# Text\n": "found '<stream end>'",
    "---\nlicense: mit\nconfigs:\n- config_name: a\n data_files: b\n---\n": "in line 5",
    "---\nconfigs: !!python/object:os.system x\n---\n": "in line 2",
    "---\n- a list\n---\n": "should be a dict",
    "---\nconfigs: \t\x01\n---\n": "special characters are not allowed",
}


@pytest.mark.parametrize("card", BROKEN, ids=BROKEN.values())
def test_broken_yaml_in_a_readme(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,a\n")
    for opening, args in ((open_dataset, ("train",)), (open_stream, ("train",)), (load_card, ())):
        said = refusal(opening, str(tmp_path), *args)
        assert "README.md cannot be read" in said and BROKEN[card] in said and "mend it, or leave it out" in said


def test_a_readme_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nname: \xff\xfe\n---\n")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,a\n")
    assert "README.md cannot be read" in refusal(open_dataset, str(tmp_path), "train")
