"""Annotation files of MSR-VTT with odd values: one sentence each, or left out and named."""

import json

import pytest

from modeling_cots.data import msrvtt
from modeling_cots.data.msrvtt import load_msrvtt


@pytest.fixture
def warnings_logged(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(msrvtt.logger, "warning", messages.append)
    return messages


def video(**changes) -> dict:
    return {"video_id": "video0", "split": "train"} | changes


def sentence(**changes) -> dict:
    return {"video_id": "video0", "caption": "a"} | changes


def load(folder, videos, sentences, split: str = "train", **options):
    (folder / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    return load_msrvtt(str(folder), split, **options)


def test_captions_that_are_no_texts_are_left_out_and_named(tmp_path, warnings_logged):
    odd = [sentence(caption=caption) for caption in (None, 7, float("nan"), True, {"x": 1}, "b", ["c", None])]
    assert load(tmp_path, [video()], odd) == {"video0": ["b", "c"]}
    assert (
        len(warnings_logged) == 1
        and "Left out 2 captions" in warnings_logged[0]
        and "7 of video0" in warnings_logged[0]
    )


def test_a_video_that_is_listed_twice_has_one_split(tmp_path):
    assert load(tmp_path, [video(), video()], [sentence(), sentence()]) == {"video0": ["a", "a"]}
    with pytest.raises(ValueError, match="lists 'video0' in the splits 'train' and 'test'"):
        load(tmp_path, [video(), video(split="test")], [sentence()])


@pytest.mark.parametrize(
    ("videos", "sentences", "said"),
    [
        ([video(split=["train"])], [], "'split' of entry 0 is a list of 'train'"),
        ([video(split=None)], [], "'split' of entry 0 is None"),
        ([video(), video(video_id=7)], [], "'video_id' of entry 1 is 7"),
        ([video(video_id=["video0"])], [], "'video_id' of entry 0"),
        ([video()], [sentence(video_id=None)], "'video_id' of entry 0 is None"),
        ([video(), None], [], "no list of objects 'videos'"),
        ({"video0": video()}, [], "no list of objects 'videos'"),
        ([video()], ["a"], "no list of objects 'sentences'"),
        ([video()], None, "no list of objects 'sentences'"),
    ],
)
def test_values_of_another_type_are_refused_in_one_sentence(tmp_path, videos, sentences, said):
    with pytest.raises(ValueError, match=f"is not in MSR-VTT's form: .*{said}"):
        load(tmp_path, videos, sentences)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"videos": ' + b"[" * 100_000, b"\xff", b"", b"9" * 5000])
def test_files_that_are_no_annotations_are_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "MSRVTT_data.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not in MSR-VTT's form: [^\n]*$"):
        load_msrvtt(str(tmp_path), "train")


def test_odd_tables_of_the_1ka_split(tmp_path, warnings_logged):
    table = tmp_path / "MSRVTT_JSFUSION_test.csv"
    huge = "x" * 1_000_000
    table.write_text(
        f"key,video_id,sentence\nret0,video0,{huge}\nret1,video1,one, two\nret2,video0,again\nret3,video2,\n"
    )
    found = load_msrvtt(str(tmp_path), "test", "msrvtt-1ka")
    assert found == {"video0": [huge, "again"], "video2": [""]}
    assert len(warnings_logged) == 1 and "Left out 1 rows" in warnings_logged[0] and "row 1" in warnings_logged[0]
    for content, said in [
        (b"video_id;sentence\nvideo0;a\n", "separated by ';'"),
        (b"key,sentence\nret0,a\n", "has no column video_id"),
        (b"video_id,sentence\n,a\n", "'video_id' of entry 0 is '' and no text"),
        (b"", "or no rows"),
        (b"\xff\xfe\x00a\n\x00", "has no column"),
    ]:
        table.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            load_msrvtt(str(tmp_path), "test", "msrvtt-1ka")
