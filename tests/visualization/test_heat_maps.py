"""Heat maps: the hot place stays where it is, and every word gets its panel."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_cots.visualization.heat_maps import draw_word_maps, overlay, resize_map
from modeling_cots.visualization.relevance import PairRelevance, Word

CAPTION = "a red circle above a small blue square"


@pytest.fixture
def hot_corner() -> torch.Tensor:
    relevance = torch.full((4, 4), 0.01)
    relevance[3, 1] = 0.2
    return relevance


def test_a_resized_map_keeps_its_maximum_in_place(hot_corner):
    heat = resize_map(hot_corner, width=80, height=40)
    assert heat.shape == (40, 80)
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert row >= 30 and 20 <= column < 40
    assert 0 <= heat.min() and heat.max() == pytest.approx(1, abs=0.05)


def test_a_map_of_nothing_stays_dark():
    assert (resize_map(torch.zeros(4, 4), 8, 8) == 0).all()


def test_the_overlay_is_brightest_where_the_map_is(hot_corner):
    image = overlay(Image.new("RGB", (80, 40), "grey"), hot_corner)
    assert image.size == (80, 40)
    brightness = np.asarray(image).sum(axis=2)
    assert brightness[35, 30] > 2 * brightness[5, 70]


@pytest.mark.parametrize("num_words", [0, 1, 6])
@pytest.mark.parametrize("size", [(40, 30), (30, 200)])
def test_one_titled_panel_a_word_and_a_color_bar(tmp_path, num_words, size):
    words = [Word(text, (place + 1,)) for place, text in enumerate(CAPTION.split())]
    relevance = PairRelevance(
        score=0.5,
        caption_map=torch.rand(4, 4),
        words=words[:num_words],
        word_maps=torch.rand(num_words, 4, 4),
        word_scores=torch.linspace(-0.1, 0.2, num_words),
        caption_words=words,
        caption_relevance=torch.rand(len(words)),
    )
    figure = draw_word_maps(Image.new("RGB", size), CAPTION, relevance)
    titles = [axes.get_title() for part in figure.subfigs for axes in part.axes]
    assert titles[0] == "image" and titles[1] == "whole caption  0.50"
    for place, word in enumerate(words[:num_words]):
        assert titles[2 + place].startswith(word.text)
    assert any(axes.get_ylabel().startswith("relevance") for part in figure.subfigs for axes in part.axes)
    figure.savefig(tmp_path / "maps.png")
    assert Image.open(tmp_path / "maps.png").width > 200


def test_no_word_adds_less_than_nothing_by_rounding():
    word = Word("red", (2,))
    relevance = PairRelevance(
        0.5, torch.rand(4, 4), [word], torch.rand(1, 4, 4), torch.tensor([-0.004]), [word], torch.ones(1)
    )
    figure = draw_word_maps(Image.new("RGB", (30, 30)), "red", relevance)
    assert "red  +0.00" in [axes.get_title() for part in figure.subfigs for axes in part.axes]
