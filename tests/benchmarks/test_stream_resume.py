"""The benchmark of going on in a stream finds the next pair, and prints both times."""

import sys

import stream_resume


def test_prints_both_times(monkeypatch, capsys):
    options = ["--shards", "5", "--samples", "8", "--kilobytes", "1", "--shuffle_buffer", "6"]
    monkeypatch.setattr(sys, "argv", ["stream_resume.py", *options])
    stream_resume.main()
    again, gone_on = capsys.readouterr().out.splitlines()
    assert again.startswith("36 samples read again") and gone_on.startswith("gone on from a state of")
