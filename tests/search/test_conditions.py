"""Filters: read from text, applied to Arrow tables, written as Milvus expressions."""

import pyarrow as pa
import pytest

from modeling_cots.search.conditions import (
    Condition,
    as_conditions,
    matching_rows,
    milvus_expression,
    parse_condition,
)

TABLE = pa.table({"year": [2019, None, 2021, 2022], "place": ["Oslo", "Rome", "O'Hare", None]})


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
    ],
)
def test_reads_text(text, expected):
    assert parse_condition(text) == expected


@pytest.mark.parametrize("text", ["", "year", "year ~ 3", "1year == 2", "a b == 2", "year in 3", "year == [1]"])
def test_refuses_what_is_no_condition(text):
    with pytest.raises(ValueError):
        parse_condition(text)


@pytest.mark.parametrize("value", [None, float("nan"), {"a": 1}, ((1,),)])
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
    ],
)
def test_finds_rows(where, rows):
    assert matching_rows(TABLE, as_conditions(where)).nonzero()[0].tolist() == rows


def test_says_what_cannot_be_filtered_by():
    with pytest.raises(ValueError, match="no metadata 'color'.*year, place"):
        matching_rows(TABLE, as_conditions("color == red"))
    with pytest.raises(ValueError, match="holds int64"):
        matching_rows(TABLE, as_conditions("year == Oslo"))


def test_a_value_cannot_end_its_string_in_milvus():
    condition = Condition("place", "==", 'x" or row_id >= 0 or "" == "\\')
    assert milvus_expression([condition]) == 'place == "x\\" or row_id >= 0 or \\"\\" == \\"\\\\"'
    assert milvus_expression(as_conditions(["year in [1, 2]", "ok == true"])) == "year in [1, 2] and ok == true"
