"""Damaged images, odd captions and odd tables: a batch or a clear error, and no file left open."""

import json
import os

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from collator_items import SIZE, collator, draw_image, encode, item
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pair_writers import png, write_tar

from modeling_cots.data.image_collators import COTSEvaluationCollator
from modeling_cots.data.karpathy import load_karpathy
from modeling_cots.data.msrvtt import load_msrvtt
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.image_reading_cots import UnreadableImageError, read_image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
SOUND = [encode(draw_image(0, 24, 20), format) for format in FORMATS]
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=0, max_size=8)), max_size=6)
LENIENT = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


def mutate(content: bytes, changes: list[tuple[float, bytes]], keep: float) -> bytes:
    mutated = bytearray(content)
    for place, written in changes:
        start = int(place * len(mutated))
        mutated[start : start + len(written)] = written
    return bytes(mutated[: int(keep * len(mutated))])


MUTATED = st.builds(mutate, st.sampled_from(SOUND), CHANGES, st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1, 0.0]))
# Any text at all: lone surrogates come out of JSON escapes, control characters out of everything.
CAPTION = st.text(st.characters(), max_size=40) | st.sampled_from(
    ["", "\0", "[MASK]", "\ud800", "a" * 5000, "é" * 300]
)


@LENIENT
@given(images=st.lists(st.tuples(MUTATED, CAPTION), min_size=1, max_size=6))
def test_mutated_images_and_captions_make_a_batch(tiny_processor, tmp_path, images):
    """As bytes and as files; one sound image stays what it was among them."""
    (tmp_path / "odd").write_bytes(images[0][0])
    items = [item(i, [caption], image={"bytes": content, "path": None}) for i, (content, caption) in enumerate(images)]
    items.append(item(97, [images[0][1]], image={"bytes": None, "path": str(tmp_path / "odd")}))
    items.append(item(98))
    train = collator(tiny_processor)
    evaluation = COTSEvaluationCollator(tiny_processor, max_text_length=24)
    alone = train([item(98)])
    before = psutil.Process().num_fds()
    batches = train(items), evaluation(items)
    assert psutil.Process().num_fds() == before
    for batch in batches:
        assert batch["pixel_values"].shape == (len(items), 3, SIZE, SIZE)
        assert batch["pixel_values"].dtype == torch.uint8
        assert batch["valid"][-1], "the sound one"
        assert batch["valid"][0] == batch["valid"][-2], "the same image as bytes and as a file"
    assert torch.equal(batches[0]["valid"], batches[1]["valid"])
    assert torch.equal(batches[0]["pixel_values"][-1], alone["pixel_values"][0])


IMAGE = png(3)
COLUMNS = st.sampled_from(["image", "file_name", "jpg", "caption", "captions", "text", "txt", "json", "other"])
CELL = st.one_of(
    st.none(),
    st.integers(-5, 5),
    st.booleans(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([IMAGE, b"", b"no image", "a.png", "../a.png", "/etc/passwd", ""]),
    st.lists(st.text(max_size=5) | st.none(), max_size=3),
    st.lists(st.integers(0, 3), max_size=2),
    st.fixed_dictionaries({"bytes": st.none() | st.just(IMAGE), "path": st.none() | st.just("a.png")}),
    st.fixed_dictionaries({"caption": st.text(max_size=5)}),
    st.just({}),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@LENIENT
@given(data=st.data())
def test_any_table_opens_or_is_refused(cache, tmp_path, data):
    """One kind of value a column, as a parquet file has it; whole and as a stream, with the same captions."""
    num_rows = data.draw(st.integers(0, 3))
    columns = {}
    for name in data.draw(st.lists(COLUMNS, max_size=4, unique=True) | st.just(["image", "caption"])):
        cells = (
            [data.draw(CELL)] * num_rows if data.draw(st.booleans()) else [data.draw(CELL) for _ in range(num_rows)]
        )
        if name == "image" and data.draw(st.booleans()):
            cells = [{"bytes": IMAGE, "path": "a.png"}] * num_rows
        try:
            columns[name] = pa.array(cells)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # values of several kinds are no column
            columns[name] = pa.array([cells[0]] * num_rows)
    path = tmp_path / f"{os.urandom(6).hex()}.parquet"  # a name twice would be read from the cache
    try:
        pq.write_table(pa.table(columns), path)
    except pa.ArrowNotImplementedError:  # parquet knows no struct without fields
        return
    (tmp_path / "a.png").write_bytes(IMAGE)
    for opener in (open_pairs, open_stream):
        try:
            pairs = opener(str(path), "train")
        except ValueError as error:
            assert str(error)
            continue
        items = list(pairs)
        assert items and all(item["captions"] and item["image"] is not None for item in items) or opener is open_pairs
        assert all(isinstance(caption, str) for item in items for caption in item["captions"])


@LENIENT
@given(rows=st.lists(st.dictionaries(COLUMNS, CELL | st.lists(CELL, max_size=2)), max_size=3))
def test_any_json_lines_open_or_are_refused(cache, tmp_path, rows):
    def encodable(value):
        return value.hex() if isinstance(value, bytes) else str(value)

    (tmp_path / "a.png").write_bytes(IMAGE)
    path = tmp_path / f"{os.urandom(6).hex()}.jsonl"
    path.write_text("".join(json.dumps(row, default=encodable) + "\n" for row in rows))
    try:
        items = list(open_pairs(str(path), "train"))
    except ValueError as error:
        assert str(error)
        return
    assert all(isinstance(caption, str) for item in items for caption in item["captions"])


def pairs_of(opener, path) -> list[tuple]:
    """What one way of opening gives, as far as its images can be read: captions, by the image's bytes."""
    try:
        items = list(opener(str(path), "train"))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return []
    found = []
    for each in items:
        try:
            read_image(each["image"])
        except UnreadableImageError:
            continue
        found += each["captions"]
    return sorted(found)


TEXT_FILES = st.sampled_from(
    [
        (".csv", b'image,caption,year\na.png,"one, two",2020\na.png,three,\na.png,"four\nfive",x\n'),
        (".jsonl", b'{"image": "a.png", "caption": "one", "year": 1}\n{"image": "a.png", "caption": ["two", null]}\n'),
        (".json", b'[{"image": "a.png", "caption": "one"}, {"image": "a.png", "caption": {"text": "two"}}]'),
    ]
)
SPLICED = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.binary(max_size=4)
        | st.sampled_from([b'"', b"\n", b",", b"\0", b"[" * 5000, b"9" * 5000, b"null", b"\xff", b"NaN"]),
    ),
    max_size=4,
)


