"""Every column beside images and captions has one type; values of another are named."""

import json
import math

import datasets
import pytest
from pair_writers import IMAGES, NAMES, write_images, write_parquet

from modeling_cots.data import other_columns
from modeling_cots.data.other_columns import OtherColumns
from modeling_cots.data.pairs import open_pairs


def columns_of(values: list, are_text: bool = False) -> OtherColumns:
    rows = {"others": [json.dumps({"x": value}) for value in values], "are_text": [are_text] * len(values)}
    return OtherColumns(datasets.Dataset.from_dict(rows))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, None], [1, 2, None]),
        ([1, 2.5, math.nan], [1.0, 2.5, None]),
        ([1, 2, "unknown"], [1, 2, None]),
        ([1, 2**70, 3], [1, None, 3]),
        ([1, math.inf, 3], [1, None, 3]),
        (["a", "b", 7], ["a", "b", "7"]),
        ([True, False, "x"], [True, False, None]),
        ([True, 1, 2], [None, 1, 2]),
        (["", "", "a"], ["", "", "a"]),
        (["a", None, "\ud800"], ["a", None, "\\ud800"]),
        ([None, None], [None, None]),
    ],
)
def test_a_column_has_the_type_of_most_values(values, expected):
    columns = columns_of(values)
    found = [columns.row(row)["x"] for row in range(len(values))]
    assert found == expected and {type(value) for value in found} == {type(value) for value in expected}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2020", "", " 2021 "], [2020, None, 2021]),
        (["2020", "1.5", "nan"], [2020.0, 1.5, None]),
        (["007", "a12", "b"], ["007", "a12", "b"]),
        (["True", "false", ""], [True, False, None]),
        (["1_000", "x", "y"], ["1_000", "x", "y"]),
        (["9" * 5000, "1", "2"], [None, 1, 2]),
    ],
)
def test_texts_of_csv_may_be_numbers(values, expected):
    columns = columns_of(values, are_text=True)
    assert [columns.row(row)["x"] for row in range(len(values))] == expected


def test_values_that_do_not_fit_are_counted_and_named(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(other_columns.logger, "warning", messages.append)
    columns_of([*range(20), *["unknown"] * 8])
    (message,) = messages
    assert message.startswith(
        "Left out 8 values of the column 'x', where most are of the kind 'integer': 'unknown' in"
    )
    assert "row 20" in message and "row 24 and 3 more." in message
    messages.clear()
    columns_of(["a", "b", 1, None])
    assert messages == []


def test_metadata_of_every_format(tmp_path):
    write_images(tmp_path)
    rows = [
        {"file_name": name, "text": "x", "year": year} for name, year in zip(NAMES, (2020, "?", 2022), strict=True)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = open_pairs(str(tmp_path), "train", keep_uncaptioned=True)
    assert [pairs.metadata(index) for index in range(3)] == [{"year": 2020}, {"year": None}, {"year": 2022}]
    (tmp_path / "a.csv").write_text("image,caption,year,note\na.png,x,2020,\nb.png,y,,n\n")
    pairs = open_pairs(str(tmp_path / "a.csv"), "train")
    assert [pairs.metadata(index) for index in range(2)] == [{"year": 2020, "note": ""}, {"year": None, "note": "n"}]
    write_parquet(tmp_path / "a.parquet", {"image": IMAGES, "text": ["x"] * 3, "n": [1.5, None, 2.0], "m": [[1]] * 3})
    assert open_pairs(str(tmp_path / "a.parquet"), "train").metadata(0) == {"n": 1.5}
