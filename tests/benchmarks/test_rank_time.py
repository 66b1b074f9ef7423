"""The benchmark of ranking prints the time of each number of processes."""

import sys

import rank_time


def test_prints_a_line_for_each_number_of_processes(monkeypatch, capsys):
    options = ["--images", "30", "--captions", "90", "--processes", "1", "3"]
    monkeypatch.setattr(sys, "argv", ["rank_time.py", *options])
    rank_time.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("30 images x 90 captions")
    assert [line.split(",")[0] for line in printed[1:]] == ["processes: 1", "processes: 3"]
