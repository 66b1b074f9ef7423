"""Drawing relevance maps (`relevance.py`): an image under a heat map for the caption and for each word."""

import math
import textwrap

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .figures import add_color_bar, map_colors, new_figure, shorten

COLORS = "inferno"
MAX_COLUMNS = 4
PANEL = 2.5  # inches


def resize_map(relevance: torch.Tensor, width: int, height: int) -> np.ndarray:
    """A map (rows, columns) resized to (height, width), smooth between patches, with a maximum of 1."""
    relevance = relevance.float()
    relevance = relevance / relevance.max().clamp(min=torch.finfo(torch.float32).tiny)
    resized = F.interpolate(relevance[None, None], size=(height, width), mode="bilinear", align_corners=False)
    return resized[0, 0].numpy()


def overlay(image: Image.Image, relevance: torch.Tensor, opacity: float = 0.75) -> Image.Image:
    """
    The image in gray under the colors of its heat map, at the size of the image.

    Args:
        image: Of any mode.
        relevance: (rows, columns), relevance of every patch.
        opacity: Share of the heat map in the mixture.
    """
    colors = map_colors(resize_map(relevance, image.width, image.height), COLORS)
    gray = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64) / 255
    mixed = (1 - opacity) * gray + opacity * colors
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


def draw_word_maps(image: Image.Image, caption: str, relevance):
    """
    Draw the image, a heat map for the caption and for each word, and the relevance of each word for the image.

    Every map is scaled to its own maximum. The titles say how much each word adds to the similarity.

    Args:
        image: RGB.
        caption: The text.
        relevance ([`PairRelevance`]): Of this pair.

    Returns a matplotlib figure.
    """
    panels = [(f"whole caption  {relevance.score:.2f}", relevance.caption_map)] + [
        (f"{shorten(word.text, 20)}  {round(score, 2) + 0.0:+.2f}", word_map)  # + 0.0: no "-0.00"
        for word, word_map, score in zip(
            relevance.words, relevance.word_maps, relevance.word_scores.tolist(), strict=True
        )
    ]
    num_columns = min(MAX_COLUMNS, 1 + len(panels))
    num_rows = math.ceil((1 + len(panels)) / num_columns)
    panel_height = PANEL * min(1.5, max(0.5, image.height / image.width))
    strip_height = 1.3
    figure = new_figure(PANEL * num_columns + 0.8, (panel_height + 0.35) * num_rows + strip_height + 0.6)
    figure.suptitle(textwrap.fill(shorten(caption, 240), 30 * num_columns), fontsize=11)
    upper, lower = figure.subfigures(2, 1, height_ratios=[(panel_height + 0.35) * num_rows, strip_height])
    all_axes = upper.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in all_axes:
        axes.axis("off")
    all_axes[0].imshow(image)
    all_axes[0].set_title("image", fontsize=10)
    for axes, (title, word_map) in zip(all_axes[1:], panels, strict=False):
        axes.imshow(overlay(image, word_map))
        axes.set_title(title, fontsize=10)
    add_color_bar(upper, all_axes, COLORS, "relevance / maximum of the map")
    _draw_words(lower.subplots(), relevance)
    return figure


def _draw_words(axes, relevance) -> None:
    """Draw a bar for each word of the caption, darker for words with a heat map."""
    places = range(len(relevance.caption_words))
    mapped = {position for word in relevance.words for position in word.positions}
    shades = ["#7a1f5c" if mapped & set(word.positions) else "#c9a9bd" for word in relevance.caption_words]
    axes.bar(places, relevance.caption_relevance.tolist(), color=shades)
    labels = [shorten(word.text, 14) for word in relevance.caption_words]
    turn = {"rotation": 45, "ha": "right"} if len(labels) > 10 else {}
    axes.set_xticks(places, labels, fontsize=9, **turn)
    axes.set_yticks([])
    axes.set_title("relevance of each word for the image", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
