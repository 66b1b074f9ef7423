"""COTSVideoProcessor: which frames it takes, what becomes of them, and real files."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata
from video_files import LEVELS, numbers_of, write_audio, write_video

from modeling_cots import COTSVideoProcessor
from modeling_cots.video_reading_cots import UnreadableVideoError

LENGTHS = st.integers(1, 3000)
COUNTS = st.integers(1, 64)


@pytest.fixture
def processor() -> COTSVideoProcessor:
    """Frames as they are, so that a pixel tells the frame's number."""
    return COTSVideoProcessor(do_resize=False, do_rescale=False, do_normalize=False)


def clip(*numbers: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    """Frames (T, H, W, 3), each of the gray level that tells its number."""
    return np.stack([np.full((*size, 3), LEVELS * number, np.uint8) for number in numbers])


def taken(processor: COTSVideoProcessor, videos, **kwargs) -> list[list[int]]:
    """The numbers of the frames that come out, video by video."""
    pixels = processor(videos, **kwargs)["pixel_values_videos"]
    return [numbers_of(np.asarray(video).transpose(0, 2, 3, 1)) for video in pixels]


# Which frames


@given(total=LENGTHS, num_frames=COUNTS)
def test_frames_are_the_middle_ones_of_equal_segments(total, num_frames):
    positions = COTSVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total), num_frames=num_frames)
    assert positions.tolist() == [(2 * k + 1) * total // (2 * num_frames) for k in range(num_frames)]
    if total <= num_frames:
        assert set(positions.tolist()) == set(range(total))


@given(total=LENGTHS, num_frames=COUNTS, seed=st.integers(0, 2**31))
def test_random_frames_lie_in_their_segments(total, num_frames, seed):
    torch.manual_seed(seed)
    metadata = VideoMetadata(total_num_frames=total)
    positions = COTSVideoProcessor().sample_frames(metadata, num_frames=num_frames, random_frames=True).tolist()
    for k, position in enumerate(positions):
        assert k * total // num_frames <= position <= ((k + 1) * total - 1) // num_frames
    assert positions == sorted(positions) and len(positions) == num_frames


@pytest.mark.parametrize("total", [1, 16, 17, 1_000_003])
def test_the_largest_random_number_stays_inside_the_video(total, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n: torch.full((n,), 1 - 2.0**-24))
    metadata = VideoMetadata(total_num_frames=total)
    assert COTSVideoProcessor().sample_frames(metadata, num_frames=16, random_frames=True).max() == total - 1


def test_random_frames_follow_the_seed_and_reach_every_frame(processor):
    video = clip(*range(40))

    def draw(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return taken(processor, video, num_frames=4, random_frames=True)[0]

    assert draw(1) == draw(1) and len({tuple(draw(seed)) for seed in range(20)}) > 10
    assert {number for seed in range(200) for number in draw(seed)} == set(range(40))


def test_sixteen_frames_by_default_and_none_at_random(processor):
    assert taken(processor, clip(*range(32))) == [[2 * k + 1 for k in range(16)]]


@pytest.mark.parametrize("length", [1, 3, 15])
def test_a_short_video_repeats_frames(processor, length):
    (numbers,) = taken(processor, clip(*range(length)))
    assert len(numbers) == 16 and set(numbers) == set(range(length)) and numbers == sorted(numbers)


def test_number_of_frames_of_a_call_and_all_frames(processor):
    video = clip(*range(20))
    assert taken(processor, video, num_frames=2) == [[5, 15]]
    assert taken(processor, video, num_frames=None) == [list(range(20))]
    assert taken(processor, video, do_sample_frames=False) == [list(range(20))]
    assert taken(COTSVideoProcessor(**{**processor.to_dict(), "num_frames": None}), video) == [list(range(20))]


def test_frames_a_second_take_the_place_of_a_number(processor):
    video, metadata = clip(*range(20)), {"total_num_frames": 20, "fps": 10.0}
    assert taken(processor, video, fps=2, video_metadata=metadata) == [[2, 7, 12, 17]]
    assert taken(processor, video, fps=0.1, video_metadata=metadata) == [[10]]
    by_rate = COTSVideoProcessor(**{**processor.to_dict(), "num_frames": None, "fps": 2})
    assert taken(by_rate, video, video_metadata=metadata) == [[2, 7, 12, 17]]


def test_what_cannot_be_sampled_is_refused(processor):
    video = clip(*range(20))
    with pytest.raises(ValueError, match="not both; got 4 and 2"):
        processor(video, num_frames=4, fps=2, video_metadata={"total_num_frames": 20, "fps": 10.0})
    with pytest.raises(ValueError, match="unknown rate"):
        processor(video, fps=2)
    with pytest.raises(ValueError, match="without metadata"):
        processor.sample_frames(metadata=None, num_frames=4)
    with pytest.raises(ValueError, match="unknown rate"):
        processor.sample_frames(VideoMetadata(total_num_frames=8), fps=3)
    with pytest.raises(ValueError, match="at least one frame"):
        processor.sample_frames(VideoMetadata(total_num_frames=0), num_frames=16)


# What becomes of them


def test_pixels_are_scaled_and_normalized():
    """(x / 255 - mean) / std per channel, of an image that needs no resizing."""
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
    video = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    processor = COTSVideoProcessor(size={"height": 8, "width": 8}, image_mean=mean, image_std=std, num_frames=3)
    pixels = processor(video, return_tensors="pt")["pixel_values_videos"]
    expected = ((video / 255 - mean) / std).transpose(0, 3, 1, 2)
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, 3, 8, 8)
    np.testing.assert_allclose(pixels[0].numpy(), expected, atol=1e-5)


def test_videos_of_any_shape_become_one_batch():
    processor = COTSVideoProcessor()
    pixels = processor([clip(1, 2), clip(*range(30), size=(20, 9))], return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape == (2, 16, 3, 384, 384) and pixels.isfinite().all()


@pytest.mark.parametrize("form", ["channels first", "tensor", "grey", "images"])
def test_forms_of_a_video(processor, form):
    video = clip(*range(8))
    forms = {
        "channels first": video.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(video),
        "grey": video[..., :1],
        "images": [Image.fromarray(frame) for frame in video],
    }
    assert taken(processor, forms[form], num_frames=4) == [[1, 3, 5, 7]]


# Files


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.avi"])
def test_files_give_the_frames_of_their_arrays(tmp_path, processor, name):
    path = write_video(tmp_path / name, range(33))
    assert taken(processor, path) == taken(processor, clip(*range(33)))
    assert taken(processor, [path, path], num_frames=3) == [[5, 16, 27]] * 2
    assert taken(processor, path, num_frames=None) == [list(range(33))]
    torch.manual_seed(0)
    from_file = taken(processor, path, random_frames=True)
    torch.manual_seed(0)
    assert from_file == taken(processor, clip(*range(33)), random_frames=True)


def test_a_file_tells_its_own_rate(tmp_path, processor):
    path = write_video(tmp_path / "a.mp4", range(20), frame_rate=10)
    found = processor(path, fps=5, return_metadata=True)
    assert numbers_of(np.asarray(found["pixel_values_videos"][0]).transpose(0, 2, 3, 1)) == list(range(1, 20, 2))
    (metadata,) = found["video_metadata"]
    assert metadata.timestamps == pytest.approx([0.1 + 0.2 * k for k in range(10)])


def test_files_of_different_shapes_and_lengths_become_one_batch(tmp_path):
    paths = [
        write_video(tmp_path / "long.mp4", range(40)),
        write_video(tmp_path / "short.webm", range(3), size=(96, 48)),
        write_video(tmp_path / "single.avi", [5]),
    ]
    processor = COTSVideoProcessor(size={"height": 32, "width": 32}, do_normalize=False)
    pixels = processor(paths, return_tensors="pt")["pixel_values_videos"]
    assert pixels.shape == (3, 16, 3, 32, 32)
    assert (pixels[1].mean(dim=(1, 2, 3)) * 255 / LEVELS).round().unique().tolist() == [0, 1, 2]
    assert torch.equal(pixels[2], pixels[2, :1].expand(16, -1, -1, -1))


def test_files_that_cannot_be_read_raise_the_one_error(tmp_path, processor):
    for path in (str(tmp_path / "missing.mp4"), write_audio(tmp_path / "sound.mp3")):
        with pytest.raises(UnreadableVideoError):
            processor(path)


# In the company of others


def test_saving_keeps_every_setting(tmp_path, processor):
    assert COTSVideoProcessor().to_dict()["num_frames"] == 16
    changed = COTSVideoProcessor(size={"height": 64, "width": 48}, num_frames=None, fps=2, random_frames=True)
    changed.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["num_frames"] is None and saved["random_frames"] is True
    for reloaded in (COTSVideoProcessor.from_pretrained(tmp_path), AutoVideoProcessor.from_pretrained(tmp_path)):
        assert isinstance(reloaded, COTSVideoProcessor) and reloaded.to_dict() == changed.to_dict()


def test_its_own_keyword_reaches_it_through_the_processor(tiny_processor):
    video = clip(*range(40))

    def pixels(**kwargs) -> torch.Tensor:
        torch.manual_seed(5)
        return tiny_processor(videos=video, return_tensors="pt", **kwargs)["pixel_values_videos"]

    flat, nested = pixels(random_frames=True), pixels(videos_kwargs={"random_frames": True})
    assert torch.equal(flat, nested) and not torch.equal(flat, pixels())


def test_its_keywords_are_those_of_every_video_processor_and_one_more(processor):
    """
    A class of its own, as the library's processors with options of their own have: without it transformers would
    neither check `random_frames` nor hand it on.
    """
    own, every = (each.valid_kwargs.__annotations__ for each in (COTSVideoProcessor, BaseVideoProcessor))
    assert set(own) - set(every) == {"random_frames"} and set(every) <= set(own)


def test_a_longer_sample_than_the_video_is_not_refused(processor):
    """Unlike the library's: every video gives a tensor of equal shape, so that a clip of seconds can be in a batch."""
    assert taken(processor, clip(1, 2), num_frames=4) == [[1, 1, 2, 2]]
    with pytest.raises(ValueError, match="num_frames"):
        BaseVideoProcessor.sample_frames(processor, VideoMetadata(total_num_frames=2), num_frames=4)


def test_a_keyword_of_the_wrong_type_is_refused(processor):
    with pytest.raises(StrictDataclassFieldValidationError, match="random_frames"):
        processor(clip(1, 2), random_frames="yes")
