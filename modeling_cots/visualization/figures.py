"""All that the package takes from matplotlib, which the extra `viz` installs: figures, color maps, color bars."""

import numpy as np


def _import_matplotlib():
    """matplotlib with the modules used here. Raises `ImportError` that says what to install."""
    try:
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("Images are drawn by matplotlib: `pip install matplotlib`.") from error
    return matplotlib


def new_figure(width: float, height: float):
    """
    A blank `matplotlib.figure.Figure`, apart from pyplot's global state: no window, safe in threads.

    Args:
        width: In inches.
        height: In inches.

    Raises `ImportError` that says what to install.
    """
    return _import_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def map_colors(values: np.ndarray, color_map: str) -> np.ndarray:
    """RGB colors (..., 3) from 0 to 1 of values (...) from 0 to 1. Raises `ImportError` as `new_figure`."""
    return _import_matplotlib().colormaps[color_map](values)[..., :3]


def add_color_bar(figure, axes, color_map: str, label: str) -> None:
    """A color bar from 0 to 1, drawn beside `axes`."""
    matplotlib = _import_matplotlib()
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), color_map)
    figure.colorbar(colors, ax=list(axes), shrink=0.8, fraction=0.05).set_label(label, fontsize=9)


def shorten(text: str, length: int) -> str:
    """The text in at most `length` characters, for a title."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
