"""The one door to matplotlib, and what it says when nobody is in."""

import builtins

import pytest

from modeling_cots.visualization.figures import new_figure, shorten


def test_a_figure_of_the_size_asked_for():
    figure = new_figure(3, 2)
    assert figure.get_size_inches().tolist() == [3, 2]


def test_says_what_to_install_where_matplotlib_is_missing(monkeypatch):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install 'modeling_cots\[viz\]'"):
        new_figure(3, 2)


def test_shortened_text_keeps_its_limit():
    assert shorten("a red circle", 12) == "a red circle"
    assert shorten("a red circle", 6) == "a red…"
    assert len(shorten("a" * 100, 20)) == 20
