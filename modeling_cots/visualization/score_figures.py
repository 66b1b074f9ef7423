"""Drawing the scores of pairs (`evaluation/pair_scores.py`): images with low to high scores, and a histogram."""

import math
import textwrap

import torch

from .figures import new_figure, shorten

NUM_COLUMNS = 6
NUM_BINS = 60
BANDS = ("lowest", "middle", "highest")


def band_positions(num_pairs: int, num_columns: int = NUM_COLUMNS) -> dict[str, list[int]]:
    """For each band, the ranks (0 is the lowest score) of the pairs that the contact sheet shows."""
    num_columns = min(num_columns, num_pairs)
    middle = (num_pairs - num_columns) // 2
    starts = (0, middle, num_pairs - num_columns)
    return {band: list(range(start, start + num_columns)) for band, start in zip(BANDS, starts, strict=True)}


def draw_contact_sheet(rows: dict[str, list[tuple]], threshold: float):
    """
    Draw a row of images with scores and captions for each band of scores, as in Figure 2 of the supplement.

    Args:
        rows: For each band (image, caption, score) triples; images are PIL.
        threshold: Pairs below it are framed in red.

    Returns a matplotlib figure.
    """
    num_columns = max(len(row) for row in rows.values())
    figure = new_figure(2.3 * num_columns, 3.5 * len(rows))
    for band_figure, (band, row) in zip(
        figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True
    ):
        band_figure.suptitle(f"{band} scores", fontsize=11, x=0.01, ha="left", weight="bold")
        all_axes = band_figure.subplots(1, num_columns, squeeze=False)[0]
        for axes, (image, caption, score) in zip(all_axes, row, strict=False):
            _draw_pair(axes, image, caption, score, is_dropped=score < threshold)
    return figure


def _draw_pair(axes, image, caption: str, score: float, is_dropped: bool) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color="#c62828" if is_dropped else "#9e9e9e", linewidth=2.5 if is_dropped else 0.8)
    axes.set_title(f"{score:.3f}" + ("  dropped" if is_dropped else ""), fontsize=10)
    lines = textwrap.wrap(shorten(" ".join(caption.split()), 90), 32)
    axes.set_xlabel("\n".join(lines + [""] * (4 - len(lines))), fontsize=8)


def draw_histogram(scores: torch.Tensor, threshold: float, rule: str):
    """Draw the distribution of (C,) scores with the filter's threshold, by the rule named. Returns a figure."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    counts, edges, bars = axes.hist(scores.numpy(), bins=_edges(scores, threshold), color="#4a6fa5")
    for bar, edge in zip(bars, edges[1:], strict=True):
        if edge <= threshold:
            bar.set_color("#c62828")
    num_dropped = int((scores < threshold).sum())
    label = f"threshold {threshold:.3f}: {rule}\n{num_dropped:,} of {len(scores):,} pairs below"
    axes.axvline(threshold, color="#c62828", label=label)
    axes.axvline(scores.mean().item(), color="#333333", linestyle=":", label=f"mean {scores.mean().item():.3f}")
    axes.set_xlabel("similarity of the two embeddings of a pair")
    axes.set_ylabel("pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return figure


def _edges(scores: torch.Tensor, threshold: float) -> list[float]:
    """Edges of equal bins over all scores. One edge is the threshold, so that no bin lies on both sides of it."""
    low, high = scores.min().item(), scores.max().item()
    width = (high - low) / NUM_BINS or 1.0
    first = math.floor((low - threshold) / width)
    return [threshold + width * number for number in range(first, first + NUM_BINS + 2)]
