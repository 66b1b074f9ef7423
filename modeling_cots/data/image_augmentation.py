"""Turns an image into raw pixels at the model's size: timm's random resized crop, flip and policies, done fast.

Crops, flips and policies are drawn exactly as timm draws them. Two things make it faster: a JPEG is decoded at a
fraction of its size where the crop still has enough pixels, and only the crop is resized, antialiased, as bytes.
Pixels are normalized on the device (`pixel_normalization.py`).
"""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..image_reading_cots import ImageFile

POLICY = "rand-m5-n2-mstd0.5"  # an example
# A processor's call with tensors (3, H, W): it would take one that is 3 pixels wide for the other order.
AS_TENSORS = {"input_data_format": "channels_first"}


class ImageTransform:
    """
    Turns an image, as `read_image` takes it, into raw pixels (3, H, W) uint8.

    Args:
        image_size: Height and width of the result.
        image_mean: The processor's mean. Policies fill empty corners with it.
        min_crop_scale: Smallest share of the image that the random resized crop keeps; 1 = the whole image.
        horizontal_flip: Probability of flipping; it makes captions with "left" and "right" untrue.
        auto_augment: A policy of timm, such as "rand-m5-n2-mstd0.5".

    Raises `ValueError` for a policy that timm does not know.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        image_mean: list[float],
        *,
        min_crop_scale: float = 0.5,
        horizontal_flip: float = 0.0,
        auto_augment: str | None = None,
    ):
        from timm.data import create_transform

        self.image_size = (image_size[0], image_size[1])
        self.horizontal_flip = horizontal_flip
        try:
            stages = create_transform(
                (3, *image_size),
                is_training=True,
                scale=(min_crop_scale, 1.0),
                hflip=0.0,
                auto_augment=auto_augment,
                color_jitter=None,
                interpolation="bicubic",
                mean=image_mean,
                separate=True,
            )
        except (AssertionError, LookupError, TypeError, ValueError) as error:
            if auto_augment is None:
                raise
            raise ValueError(
                f"auto_augment={auto_augment} is no policy of timm, such as {POLICY}: {error}."
            ) from error
        (crop, *_), (*policies,), _ = (stage.transforms for stage in stages)
        self._crop = crop if min_crop_scale < 1 else None
        self._policies = policies

    def __call__(self, source) -> torch.Tensor:
        """Raises [`UnreadableImageError`] as `read_image` does."""
        return self.draw(source)[0]

    def draw(self, source) -> tuple[torch.Tensor, bool]:
        """The pixels, and whether they are flipped."""
        with ImageFile(source) as image_file:
            pixels = read_resized(image_file, self._draw_box(*image_file.size), self.image_size)
        is_flipped = self.draw_flip()
        if is_flipped:
            pixels = pixels.flip(-1)
        if self._policies:
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            for policy in self._policies:
                image = policy(image)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return pixels, is_flipped

    def draw_flip(self) -> bool:
        """Whether the next image is flipped."""
        return self.horizontal_flip > 0 and bool(torch.rand(1) < self.horizontal_flip)

    def _draw_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop, as timm draws them."""
        if self._crop is None:
            return 0, 0, height, width
        only_the_size = torch.empty(3, height, width, device="meta")
        return self._crop.get_params(only_the_size, self._crop.scale, self._crop.ratio)


def read_resized(image_file: ImageFile, box: tuple[int, int, int, int], image_size: tuple[int, int]) -> torch.Tensor:
    """
    A part of an image at another size, (3, H, W) uint8: bicubic and antialiased.

    Args:
        image_file: Not read yet.
        box: Top, left, height and width of the part, in pixels of `image_file.size`.
        image_size: H and W. A JPEG is decoded at a fraction of its size that leaves the part no smaller than this; the
            edges of the part are then rounded to whole pixels of what was decoded.
    """
    top, left, height, width = box
    pixels = image_file.read_pixels(max_reduction=min(height // image_size[0], width // image_size[1]))
    rows = _scaled(top, height, image_file.reduction)
    columns = _scaled(left, width, image_file.reduction)
    return resize(pixels[rows, columns], image_size)


def resize(pixels: np.ndarray, image_size: tuple[int, int]) -> torch.Tensor:
    """(height, width, 3) uint8 -> (3, H, W) uint8, bicubic and antialiased; the memory has the order (H, W, 3)."""
    part = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    if part.shape[:2] == image_size:
        return part.clone().permute(2, 0, 1)
    # With strides of a batch of one in front, torch knows its order of memory, and does not transpose the result.
    part = part[None].permute(0, 3, 1, 2)
    return F.interpolate(part, image_size, mode="bicubic", antialias=True)[0]


def resize_for(pixels: np.ndarray, image_processor) -> torch.Tensor:
    """
    A whole image for `image_processor`, which makes of it what it makes of the image in full.

    Args:
        pixels: (height, width, 3) uint8, as `read_pixels` gives them.

    Returns (3, H, W) uint8: of the processor's size, if this is a height and a width and its resampling is bicubic,
    else all pixels.
    """
    size = image_processor.size
    if image_processor.do_resize and image_processor.resample == Image.Resampling.BICUBIC:
        if size.get("height") and size.get("width"):
            return resize(pixels, (size["height"], size["width"]))
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)


def _scaled(start: int, length: int, reduction: int) -> slice:
    """An interval of pixels at 1/reduction of the size, to the nearest whole ones."""
    return slice(round(start / reduction), max(round((start + length) / reduction), round(start / reduction) + 1))
