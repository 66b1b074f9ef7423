"""What is taken from matplotlib, and the error where it is missing."""

import builtins

import numpy as np
import pytest

from modeling_cots.visualization.figures import add_color_bar, map_colors, new_figure, shorten


def test_a_figure_of_the_size_asked_for():
    figure = new_figure(3, 2)
    assert figure.get_size_inches().tolist() == [3, 2]


def test_values_get_the_colors_of_the_map():
    colors = map_colors(np.array([[0.0, 0.5, 1.0]]), "gray")
    assert colors.shape == (1, 3, 3) and np.allclose(colors, np.array([0.0, 0.5, 1.0])[None, :, None], atol=0.01)


@pytest.mark.parametrize("draw", [lambda: new_figure(3, 2), lambda: map_colors(np.zeros(2), "gray")])
def test_says_what_to_install_where_matplotlib_is_missing(monkeypatch, draw):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        draw()


def test_a_color_bar_stands_beside_the_axes():
    figure = new_figure(3, 2)
    axes = figure.subplots(1, 2)
    add_color_bar(figure, axes, "gray", "relevance")
    (bar,) = [added for added in figure.axes if added not in list(axes)]
    assert bar.get_ylabel() == "relevance" and bar.get_ylim() == (0, 1)


def test_shortened_text_keeps_its_limit():
    assert shorten("a red circle", 12) == "a red circle"
    assert shorten("a red circle", 6) == "a red…"
    assert len(shorten("a" * 100, 20)) == 20
