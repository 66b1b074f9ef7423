"""Image tokens that were computed once and stand beside the images: what they are of, and whether they fit a run.

A data set of `examples/tokenize_images.py` has two more columns: `image_tokens`, a row of uint16 ids for the image
and, if asked for, one for the flipped image; and `image_tokens_source`, which says what they were computed with.
Tokens belong to one view of an image, so that they are of use only where training sees that view: no crop.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .image_reading import UnreadableImageError
from .rows import IMAGE_TOKENS, TOKEN_SOURCE

MAX_VOCAB_SIZE = 2**16
VIEW = "bicubic resize of the whole picture"  # stands in data sets that were written before


@dataclass(frozen=True)
class TokenSource:
    """
    What cached tokens were computed with.

    Args:
        vocab_size: Number of different tokens.
        image_size: Height and width that images were resized to.
        patch_size: Height and width of the patch that a token stands for.
        codebook: Digest of the dVAE's weights and of how pixels are mapped for it. The processor's mean and standard
            deviation are no part of it: the dVAE sees the raw image.
        view: What of an image was tokenized.
    """

    vocab_size: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    codebook: str
    view: str = VIEW

    @classmethod
    def of(cls, image_tokenizer, image_size, patch_size) -> "TokenSource":
        """Of an [`ImageTokenizer`]. Raises `ValueError` for a vocabulary beyond uint16."""
        if image_tokenizer.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"The image tokenizer has {image_tokenizer.vocab_size:,} tokens; uint16, in which they are kept, has "
                f"room for {MAX_VOCAB_SIZE:,}."
            )
        return cls(image_tokenizer.vocab_size, tuple(image_size), tuple(patch_size), image_tokenizer.fingerprint())

    @classmethod
    def from_json(cls, text: str) -> "TokenSource":
        """Raises `ValueError` for anything that `to_json` does not write."""
        try:
            fields = json.loads(text)
            sizes = {name: tuple(fields[name]) for name in ("image_size", "patch_size")}
            return cls(**{**fields, **sizes})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{text!r} in the column {TOKEN_SOURCE} does not say where image tokens are of."
            ) from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def num_patches(self) -> int:
        rows, columns = (side // patch for side, patch in zip(self.image_size, self.patch_size, strict=True))
        return rows * columns

    def differences(self, other: "TokenSource") -> str:
        """What is not the same, in words; empty if nothing."""
        mine, theirs = asdict(self), asdict(other)
        return "; ".join(f"{name} {mine[name]} and not {theirs[name]}" for name in mine if mine[name] != theirs[name])

    def read(self, item: dict, is_flipped: bool) -> torch.Tensor:
        """
        The tokens (patches,) int64 of an item's image.

        Raises `ValueError` for tokens of another source than this, and [`UnreadableImageError`] for an item without.
        """
        if item[TOKEN_SOURCE] != self.to_json():
            difference = TokenSource.from_json(item[TOKEN_SOURCE]).differences(self)
            raise ValueError(
                f"The image tokens of {item['name']} are of another source than the first ones: {difference}."
            )
        if item[IMAGE_TOKENS] is None:
            raise UnreadableImageError("it could not be read when the image tokens were computed")
        rows = np.asarray(item[IMAGE_TOKENS])
        if rows.ndim != 2 or rows.shape[1] != self.num_patches or len(rows) <= int(is_flipped):
            raise ValueError(
                f"{item['name']} has image tokens of shape {rows.shape}; training needs {1 + int(is_flipped)} x "
                f"{self.num_patches}. Compute them anew with examples/tokenize_images.py."
            )
        return torch.from_numpy(rows[int(is_flipped)].astype(np.int64))
