"""`COTSImageProcessor`: images of any mode as training sees them, resized and normalized for the vision encoder."""

import numpy as np
import torch
from transformers import ViTImageProcessor
from transformers.image_utils import PILImageResampling, SizeDict, is_pil_image

from .image_reading_cots import check_sides, fetch_image, read_image


class COTSImageProcessor(ViTImageProcessor):
    """
    Turns images into `pixel_values` (B, 3, H, W).

    It differs from the class of transformers in how it reads them: with `image_reading_cots.py`, as training does.
    Images are turned upright by their EXIF orientation, 16 bits a pixel are scaled to 8, and transparency is dropped.
    A string is a path, a URL or base64. Arrays and tensors have no mode: of them, only uint16 is scaled.

    Raises `ValueError` for an image that cannot be read, and for one that is too long to be resized.
    """

    resample = PILImageResampling.BICUBIC
    size = {"height": 384, "width": 384}
    do_convert_rgb = True

    def fetch_images(self, image_url_or_urls):
        """Read the strings among images, which may be nested lists."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str):
            return fetch_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image, do_convert_rgb: bool | None = None, **kwargs) -> torch.Tensor:
        """One image as a tensor (3, height, width)."""
        if is_pil_image(image) and do_convert_rgb:
            image = read_image(image)
        elif isinstance(image, torch.Tensor) and image.dtype == torch.uint16:
            image = image.numpy()
        if isinstance(image, np.ndarray) and image.dtype == np.uint16:
            image = (image >> 8).astype(np.uint8)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, *args, **kwargs) -> torch.Tensor:
        """Resize equally large images. A size that only bounds the shorter side must not make the other too long."""
        check_resized(image, size)
        return super().resize(image, size, *args, **kwargs)


def check_resized(image: torch.Tensor, size: SizeDict) -> None:
    """Raise `ValueError` if images (..., height, width) would be too long after they are resized, or are before."""
    height, width = image.shape[-2:]
    check_sides(width, height)
    if size.shortest_edge and not size.longest_edge:
        factor = size.shortest_edge / min(height, width)
        check_sides(width * factor, height * factor)


__all__ = ["COTSImageProcessor"]
