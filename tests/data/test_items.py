"""What items carry: a name that travels through a batch. Seeds are tested where they are used, with the collator."""

import random

import numpy as np
import pytest
import torch

from modeling_cots.data.items import NAME_BYTES, SampleRandomness, caption_ids, decode_name, encode_names


@pytest.mark.parametrize("names", [["a.jpg"], ["", "row 3", "Ünïcödé/北京.png"], []])
def test_names_come_back(names):
    encoded = encode_names(names)
    assert encoded.shape == (len(names), NAME_BYTES)
    assert encoded.dtype == torch.uint8
    assert [decode_name(row) for row in encoded] == names


def test_of_a_long_name_the_end_stays():
    name = "folder/" * 40 + "image.jpg"
    assert decode_name(encode_names([name])[0]) == name[-NAME_BYTES:]
    cut = decode_name(encode_names(["北" * 100])[0])  # three bytes each: the cut may fall within a character
    assert set(cut) == {"北"}
    assert len(cut) == NAME_BYTES // 3


def test_a_name_that_is_no_text_does_no_harm():
    assert decode_name(encode_names(["bad\udcff.jpg"])[0]) == "bad?.jpg"


@pytest.mark.parametrize(
    "captions",
    [
        ["Stock photo", "stock  photo", "STOCK PHOTO.", " stock\tphoto\n", "\u201cStock photo\u201d"],
        ["Ｓtock photo", "stock photo!"],  # a full-width letter
        ["Straße", "STRASSE"],
        ["caf\u00e9", "cafe\u0301"],  # one letter, or two
        ["...", "..."],
        ["", "  "],
    ],
)
def test_captions_of_equal_text_have_one_number(captions):
    assert len(set(caption_ids(captions).tolist())) == 1


def test_captions_of_other_text_have_other_numbers():
    captions = [
        "a red dog",
        "a red cat",
        "red a dog",
        "a red dog runs",
        "कि",
        "का",
        "C++",
        "C#",
        "😀",
        "😃",
        "...",
        "",
    ]
    numbers = caption_ids(captions)
    assert numbers.dtype == torch.int64 and (numbers >= 0).all()
    assert len(set(numbers.tolist())) == len(captions)


def test_a_caption_has_the_same_number_in_every_process():
    assert caption_ids(["a red dog"]).tolist() == [4201942868151238216], (
        "queues in saved checkpoints hold these numbers"
    )


def test_half_a_surrogate_pair_does_no_harm():
    assert caption_ids(["dog \ud800"]).shape == (1,)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_one_by_one(seeds: list[int | None]) -> list[tuple]:
    """The slow twin: all generators put aside for every sample with a seed."""
    drawn = []
    for seed in seeds:
        if seed is None:
            drawn.append(draw())
            continue
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        drawn.append(draw())
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    return [*drawn, draw()]


@pytest.mark.parametrize("seeds", [[1, 2**62, 1], [None, 3, None, None, 4], [5, None], [None], []])
def test_each_sample_draws_by_its_own_seed_and_nothing_else_notices(seeds):
    found = []
    for draw_all in (draw_one_by_one, None):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        if draw_all is not None:
            found.append(draw_all(seeds))
            continue
        drawn = []
        with SampleRandomness() as seed_for:
            for seed in seeds:
                seed_for(seed)
                drawn.append(draw())
        found.append([*drawn, draw()])
    assert found[0] == found[1]


def test_a_sample_that_fails_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    with pytest.raises(RuntimeError), SampleRandomness() as seed_for:
        seed_for(7)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), expected)
