"""`ImageTokenizer`: images to visual tokens on the patch grid, the targets of masked vision modeling (CMVM).

COTS (CVPR 2022, supplement): the raw image is average-pooled 384 -> 192, and the encoder of DALL-E's discrete VAE,
which down-samples 8 x, gives 24 x 24 ids, one for every patch. In general the pooled image has 8 x 8 pixels a patch,
each the mean of an equal area of the raw image. The dVAE is transformers' `FlavaImageCodebook`. It is frozen and not
part of the trained model.
"""

import hashlib
import json
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

PIXELS_PER_TOKEN = 8  # the dVAE's down-sampling
LAPLACE_EPSILON = 0.1  # the dVAE expects pixels in [0, 1] mapped by x -> (1 - 2e) x + e


class ImageTokenizer(nn.Module):
    """
    Visual tokens of raw or normalized pixels.

    Args:
        codebook (`FlavaImageCodebook`): The encoder of the discrete VAE; it is frozen.
        image_mean (`list[float]`): Mean of each channel, which the processor has subtracted.
        image_std (`list[float]`): Standard deviation of each channel, by which it has divided.
    """

    def __init__(self, codebook: FlavaImageCodebook, image_mean: list[float], image_std: list[float]):
        super().__init__()
        # Frozen after loading, as `from_pretrained` turns gradients on. Convolutions are faster with channels last.
        self.codebook = codebook.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(-1, 1, 1))
        self.register_buffer("image_std", torch.tensor(image_std).view(-1, 1, 1))

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, image_mean: list[float], image_std: list[float], revision: str = "main"
    ) -> "ImageTokenizer":
        """Load the codebook from a Hub id (the paper's: `facebook/flava-image-codebook`) or a folder."""
        return cls(FlavaImageCodebook.from_pretrained(name_or_path, revision=revision), image_mean, image_std)

    @classmethod
    def random(
        cls, vocab_size: int, image_mean: list[float], image_std: list[float], *, seed: int = 0, hidden_size: int = 8
    ) -> "ImageTokenizer":
        """
        A small codebook with random weights, used as a random-projection quantizer (BEST-RQ, Chiu et al., 2022).

        Its tokens have no meaning, but equal patches have equal tokens, so that they can be predicted from the rest
        of the image. For tests, and for machines without access to a model hub.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the accelerator for good
            codebook = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=hidden_size, vocab_size=vocab_size))
            _spread_codes(codebook)
        return cls(codebook, image_mean, image_std)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.codebook.config.vocab_size

    def fingerprint(self, patch_size: tuple[int, int]) -> str:
        """A digest of all that determines the tokens of a raw image of given size and patches."""
        mapping = {"pixels_per_token": PIXELS_PER_TOKEN, "epsilon": LAPLACE_EPSILON}
        if any(side % PIXELS_PER_TOKEN for side in patch_size):
            mapping["pooling"] = "area"  # version 0.1 pooled overlapping windows here, which gave other tokens
        return digest_codebook(self.codebook, **mapping)

    def train(self, mode: bool = True) -> "ImageTokenizer":
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
        """
        Tokens (B, H / patch height * W / patch width) int64, row by row.

        Args:
            pixel_values: (B, 3, H, W), raw (uint8) or normalized (floats).
            patch_size: Height and width of a patch.
        """
        grid = [side // patch_side for side, patch_side in zip(pixel_values.shape[-2:], patch_size, strict=True)]
        with torch.autocast(pixel_values.device.type, enabled=False):
            if pixel_values.dtype == torch.uint8:
                pixels = pixel_values.float() / 255
            else:
                pixels = (pixel_values.float() * self.image_std + self.image_mean).clamp(0, 1)
            pixels = pool_by_area(pixels, *(PIXELS_PER_TOKEN * side for side in grid))
            pixels = (1 - 2 * LAPLACE_EPSILON) * pixels + LAPLACE_EPSILON
            return self.codebook.get_codebook_indices(pixels).flatten(1)


def pool_by_area(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Pixels (..., H, W) at a smaller size (..., height, width): means over equal areas, which do not overlap.

    A pixel that lies in two areas enters the mean of each with the share of it that lies there. torch's adaptive
    pooling, and its interpolation by "area", count it as a whole in both.
    """
    if pixels.shape[-2] % height == 0 and pixels.shape[-1] % width == 0:
        return F.adaptive_avg_pool2d(pixels, (height, width))
    for dim, side in ((-2, height), (-1, width)):
        # Each pixel in so many equal parts that every area has a whole number of them.
        parts = side // math.gcd(side, pixels.shape[dim])
        pixels = pixels.repeat_interleave(parts, dim).unflatten(dim, (side, -1)).mean(dim)
    return pixels


def _spread_codes(codebook: FlavaImageCodebook) -> None:
    """Make the random codebook use its whole vocabulary.

    With the library's initialization (standard deviation 0.02) features almost vanish in 25 convolutions. A few ids
    with the largest bias then win everywhere: 8 of 512 on photographs. So the convolutions keep the scale of their
    input (He et al., 2015). The codes are random directions in features that are whitened over smooth random images;
    the whitening is folded into the weights of the last convolution.
    """
    for module in codebook.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    side = 6 * PIXELS_PER_TOKEN
    images = F.interpolate(torch.rand(64, codebook.input_channels, 12, 12), size=side, mode="bilinear")
    features = F.relu(codebook.blocks[:-1](images))
    features = features.transpose(0, 1).flatten(1)
    variances, axes = torch.linalg.eigh(torch.cov(features))
    variances = variances.clamp(min=1e-3 * variances.max())  # directions that hardly vary are noise
    last = codebook.blocks.output.conv
    directions = F.normalize(torch.randn(last.out_channels, last.in_channels), dim=1)
    codes = directions @ (axes * variances.rsqrt()) @ axes.T
    with torch.no_grad():
        last.weight.copy_(codes[:, :, None, None])
        last.bias.copy_(-codes @ features.mean(dim=1))


def digest_codebook(codebook, **mapping) -> str:
    """A digest of a codebook's weights, equal on every device, and of the settings of the mapping of its pixels."""
    return digest_weights(codebook.state_dict(), **mapping)


def digest_weights(weights: dict[str, torch.Tensor], **settings) -> str:
    """A digest of named tensors, equal on every device, and of settings that JSON can express."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(weights.items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
