"""`KMeansImageTokenizer`: visual tokens without the dVAE, by k-means over a vision encoder's patch features.

Not in the paper, whose tokens are those of DALL-E's dVAE (`image_tokenizer.py`). The idea is that of HuBERT (Hsu et
al., 2021) and of BEiT v2 (Peng et al., 2022), whose codes come from an encoder that was trained before: they stand for
parts of objects rather than for colors. The encoder is frozen and not part of the trained model.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from ..configuration_cots import encoder_sides
from ..encoders_cots import accepts
from .image_tokenizer import digest_codebook

CENTERS_NAME, SETTINGS_NAME = "kmeans.safetensors", "kmeans.json"


class KMeansImageTokenizer(nn.Module):
    """
    Visual tokens of raw or normalized pixels: for each patch the number of the nearest center.

    Args:
        encoder (`PreTrainedModel`): A vision encoder of transformers; it is frozen.
        encoder_mean, encoder_std (`list[float]`): Normalization that it wants.
        centers: (K, H), in the space of its patch features.
        image_mean, image_std (`list[float]`): What the processor has subtracted from pixels, and divided them by.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        encoder_mean: list[float],
        encoder_std: list[float],
        centers: torch.Tensor,
        image_mean: list[float],
        image_std: list[float],
    ):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.register_buffer("centers", centers)
        for name, value in {
            "encoder_mean": encoder_mean,
            "encoder_std": encoder_std,
            "image_mean": image_mean,
            "image_std": image_std,
        }.items():
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1))

    @classmethod
    def from_encoder(
        cls,
        name_or_path: str,
        vocab_size: int,
        image_mean: list[float],
        image_std: list[float],
        revision: str = "main",
    ) -> "KMeansImageTokenizer":
        """With an encoder by Hub id or folder, and centers of zeros, which are to be fitted."""
        encoder = AutoModel.from_pretrained(name_or_path, revision=revision)
        settings = AutoImageProcessor.from_pretrained(name_or_path, revision=revision)
        centers = torch.zeros(vocab_size, encoder.config.hidden_size)
        return cls(encoder, settings.image_mean, settings.image_std, centers, image_mean, image_std)

    @classmethod
    def from_pretrained(cls, folder: str, image_mean: list[float], image_std: list[float]) -> "KMeansImageTokenizer":
        """What `save_pretrained` wrote."""
        settings = json.loads((Path(folder) / SETTINGS_NAME).read_text(encoding="utf-8"))
        centers = load_file(Path(folder) / CENTERS_NAME)["centers"]
        encoder = AutoModel.from_pretrained(folder)
        return cls(encoder, settings["encoder_mean"], settings["encoder_std"], centers, image_mean, image_std)

    def save_pretrained(self, folder: str) -> None:
        """Write the encoder as transformers does, the centers, and the normalization of pixels."""
        self.encoder.save_pretrained(folder)
        save_file({"centers": self.centers.cpu().contiguous()}, Path(folder) / CENTERS_NAME)
        settings = {name: getattr(self, name).flatten().tolist() for name in ("encoder_mean", "encoder_std")}
        (Path(folder) / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, K."""
        return len(self.centers)

    def fingerprint(self, patch_size: tuple[int, int]) -> str:
        """A digest of all that determines the tokens of a raw image of given size and patches."""
        mapping = {name: getattr(self, name).flatten().tolist() for name in ("encoder_mean", "encoder_std")}
        return digest_codebook(self.encoder, **mapping, centers=self.centers.cpu().tolist())

    def train(self, mode: bool = True) -> "KMeansImageTokenizer":
        return super().train(False)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
        """
        The encoder's features of the patches (B, H / patch height * W / patch width, features), unit length.

        Args:
            pixel_values: (B, 3, H, W), raw (uint8) or normalized (floats).
            patch_size: Height and width of a patch of the model. Images are resized so that the encoder sees as many.
        """
        grid = [side // patch_side for side, patch_side in zip(pixel_values.shape[-2:], patch_size, strict=True)]
        if pixel_values.dtype == torch.uint8:
            pixels = pixel_values.float() / 255
        else:
            pixels = (pixel_values.float() * self.image_std + self.image_mean).clamp(0, 1)
        own = encoder_sides(self.encoder.config, "patch_size")
        size = [count * side for count, side in zip(grid, own, strict=True)]
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.encoder_mean) / self.encoder_std
        kwargs = {}
        if accepts(self.encoder.forward, "interpolate_pos_encoding"):
            kwargs["interpolate_pos_encoding"] = True
        with torch.autocast(pixels.device.type, enabled=False):
            hidden = self.encoder(pixels.to(self.encoder.dtype), **kwargs).last_hidden_state.float()
        # [CLS] and, in some encoders, distillation or register tokens come first: the patches are the last ones.
        return F.normalize(hidden[:, hidden.shape[1] - grid[0] * grid[1] :], dim=-1)

    def forward(self, pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, H / patch height * W / patch width) int64, row by row; arguments as of `features`."""
        features = self.features(pixel_values, patch_size)
        distances = self.centers.square().sum(dim=1) - 2 * features @ self.centers.t()
        return distances.argmin(dim=-1)
