"""A blank matplotlib figure, or a clear word where matplotlib is missing; it belongs to the extra `viz`."""


def new_figure(width: float, height: float):
    """
    A `matplotlib.figure.Figure` of so many inches, apart from pyplot's global state: no window, safe in threads.

    Raises `ImportError` that says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Images are drawn by matplotlib: `pip install 'modeling_cots[viz]'`.") from error
    return Figure(figsize=(width, height), layout="constrained")


def shorten(text: str, length: int) -> str:
    """The text in at most `length` characters, for a title."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
