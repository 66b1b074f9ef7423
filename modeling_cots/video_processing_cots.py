"""`COTSVideoProcessor`: 16 uniformly sampled frames, prepared as images are (COTS, CVPR 2022, supplement)."""

import numpy as np
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata


class COTSVideoProcessor(BaseVideoProcessor):
    """
    Samples frames uniformly over the whole video, resizes and normalises them: `pixel_values_videos` (B, T, 3, H, W).

    A video of fewer than `num_frames` frames repeats some of them, so that every video gives a tensor of equal shape;
    transformers' default refuses it. Decoded videos are arrays (frames, height, width, 3) or (frames, 3, height,
    width); paths and URLs are decoded by transformers' video utilities.
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

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Positions of the frames to take: the middle frame of each of `num_frames` equal segments.

        Args:
            metadata: Gives the number of frames of the video, and its frame rate where `fps` is asked for.
            num_frames: T; repeated positions where the video is shorter.
            fps: Frames a second to take instead; with it, `num_frames` must be None.
        """
        if fps is not None:
            return super().sample_frames(metadata, num_frames=num_frames, fps=fps, **kwargs)
        total = metadata.total_num_frames
        if num_frames is None:
            return np.arange(total)
        return ((np.arange(num_frames) + 0.5) * total / num_frames).astype(int)


__all__ = ["COTSVideoProcessor"]
