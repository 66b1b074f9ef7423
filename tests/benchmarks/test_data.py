"""The data benchmark at toy size: it runs, and its rows are what the table is made of."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

import data as data_benchmark
import run_all

from modeling_cots.image_reading_cots import ImageFile


def test_every_row_is_measured():
    rows = data_benchmark.measure("cpu", quick=True)
    assert [entry["id"] for entry in rows] == [*["8"] * 14, "9", "bytes"]
    assert all(set(entry) == run_all.FIELDS for entry in rows)
    missing = [entry["note"] for entry in rows if entry["ratio"] is None]
    assert set(missing) <= set(data_benchmark.MISSING.values())
    assert all(entry["ratio"] > 0 for entry in rows if entry["ratio"] is not None)
    assert rows[-1]["ratio"] == 4.0


def test_decoding_has_one_thread_and_gives_the_others_back():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with data_benchmark.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


def test_images_have_the_grain_of_photographs():
    jpeg = data_benchmark.draw_jpeg(500, 0)
    assert 1.5 < 8 * len(jpeg) / (500 * 375) < 3


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("name", data_benchmark.DECODERS)
def test_every_decoder_gives_the_image(name, factor):
    decode = data_benchmark.DECODERS[name]
    if decode is None:
        pytest.skip(data_benchmark.MISSING[name])
    image = data_benchmark.draw_jpeg(200, 0)
    with ImageFile(image) as opened:
        expected = opened.read_pixels(1 if name == "torchvision" else factor)
    assert np.abs(decode(image, factor).astype(int) - expected).max() <= 2
