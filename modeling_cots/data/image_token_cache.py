"""Cached image tokens: which image tokenizer and which image size made them, and whether training can use them.

A data set of `examples/tokenize_images.py` has two more columns. `image_tokens` holds uint16 ids, one row for the
image and, if asked for, one for the flipped image. `image_tokens_source` is a [`TokenSource`]. The tokens are those of
the whole image: training that crops images cannot use them.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..image_reading_cots import UnreadableImageError
from .rows import IMAGE_TOKENS, TOKEN_SOURCE

MAX_VOCAB_SIZE = 2**16
VIEW = "bicubic resize of the whole picture"  # a file format: data sets that were written earlier hold this value


@dataclass(frozen=True)
class TokenSource:
    """
    The image tokenizer and the sizes that cached tokens were computed with.

    Args:
        vocab_size: Number of different tokens.
        image_size: Height and width that images were resized to.
        patch_size: Height and width of the patch that a token stands for.
        codebook: Digest of the dVAE's weights and of how pixels are mapped for it. The processor's mean and standard
            deviation do not enter it, as the dVAE sees the raw image.
        view: Which part of an image was tokenized, and how it was resized.
    """

    vocab_size: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    codebook: str
    view: str = VIEW

    @classmethod
    def of(cls, image_tokenizer, image_size, patch_size) -> "TokenSource":
        """Describe the tokens of an [`ImageTokenizer`]. Raises `ValueError` for a vocabulary beyond uint16."""
        if image_tokenizer.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"The image tokenizer has {image_tokenizer.vocab_size:,} tokens; uint16, in which they are kept, has "
                f"room for {MAX_VOCAB_SIZE:,}."
            )
        codebook = image_tokenizer.fingerprint(patch_size)
        return cls(image_tokenizer.vocab_size, tuple(image_size), tuple(patch_size), codebook)

    @classmethod
    def from_json(cls, text: str) -> "TokenSource":
        """The source in a cell of `image_tokens_source`. Raises `ValueError` for what `to_json` does not write."""
        try:
            fields = json.loads(text)
            sizes = {name: tuple(fields[name]) for name in ("image_size", "patch_size")}
            return cls(**{**fields, **sizes})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{text!r} in the column {TOKEN_SOURCE} does not describe a source of image tokens."
            ) from error

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def num_patches(self) -> int:
        rows, columns = (side // patch for side, patch in zip(self.image_size, self.patch_size, strict=True))
        return rows * columns

    def differences(self, other: "TokenSource") -> str:
        """The fields that differ, with both values; empty if none does."""
        mine, others = asdict(self), asdict(other)
        return "; ".join(f"{name} {mine[name]} and not {others[name]}" for name in mine if mine[name] != others[name])

    def check(self, config, args, image_tokenizer, num_flips: int | None) -> None:
        """
        Raise `ValueError` where training could not use these tokens.

        Args:
            config: The model's configuration, with `image_size`, `patch_size` and `image_vocab_size`.
            args: The training arguments. No crop and no policy may change images, as the tokens are of whole ones.
            image_tokenizer: Must be the one that made the tokens. With `None` that is not checked.
            num_flips: Rows of tokens that an item has: 1, or 2 with those of the flipped image. `None` if unknown.
        """
        for name, needed in (("min_crop_scale", 1.0), ("auto_augment", None)):
            value = getattr(args, name)
            if value != needed:
                raise ValueError(
                    f"The image tokens of the data set are of whole images, and {name}={value} shows others to the "
                    f"model: set {name} to {needed} to train on the cached tokens, or train on the data set that they "
                    f"were computed from, without the column {IMAGE_TOKENS}."
                )
        if args.horizontal_flip > 0 and num_flips is not None and num_flips < 2:
            raise ValueError(
                f"horizontal_flip={args.horizontal_flip} flips images, and the data set has no image tokens of "
                "flipped ones: compute them with `examples/tokenize_images.py --mirrored`, or set horizontal_flip "
                "to 0."
            )
        if image_tokenizer is not None:
            wanted = TokenSource.of(image_tokenizer, config.image_size, config.patch_size)
        else:
            wanted = TokenSource(config.image_vocab_size, config.image_size, config.patch_size, self.codebook)
        if difference := self.differences(wanted):
            raise ValueError(
                f"The cached image tokens do not fit this run: {difference}. Compute them anew with "
                f"examples/tokenize_images.py, or train on the data set without the column {IMAGE_TOKENS}."
            )

    def read(self, item: dict, is_flipped: bool) -> torch.Tensor:
        """
        The tokens (patches,) int64 of an item's image.

        Raises `ValueError` for tokens that were computed in another way, and [`UnreadableImageError`] for an item
        without any.
        """
        if item[TOKEN_SOURCE] != self.to_json():
            difference = TokenSource.from_json(item[TOKEN_SOURCE]).differences(self)
            raise ValueError(
                f"The image tokens of {item['name']} were computed in another way than the first ones: {difference}."
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
