"""The data benchmark at toy size: it runs, and its rows are what the table is made of."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import data as data_benchmark  # noqa: E402


def test_rows_are_measured_and_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["data.py", "--device", "cpu", "--quick", "--json", str(path)])
    data_benchmark.main()
    rows = json.loads(path.read_text())
    assert [entry["id"] for entry in rows] == [*["8"] * 6, "9", "bytes"]
    assert all(set(entry) == {"id", "title", "ratio", "goal", "note", "setting"} for entry in rows)
    assert all(entry["ratio"] > 0 for entry in rows)
    assert rows[-1]["ratio"] == 4.0
    printed = capsys.readouterr().out
    assert all(entry["title"] in printed for entry in rows)


def test_pictures_have_the_grain_of_photographs():
    jpeg = data_benchmark.draw_jpeg(500, 0)
    assert 1.5 < 8 * len(jpeg) / (500 * 375) < 3
