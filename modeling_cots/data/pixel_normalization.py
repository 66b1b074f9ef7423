"""Normalizes raw pixels on the device: one byte for each value is copied there, not the four of a float."""

import torch
from torch import nn


class PixelNormalizer(nn.Module):
    """
    Normalizes the raw images and videos of a batch as the processor would, within 1e-6.

    Args:
        processor: Its `image_processor` and, if it has one, its `video_processor` give mean, deviation and scale.
    """

    def __init__(self, processor):
        super().__init__()
        self._names = []
        for name, part in (("pixel_values", "image_processor"), ("pixel_values_videos", "video_processor")):
            settings = getattr(processor, part, None)
            if settings is not None:
                self._names.append(name)
                scale, shift = _scale_and_shift(settings)
                self.register_buffer(f"{name}_scale", scale, persistent=False)
                self.register_buffer(f"{name}_shift", shift, persistent=False)

    def forward(self, batch: dict) -> dict:
        """
        The batch with float32 pixels in place of uint8 ones. Raw images stay in it as `raw_pixels` (B, 3, H, W) uint8.

        Floats, which a custom collator may give, count as normalized and pass as they are.
        """
        for name in self._names:
            pixels = batch.get(name)
            if pixels is not None and pixels.dtype == torch.uint8:
                pixels = pixels.contiguous()  # collators leave them in the order of memory that images have
                scale, shift = getattr(self, f"{name}_scale"), getattr(self, f"{name}_shift")
                batch = {**batch, name: pixels.float().mul_(scale).sub_(shift)}
                if name == "pixel_values":
                    batch["raw_pixels"] = pixels
        return batch


def _scale_and_shift(settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each: x * scale - shift is what the processor makes of a byte x."""
    factor = settings.rescale_factor if settings.do_rescale else 1.0
    mean, std = (settings.image_mean, settings.image_std) if settings.do_normalize else ([0.0], [1.0])
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (factor / std).float(), (mean / std).float()
