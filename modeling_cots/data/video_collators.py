"""Turns videos and captions into batches: chooses frames and a caption, crops all frames of a video alike, tokenizes.

The counterpart of `image_collators.py` for items of `open_videos`. Files are decoded here, frame by frame
(`video_reading_cots.py`). A video that cannot be read keeps its row, with `valid` False, and is named once.
"""

import random
from functools import partial

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from ..video_reading_cots import UnreadableVideoError, read_video
from .image_collators import RAW_PIXELS, caption_batch, tokenize
from .items import SampleRandomness, caption_ids
from .skip_report import SkipReport


class COTSVideoDataCollator:
    """
    Turns B items of a data set of videos into one training batch.

    A video is divided into T equal segments, T being the video processor's `num_frames`, and a random frame of each is
    taken. All frames of a video are cropped and flipped alike. All draws depend on the item's seed alone.

    Args:
        processor: Has a `video_processor` with `num_frames` and a `size` of height and width, and a `tokenizer`.
        max_text_length: Longer captions are cut to so many tokens.
        min_crop_scale: Smallest share of the image that the random resized crop keeps; 1 = no crop.
        horizontal_flip: Probability of flipping a video; it makes captions with "left" and "right" untrue.

    Returns a dict of tensors: pixel_values_videos (B, T, 3, H, W) uint8, which [`PixelNormalizer`] normalizes on the
    device; input_ids, attention_mask (B, L); pair_ids, caption_ids (B,) int64; valid (B,) bool.

    Raises `ValueError` for a processor without a fixed number of frames.
    """

    def __init__(self, processor, *, max_text_length: int, min_crop_scale: float = 1.0, horizontal_flip: float = 0.0):
        self.tokenizer, self.video_processor = processor.tokenizer, checked_video_processor(processor)
        self.max_text_length = max_text_length
        changes = []
        if min_crop_scale < 1:
            size = self.video_processor.size
            scale = (min_crop_scale, 1.0)
            changes.append(
                v2.RandomResizedCrop((size.height, size.width), scale, interpolation=InterpolationMode.BICUBIC)
            )
        if horizontal_flip > 0:
            changes.append(v2.RandomHorizontalFlip(horizontal_flip))
        self.augment = v2.Compose(changes) if changes else None
        self.report = SkipReport("video")

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        videos, captions = [], []
        with SampleRandomness() as seed_for:
            for item in items:
                seed_for(item.get("seed"))
                captions.append(random.choice(item["captions"]))
                videos.append(_load(self._read, item, self.report))
        tokens = tokenize(self.tokenizer, captions, self.max_text_length)
        return {
            **_video_batch(videos, self.video_processor),
            "pair_ids": torch.tensor([item["pair_id"] for item in items]),
            "caption_ids": caption_ids(captions),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }

    def _read(self, path: str) -> torch.Tensor:
        processor = self.video_processor
        choose = partial(processor.sample_frames, num_frames=processor.num_frames, random_frames=True)
        frames = torch.from_numpy(read_video(path, choose)[0]).permute(0, 3, 1, 2)
        if self.augment is not None:
            frames = self.augment(frames)
        return processor(frames, do_sample_frames=False, **RAW_PIXELS)["pixel_values_videos"][0]


class COTSVideoEvaluationCollator:
    """
    Turns B items of a data set of videos into one batch for embedding: the middle frame of each segment, and all
    captions.

    Returns a dict of tensors: pixel_values_videos (B, T, 3, H, W) uint8, as in training; pair_ids (B,); valid (B,)
    bool; and for the C captions of the B videos input_ids, attention_mask (C, L) and caption_pair_ids (C,). Raises
    `ValueError` for a processor without a fixed number of frames.
    """

    def __init__(self, processor, *, max_text_length: int):
        self.tokenizer, self.video_processor = processor.tokenizer, checked_video_processor(processor)
        self.max_text_length = max_text_length
        self.report = SkipReport("video")

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        videos = [_load(self._read, item, self.report) for item in items]
        return {
            **_video_batch(videos, self.video_processor),
            **caption_batch(items, self.tokenizer, self.max_text_length),
        }

    def _read(self, path: str) -> torch.Tensor:
        found = self.video_processor(path, random_frames=False, **RAW_PIXELS)
        return found["pixel_values_videos"][0]


def checked_video_processor(processor):
    """The video processor of a [`COTSProcessor`]. Raises `ValueError` without one, or where videos would differ in
    length."""
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None:
        raise ValueError("Videos need a processor with a `video_processor`; this one has none.")
    if not video_processor.num_frames or video_processor.num_frames < 1 or video_processor.fps is not None:
        raise ValueError(
            "All videos of a batch need equally many frames: set `num_frames` of the video processor, and no `fps`; "
            f"got {video_processor.num_frames} and {video_processor.fps}."
        )
    return video_processor


def check_videos_readable(dataset, num_tries: int = 20) -> None:
    """Raise `ValueError` if none of the first `num_tries` videos of a data set can be read."""
    errors = []
    for index in range(min(num_tries, len(dataset))):
        item = dataset[index]
        try:
            if item.get("refused"):
                raise UnreadableVideoError(item["refused"])
            read_video(item["video"], lambda metadata: np.zeros(1, dtype=np.int64))
            return
        except UnreadableVideoError as error:
            errors.append(f"{item['name']} ({error})")
    raise ValueError(f"None of the first {len(errors)} videos can be read, beginning with {errors[0]}.")


def _load(read, item: dict, report: SkipReport) -> torch.Tensor | None:
    try:
        if item.get("refused"):
            raise UnreadableVideoError(item["refused"])
        return read(item["video"])
    except UnreadableVideoError as error:
        report.add(item["name"], error)
        return None


def _video_batch(videos: list[torch.Tensor | None], video_processor) -> dict[str, torch.Tensor]:
    """Pixels (B, T, 3, H, W), which are black for unreadable videos, and `valid` (B,)."""
    shape = (video_processor.num_frames, 3, video_processor.size.height, video_processor.size.width)
    blank = torch.zeros(shape, dtype=torch.uint8)
    return {
        "pixel_values_videos": torch.stack([blank if video is None else video for video in videos]),
        "valid": torch.tensor([video is not None for video in videos]),
    }