@LENIENT
@given(file=TEXT_FILES, changes=SPLICED)
def test_a_damaged_text_file_gives_the_same_whole_and_as_a_stream(cache, tmp_path, file, changes):
    suffix, content = file
    for place, inserted in changes:
        start = int(place * len(content))
        content = content[:start] + inserted + content[start:]
    (tmp_path / "a.png").write_bytes(IMAGE)
    path = tmp_path / f"{os.urandom(6).hex()}{suffix}"
    path.write_bytes(content)
    try:
        open_pairs(str(path), "train")
    except ValueError as error:
        if "leads out of" in str(error):  # an attack refuses the whole; a stream meets it only when it comes to it
            return
    assert pairs_of(open_pairs, path) == pairs_of(open_stream, path)


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(["0", "1", "d/2", "../3", "caf\udce9"]),
        st.sampled_from(["png", "PNG", "jpg", "txt", "json", "npy", "pth", "cbor", "mp", "pyd", "cls", "seg.png"]),
        st.sampled_from([IMAGE, b"", b"a caption", b'{"caption": "a"}', b"\x80\x04.", b"\xff\xfe"]),
    ),
    max_size=8,
)


@LENIENT
@given(members=MEMBERS, keep=st.sampled_from([1.0, 1.0, 0.8, 0.3]))
def test_any_shard_gives_the_same_whole_and_as_a_stream(cache, tmp_path, members, keep):
    path = tmp_path / f"{os.urandom(6).hex()}.tar"
    ordered = sorted(members, key=lambda member: member[0])
    write_tar(path, {f"{key}.{kind}": content for key, kind, content in ordered})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert pairs_of(open_pairs, path) == pairs_of(open_stream, path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["train", "0.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KARPATHY = st.fixed_dictionaries(
    {"split": st.just("train") | JSON, "filename": st.just("0.png") | JSON},
    optional={"filepath": JSON, "sentences": st.lists(st.fixed_dictionaries({"raw": st.text() | JSON}) | JSON) | JSON},
)
VIDEO = st.fixed_dictionaries({"video_id": st.just("v") | JSON, "split": st.just("train") | JSON})
SENTENCE = st.fixed_dictionaries({"video_id": st.just("v") | JSON, "caption": st.text() | JSON})


@LENIENT
@given(
    images=st.lists(KARPATHY | JSON, max_size=3) | JSON,
    videos=st.lists(VIDEO | JSON, max_size=2) | JSON,
    data=st.data(),
)
def test_any_annotations_open_or_are_refused_in_one_sentence(tmp_path, images, videos, data):
    (tmp_path / "0.png").write_bytes(IMAGE)
    videos = data.draw(st.lists(VIDEO | JSON, max_size=2) | JSON)
    sentences = data.draw(st.lists(SENTENCE | JSON, max_size=3) | JSON)
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    for load in (load_karpathy, load_msrvtt):
        try:
            found = load(str(tmp_path), "train")
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            continue
        captions = found.values() if isinstance(found, dict) else found[0]["captions"]
        assert all(isinstance(caption, str) for each in captions for caption in each)
