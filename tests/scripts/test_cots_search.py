"""`cots-search` as `torchrun -m` starts it: an error that its user can correct is one sentence."""

import signal
import sys

import pytest

from modeling_cots.scripts.cots_search import main

pytest.importorskip("faiss")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("query nowhere dog", "ValueError: There is no index in 'nowhere': make one with `cots-search index`."),
        ("delete nowhere x", "ValueError: There is no index in 'nowhere': make one with `cots-search index`."),
        ("query photos dog --html out.html", "ValueError: There is no index in 'photos'"),
    ],
)
def test_an_error_is_one_sentence(command, said, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cots-search", *command.split()])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code.startswith(said) and ended.value.code.endswith(" (--debug shows where.)")
    assert "\n" not in ended.value.code
