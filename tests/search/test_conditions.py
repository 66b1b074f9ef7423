"""Filters: read from text, applied to Arrow tables, written as Milvus expressions."""

import numpy as np
import pyarrow as pa
import pytest

from modeling_cots.search.conditions import (
    Condition,
    as_conditions,
    matching_rows,
    milvus_expression,
    parse_condition,
)

TABLE = pa.table(
    {
        "year": [2019, None, 2021, 2022],
        "place": ["Oslo", "Rome", "O'Hare", None],
        "zip": ["01", "5", "6", "true"],
        "flag": [True, False, None, None],
        "big": [2**53, 2**53 + 1, -(2**63), None],
        "share": [0.5, 1.0, -1.0, None],
        "nothing": pa.nulls(4),
    }
)
REFUSED = {
    "year == True": "holds numbers, which cannot be compared with True: give a number",
    "year == '2019'": "holds numbers, which cannot be compared with '2019': give a number without quotes",
    "year in [2019, 'a']": "holds numbers, which cannot be compared with 'a'",
    "year == Oslo": "holds numbers",
    "share == true": "holds numbers",
    "flag == 1": "holds booleans, which cannot be compared with 1: give true or false",
    "flag == 'true'": "holds booleans",
    "flag < true": "holds booleans, which have no order",
    "nothing == 1": "no metadata 'nothing'",
    "color == red": "no metadata 'color'.*year, place, zip, flag, big, share.$",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("year >= 2020", Condition("year", ">=", 2020)),
        ("year=2020", Condition("year", "==", 2020)),
        ("place == Oslo", Condition("place", "==", "Oslo")),
        ("place == 'New York'", Condition("place", "==", "New York")),
        ("place != a < b", Condition("place", "!=", "a < b")),
        ("ok == true", Condition("ok", "==", True)),
        ("year in [2019, 2021]", Condition("year", "in", (2019, 2021))),
        ("inside == 1.5", Condition("inside", "==", 1.5)),
        ("Date Taken == '2021'", Condition("Date Taken", "==", "2021")),
        ("aesthetic-score > 2", Condition("aesthetic-score", ">", 2)),
        ("1year == 2", Condition("1year", "==", 2)),
        ("日本 == 東京", Condition("日本", "==", "東京")),
        (""" 'a == "b"' >= 2 """, Condition('a == "b"', ">=", 2)),
        (r'"it\'s \"so\" \\" == 2', Condition('it\'s "so" \\', "==", 2)),
        ("'' == 2", Condition("", "==", 2)),
        ("in == 5", Condition("in", "==", 5)),
        ("in in[5]", Condition("in", "in", (5,))),
        ("and in (1, 2)", Condition("and", "in", (1, 2))),
        ("exists != false", Condition("exists", "!=", False)),
        ("taken in Oslo == 5", Condition("taken in Oslo", "==", 5)),
        ("zip == 01234", Condition("zip", "==", "01234")),
        ("maker == x == y", Condition("maker", "==", "x == y")),
    ],
)
def test_reads_text(text, expected):
    assert parse_condition(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "year",
        "year ~ 3",
        "== 2",
        " in [2]",
        "year ==",
        "year in 3",
        "year == [1]",
        "year == None",
        "a in []",
        "place in [Oslo]",
    ],
)
def test_refuses_what_is_no_condition(text):
    with pytest.raises(ValueError):
        parse_condition(text)


@pytest.mark.parametrize(
    "text",
    [
        "year == " + "9" * 100_000,
        "year == " + "[" * 100_000,
        "year == " + "-" * 100_000 + "1",
        "year" * 100_000,
        " " * 100_000,
        "'" * 100_000,
        "year in [" + "1," * 100_000 + "]",
        "year == " + "[" * 9_000,
        "year == " + "-" * 9_000 + "1",
        "year == " + "9" * 9_000,
        "year in [" + "1," * 4_000 + "'a']",
        "y" * 9_000 + " == 3",
        "year == \udcff",
        "\udcff == 3",
    ],
    ids=lambda text: f"{text[:12]!a} {len(text)}",
)
def test_what_is_much_too_long_or_no_text_is_refused_in_one_short_sentence(text):
    with pytest.raises(ValueError) as caught:
        matching_rows(TABLE, as_conditions(text))
    message = str(caught.value)
    assert type(caught.value) is ValueError and len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 10**400, {"a": 1}, ((1,),)])
def test_refuses_values_that_cannot_be_compared(value):
    with pytest.raises(ValueError, match="compared"):
        Condition("year", "==", value)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        (None, [0, 1, 2, 3]),
        ("year >= 2021", [2, 3]),
        ("year != 2019", [2, 3]),  # a missing value satisfies nothing
        ("place in ['Oslo', 'Rome']", [0, 1]),
        (["year >= 2019", 'place == "O\'Hare"'], [2]),
        ("year > 2019.5", [2, 3]),
        ("year >= 2021.0", [2, 3]),
        ("year <= 2020.9", [0]),
        ("year == 2021.0", [2]),
        ("year in [2021.5, 2022]", [3]),
        ("year != 2021.5", [0, 2, 3]),
        ("year > 99999999999999999999", []),
        ("year < 99999999999999999999", [0, 2, 3]),
        ("year > -99999999999999999999", [0, 2, 3]),
        ("year == 99999999999999999999", []),
        ("year != 99999999999999999999", [0, 2, 3]),
        ("year <= 9.3e18", [0, 2, 3]),
        ("zip == 5", [1]),
        ("zip in (5, 6)", [1, 2]),
        ("zip in (5, '01')", [0, 1]),
        ("zip == true", [3]),
        ("zip != 5", [0, 2, 3]),
        ("flag == true", [0]),
        ("flag in [True, False]", [0, 1]),
        ("big == 9007199254740993", [1]),
        ("big in [9007199254740993, 0.5]", [1]),
        ("big > 9007199254740992", [1]),
        ("share > 0", [0, 1]),
        ("share == 1", [1]),
        ("share in [1, 0.5]", [0, 1]),
        ("share < 99999999999999999999", [0, 1, 2]),
    ],
)
def test_finds_rows(where, rows):
    assert matching_rows(TABLE, as_conditions(where)).nonzero()[0].tolist() == rows


def test_says_what_cannot_be_filtered_by():
    for where, message in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            matching_rows(TABLE, as_conditions(where))
    with pytest.raises(ValueError, match="holds texts, which cannot be compared with 5: give a text"):
        matching_rows(TABLE, [Condition("zip", "==", 5)])  # in Python a number is a number
    with pytest.raises(ValueError, match="no metadata 'share'"):
        matching_rows(TABLE, as_conditions("share > 0"), np.array([False, False, False, True]))


def test_a_value_cannot_end_its_string_in_milvus():
    condition = Condition("place", "==", 'x" or row_id >= 0 or "" == "\\')
    assert milvus_expression([condition], ["place"]) == 'place == "x\\" or row_id >= 0 or \\"\\" == \\"\\\\"'
    assert milvus_expression([Condition("name", "in", ["a", "b"])], ["name"]) == 'name in ["a", "b"]'
    assert milvus_expression([Condition("a b", "==", "1\n2")]) == '$meta["a b"] == "1\\n2"'
    found = milvus_expression(as_conditions(["year in [1, 2]", "ok == true"]))
    assert found == '($meta["year"] == 1 or $meta["year"] == 2) and $meta["ok"] == true'
