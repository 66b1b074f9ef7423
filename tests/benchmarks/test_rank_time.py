"""The benchmark of ranking runs as its command says."""

from pathlib import Path

from programs import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_prints_a_line_for_each_number_of_processes():
    options = ["--images", "30", "--captions", "90", "--processes", "1", "3"]
    printed = run_python(BENCHMARKS / "rank_time.py", *options).stdout.splitlines()
    assert printed[0].startswith("30 images x 90 captions")
    assert [line.split(",")[0] for line in printed[1:]] == ["processes: 1", "processes: 3"]
