"""The contact sheet and the histogram: which pairs are shown, and which are marked as dropped."""

import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from modeling_cots.visualization.score_figures import band_positions, draw_contact_sheet, draw_histogram


def test_bands_stand_at_both_ends_and_in_the_middle():
    bands = band_positions(100)
    assert bands == {
        "lowest": [0, 1, 2, 3, 4, 5],
        "middle": [47, 48, 49, 50, 51, 52],
        "highest": [94, 95, 96, 97, 98, 99],
    }


def test_a_small_data_set_shows_all_it_has():
    assert band_positions(2)["highest"] == [0, 1]
    assert band_positions(1) == {"lowest": [0], "middle": [0], "highest": [0]}


def test_the_sheet_marks_what_is_below_the_threshold(tmp_path):
    image = Image.new("RGB", (20, 20), "teal")
    rows = {"lowest": [(image, "a" * 300, -0.2), (image, "", 0.3)], "highest": [(image, "one\ntwo", 0.9)]}
    figure = draw_contact_sheet(rows, threshold=0.1)
    titles = [axes.get_title() for part in figure.subfigs for axes in part.axes if axes.get_title()]
    assert titles == ["-0.200  dropped", "0.300", "0.900"]
    figure.savefig(tmp_path / "sheet.jpg")
    assert Image.open(tmp_path / "sheet.jpg").width > 300


def test_the_histogram_counts_what_is_below():
    scores = torch.tensor([0.1, 0.5, 0.6, 0.6, 0.7])
    axes = draw_histogram(scores, threshold=0.3, rule="mean − 2 std").axes[0]
    label = axes.get_legend().get_texts()[0].get_text()
    assert "1 of 5 pairs below" in label and "2 std" in label
    assert sum(bar.get_height() for bar in axes.patches) == 5


@pytest.mark.parametrize("threshold", [-0.4, 0.013, 0.5])  # below all of them, among them, above all
def test_the_histogram_colors_exactly_what_is_below(threshold):
    scores = torch.linspace(-0.2, 0.3, 501)
    axes = draw_histogram(scores, threshold, rule="mean − 2 std").axes[0]
    heights = {}
    for bar in axes.patches:
        color = to_hex(bar.get_facecolor())
        heights[color] = heights.get(color, 0) + bar.get_height()
    num_below = int((scores < threshold).sum())
    assert heights.get("#c62828", 0) == num_below and heights.get("#4a6fa5", 0) == 501 - num_below


def test_a_histogram_of_one_score():
    axes = draw_histogram(torch.full((3,), 0.25), threshold=0.25, rule="mean − 2 std").axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 3
