"""What items carry: a name that travels through a batch. Seeds are tested where they are used, with the collator."""

import pytest
import torch

from modeling_cots.data.items import NAME_BYTES, decode_name, encode_names


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
