"""`COTSVideoProcessor`: 16 uniformly sampled frames, prepared as images are (COTS, CVPR 2022, supplement)."""

import numpy as np
import torch
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling, SizeDict
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import is_av_available
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .image_processing_cots import check_resized
from .video_reading_cots import read_video


class COTSVideosKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    """
    Keyword arguments of a call, beside those of every video processor.

    Args:
        random_frames (`bool`, *optional*): Take a random frame of each segment instead of its middle one: training.
    """

    random_frames: bool | None


class COTSVideoProcessor(BaseVideoProcessor):
    """
    Samples frames uniformly over the whole video, resizes and normalizes them: `pixel_values_videos` (B, T, 3, H, W).

    A video of fewer than `num_frames` frames repeats some of them, so that every video gives a tensor of equal shape.
    transformers' default refuses such a video. Videos are arrays (frames, height, width, 3) or (frames, 3, height,
    width), paths of files, which are decoded frame by frame (`read_video`), or URLs, which transformers fetches.

    Set at construction or at a call: `num_frames` (16; `None` takes all frames); `fps`, frames a second, in place of
    it; `random_frames` (`False`; `True` in training), drawn from torch's generator.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 16
    random_frames = False
    valid_kwargs = COTSVideosKwargs

    def preprocess(self, videos, **kwargs: Unpack[COTSVideosKwargs]):
        """As the base class does. With `fps` in the call, a `num_frames` from construction does not count."""
        if kwargs.get("fps") is not None:
            kwargs.setdefault("num_frames", None)
        return super().preprocess(videos, **kwargs)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        random_frames: bool | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Positions (T,) of the frames to take, ascending: one from each of T equal segments of the video.

        Args:
            metadata: Has the number of frames of the video, and its frame rate, which `fps` needs.
            num_frames: T; a video with fewer frames repeats some. `None` takes all frames.
            fps: Frames a second to take instead; a video gives at least one frame.
            random_frames: A random frame of each segment instead of its middle one.

        Raises `ValueError` without metadata, for a video without frames, for `num_frames` and `fps` at once, and for
        `fps` of a video whose own rate is not known.
        """
        if metadata is None:
            raise ValueError("Frames cannot be sampled without metadata: give the number of frames of the video.")
        total = metadata.total_num_frames
        if total == 0:
            raise ValueError("A video must have at least one frame; got one without.")
        if fps is not None:
            num_frames = _num_frames_at(fps, num_frames, metadata)
        if num_frames is None:
            return np.arange(total)
        offsets = torch.rand(num_frames).double().numpy() if random_frames else 0.5
        return ((np.arange(num_frames) + offsets) * total / num_frames).astype(int)

    def resize(self, image: torch.Tensor, size: SizeDict, *args, **kwargs) -> torch.Tensor:
        """Resize frames (..., height, width). Raises `ValueError` for frames that are too long."""
        check_resized(image, size)
        return super().resize(image, size, *args, **kwargs)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        """Decode files with `read_video` where PyAV is installed; URLs are left to the base class."""
        if isinstance(video_url_or_urls, list):
            return list(zip(*(self.fetch_videos(url, sample_indices_fn) for url in video_url_or_urls), strict=True))
        if isinstance(video_url_or_urls, str) and "://" not in video_url_or_urls and is_av_available():
            return read_video(video_url_or_urls, sample_indices_fn)
        return super().fetch_videos(video_url_or_urls, sample_indices_fn=sample_indices_fn)


def _num_frames_at(fps: float, num_frames: int | None, metadata: VideoMetadata) -> int:
    if num_frames is not None:
        raise ValueError(f"Give `num_frames` or `fps`, not both; got {num_frames} and {fps}.")
    if not metadata.fps:
        raise ValueError(f"Cannot take {fps} frames a second of a video of unknown rate: give `num_frames` instead.")
    return max(1, int(metadata.total_num_frames / metadata.fps * fps))


__all__ = ["COTSVideoProcessor"]
