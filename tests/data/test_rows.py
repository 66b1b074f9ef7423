"""From a row to an image and its captions."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_cots.data.rows import BadRowError, list_captions, read_row, split_field, wanted_columns

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
    ],
)
def test_images_and_captions(row, columns, expected):
    assert read_row(row, *columns) == (b"i", expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"txt": b"x"}, "no image in one of image, .*; there is txt"),
        ({"__key__": "a"}, "there is nothing"),
        ({"image": {"bytes": None, "path": "/etc/passwd"}, "txt": b"x"}, "no image inside, only the name of a file"),
        ({"image": "/etc/passwd", "txt": b"x"}, "no image inside"),
        ({"png": b"i"}, "no caption in one of"),
        ({"png": b"i", "caption": []}, "has no caption"),
        ({"png": b"i", "json": b"{}"}, "has no caption"),
        ({"png": b"i", "json": b"{"}, "damaged: JSONDecodeError"),
        ({"png": b"i", "txt": b"\xff"}, "damaged: UnicodeDecodeError"),
        ({"png": b"i", "json": b"[" * 100_000}, "damaged: RecursionError"),
        ({"png": b"i", "txt": b"x" * (2**20 + 1)}, "1,048,577 bytes, more than"),
        ({"png": b"i", "caption": 5}, "neither a string nor"),
        ({"png": b"i", "caption": [["x"]]}, "neither a string nor"),
    ],
)
def test_bad_rows_say_why(row, message):
    with pytest.raises(BadRowError, match=message):
        read_row(row)


def test_a_field_of_what_is_no_object_is_refused():
    with pytest.raises(BadRowError, match="'txt' has no field 'alt'"):
        read_row({"png": b"i", "txt": ["x"]}, None, "txt.alt")


@given(st.dictionaries(st.sampled_from(["image", "png", "caption", "text", "txt", "json"]), VALUES))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_gives_a_pair_or_a_reason(row):
    try:
        image, captions = read_row(row)
    except BadRowError:
        return
    assert isinstance(image, bytes) and captions and all(isinstance(caption, str) for caption in captions)


def test_wanted_columns_cover_what_is_looked_at():
    assert {"png", "txt", "json"} <= wanted_columns(None, None)
    assert {"photo", "json.alt", "json"} <= wanted_columns("photo", "json.alt") and "png" not in wanted_columns(
        "x", None
    )


@pytest.mark.parametrize(
    "name, available, expected",
    [
        (None, ["json"], (None, None)),
        ("json", ["json"], ("json", None)),
        ("json.alt", ["json"], ("json", "alt")),
        ("json.alt", ["json.alt", "json"], ("json.alt", None)),
        ("json.alt.en", ["json"], ("json", "alt.en")),
    ],
)
def test_a_dot_separates_column_and_field_unless_a_column_has_it(name, available, expected):
    assert split_field(name, available) == expected


@pytest.mark.parametrize(
    "value, expected", [("a", ["a"]), ("", [""]), (None, []), ([], []), (["a", None, ""], ["a", ""])]
)
def test_what_counts_as_captions(value, expected):
    assert list_captions(value) == expected


@pytest.mark.parametrize("value", [0, [1], {}, b"a"])
def test_what_are_no_captions(value):
    with pytest.raises(TypeError, match="neither a string nor a list of strings"):
        list_captions(value)
