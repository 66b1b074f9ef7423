"""From a row to an image and its captions."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_cots.data.rows import (
    BadRowError,
    cached_tokens,
    image_columns,
    list_captions,
    read_captions,
    read_json,
    read_row,
    split_field,
    video_columns,
)

VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["caption", "bytes", "x"]), inner),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"jpg": b"i", "txt": b"one"}, (), ["one"]),
        ({"image": {"bytes": b"i", "path": "a"}, "caption": "one"}, (), ["one"]),
        ({"png": b"i", "json": b'{"captions": ["one", null, "two"], "text": "no"}'}, (), ["one", "two"]),
        ({"png": b"i", "txt": b"no", "json": b'{"alt": "one"}'}, (None, "json.alt"), ["one"]),
        ({"png": b"no", "photo": b"i", "meta": {"alt": "one"}}, ("photo", "meta.alt"), ["one"]),
        ({"png": b"i", "jpg": None, "text": ""}, (), [""]),
        ({"png": b"i", "json": b'["one", "two"]'}, (), ["one", "two"]),
        ({"png": b"i", "a.b": "one"}, (None, "a.b"), ["one"]),
        (
            {"image": None, "jpg": {"bytes": None, "path": None}, "png": b"i", "txt": None, "json": b'"one"'},
            (),
            ["one"],
        ),
        ({"png": b"i", "caption": float("nan"), "text": ["one", 5, None, float("nan")]}, (), ["one"]),
        ({"png": b"i", "caption": [{"text": "one"}, {"raw": "two"}, "three"]}, (), ["one", "three"]),
        ({"png": b"i", "caption": {"captions": ["one", "two"]}}, (), ["one", "two"]),
        ({"png": b"i", "caption": "one \ud800"}, (), ["one ?"]),
    ],
)
def test_images_and_captions(row, columns, expected):
    image, captions = read_row(row, image_columns(*columns))
    assert (image["bytes"], captions) == (b"i", expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": b"x"}, "no image in one of image, .*; there is txt"),
        ({"__key__": "a"}, "there is nothing"),
        ({"image": 5, "txt": b"x"}, "'image' holds 5, neither an image nor a path"),
        ({"image": {"bytes": 5, "path": "x"}, "txt": b"x"}, "holds an object of bytes, path, neither"),
        ({"image": BadRowError("no UTF-8"), "txt": b"x"}, "no UTF-8"),
        ({"png": b"i", "txt": BadRowError("no UTF-8")}, "no UTF-8"),
        ({"png": b"i"}, "no caption in one of"),
        ({"png": b"i", "caption": []}, "has no caption in '"),
        ({"png": b"i", "json": b"{}"}, "has no caption in '"),
        ({"png": b"i", "json": b"{"}, "damaged: JSONDecodeError"),
        ({"png": b"i", "txt": b"\xff"}, "damaged: UnicodeDecodeError"),
        ({"png": b"i", "json": b"[" * 100_000}, "damaged: RecursionError"),
        ({"png": b"i", "txt": b"x" * (2**20 + 1)}, "1,048,577 bytes, more than"),
        ({"png": b"i", "caption": 5}, "in 'caption' hold 5, which is no text"),
        ({"png": b"i", "caption": [["x"]]}, "hold a list of 'x', which is no text"),
        ({"png": b"i", "caption": 10**5000}, "hold a very large number, which is no text"),
    ],
)
def test_bad_rows_say_why(row, message):
    with pytest.raises(BadRowError, match=message):
        read_row(row, image_columns())


def test_a_field_of_what_is_no_object_is_refused():
    with pytest.raises(BadRowError, match="'txt' has no field 'alt'"):
        read_row({"png": b"i", "txt": ["x"]}, image_columns(None, "txt.alt"))


@given(st.dictionaries(st.sampled_from(["image", "png", "caption", "text", "txt", "json"]), VALUES))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_gives_a_pair_or_a_reason(row):
    try:
        image, captions = read_row(row, image_columns())
    except BadRowError:
        return
    assert isinstance(image["bytes"], bytes) or image["path"]
    assert captions and all(isinstance(caption, str) for caption in captions)


def test_a_path_is_kept_for_whoever_may_open_it():
    assert read_row({"file_name": "a.png", "txt": "x"}, image_columns())[0] == {"bytes": None, "path": "a.png"}
    assert read_row({"path": "a.mp4", "sentence": "x"}, video_columns()) == ({"bytes": None, "path": "a.mp4"}, ["x"])
    with pytest.raises(BadRowError, match="video column 'video' holds 3 bytes"):
        read_row({"video": b"abc", "sentence": "x"}, video_columns())
    assert read_row({"__key__": "d/1", "png": b"i", "txt": b"x"}, image_columns())[0]["path"] == "d/1.png"


def test_what_is_odd_beside_captions_is_told():
    assert read_captions({"caption": ["a", 5]}, image_columns()) == (
        ["a"],
        "its captions in 'caption' hold 5, which is no text",
    )
    assert read_captions({"caption": None}, image_columns()) == read_captions({}, image_columns()) == ([], None)


def test_wanted_columns_cover_what_is_looked_at():
    assert {"png", "txt", "json"} <= image_columns().wanted()
    assert {"photo", "json.alt", "json"} <= image_columns("photo", "json.alt").wanted()
    assert "png" not in image_columns("x").wanted()


def test_cached_tokens_are_lists_of_small_numbers():
    row = {"image_tokens": [[1, 65535]], "image_tokens_source": "{}"}
    assert cached_tokens(row) == row and cached_tokens({**row, "image_tokens_source": None}) == {}
    for tokens in (7, [[-1]], [[65536]], [["x"]], [1]):
        with pytest.raises(BadRowError, match="image_tokens are no lists of numbers"):
            cached_tokens({**row, "image_tokens": tokens})


def test_json_takes_numbers_of_any_length():
    assert read_json("[" + "9" * 5000 + ", 12]") == [float("inf"), 12]


@pytest.mark.parametrize(
    "name, available, expected",
    [
        ("json", ["json"], ("json", None)),
        ("json.alt", ["json"], ("json", "alt")),
        ("json.alt", ["json.alt", "json"], ("json.alt", None)),
        ("json.alt.en", ["json"], ("json", "alt.en")),
    ],
)
def test_a_dot_separates_column_and_field_unless_a_column_has_it(name, available, expected):
    assert split_field(name, available) == expected


@pytest.mark.parametrize(
    "value, expected",
    [
        ("a", (["a"], [])),
        ("", ([""], [])),
        (None, ([], [])),
        ([], ([], [])),
        (["a", None, ""], (["a", ""], [])),
        (float("nan"), ([], [])),
        (0, ([], [0])),
        ([1, "a"], (["a"], [1])),
        ({}, ([], [])),
        ({"text": "a"}, (["a"], [])),
        ([["a"]], ([], [["a"]])),
        (b"a", ([], [b"a"])),
    ],
)
def test_what_counts_as_captions(value, expected):
    assert list_captions(value) == expected
