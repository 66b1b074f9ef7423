"""Cached features: which encoder made them of what, and whether a run can use them.

Where an encoder is frozen whole and images are not cropped at random, its global feature of an image or a caption is
the same in every epoch. It is computed once (`feature_writing.py`) and becomes a column of the data: `image_features`,
one row for the image and, if asked for, one for the flipped image, and `text_features`, one row for each caption.
Beside each stands a [`FeatureSource`], in `image_features_source` and `text_features_source`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch

from ..image_reading_cots import UnreadableImageError
from ..method.image_tokenizer import digest_weights
from ..modeling_cots import COTSModel
from ..processing_cots import TOKENIZER_LOCK, forget_calls

KINDS = ("image", "text")
TRAINING, EVALUATION = "training", "evaluation"  # how images are resized: by our transform, or by the processor
# What of an encoder's configuration says nothing about its features.
WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_mask_token")


@dataclass(frozen=True)
class FeatureSource:
    """
    The encoder that cached features are of, and how its inputs were prepared.

    Args:
        kind: "image" or "text".
        size: H, the width of a feature.
        encoder: Digest of the encoder's weights and configuration.
        inputs: Digest of the normalization of images, or of the tokenizer.
        pooling: `image_pooling` of the model's configuration; `None` for texts.
        image_size: Height and width that images were resized to; `None` for texts.
        view: How they were resized, `TRAINING` or `EVALUATION`; `None` for texts.
        max_text_length: Tokens that captions were cut to; `None` for images.
        precision: "float32", or what the encoder's matrices were multiplied in.
    """

    kind: str
    size: int
    encoder: str
    inputs: str
    pooling: str | None = None
    image_size: tuple[int, int] | None = None
    view: str | None = None
    max_text_length: int | None = None
    precision: str = "float32"

    @classmethod
    def of_images(cls, model: COTSModel, processor, view: str) -> "FeatureSource":
        """Describe the image features of a model."""
        settings = processor.image_processor.to_dict()
        if view == TRAINING:  # which resizes in its own way
            settings = {name: settings.get(name) for name in ("image_mean", "image_std", "rescale_factor")}
        return cls(
            "image",
            model.config.image_feature_size,
            _digest_encoder(model.vision_model),
            _digest(settings),
            pooling=model.config.image_pooling,
            image_size=model.config.image_size,
            view=view,
        )

    @classmethod
    def of_texts(cls, model: COTSModel, processor, max_text_length: int) -> "FeatureSource":
        """Describe the text features of a model."""
        tokenizer = processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        forget_calls(tokenizer)
        with TOKENIZER_LOCK:
            inputs = _digest(tokenizer.get_vocab() if backend is None else backend.to_str())
        width = model.config.text_config.hidden_size
        return cls("text", width, _digest_encoder(model.text_model), inputs, max_text_length=max_text_length)

    @property
    def column(self) -> str:
        """The name of the column with the features; that of the source ends in `_source`."""
        return f"{self.kind}_features"

    @classmethod
    def of_item(cls, item: dict, kind: str) -> "FeatureSource | None":
        """The source of the features of a kind that an item has, if any."""
        text = item.get(f"{kind}_features_source")
        if text is None:
            return None
        fields = json.loads(text)
        size = fields["image_size"]
        return cls(**{**fields, "image_size": None if size is None else tuple(size)})

    @cached_property
    def _json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def to_json(self) -> str:
        """Written once: each item of each batch is compared with it."""
        return self._json

    def differences(self, other: "FeatureSource") -> str:
        """The fields that differ, with both values; empty if none does."""
        mine, others = asdict(self), asdict(other)
        return "; ".join(f"{name} {mine[name]} and not {others[name]}" for name in mine if mine[name] != others[name])

    def is_of(self, item: dict) -> bool:
        """Whether an item has features from this source."""
        return item.get(f"{self.column}_source") == self.to_json()

    def read(self, item: dict, row: int) -> torch.Tensor:
        """
        One row of an item's features: that of a caption, or of the image (0) or the flipped image (1).

        Raises `ValueError` for features from another source, and [`UnreadableImageError`] for an image that could not
        be read.
        """
        return torch.from_numpy(self.read_all(item)[row])

    def read_all(self, item: dict) -> np.ndarray:
        """All rows of an item's features; raises as `read` does."""
        if not self.is_of(item):
            found = FeatureSource.of_item(item, self.kind)
            difference = "none" if found is None else found.differences(self)
            raise ValueError(f"The {self.kind} features of {item['name']} are from another source: {difference}.")
        if item[self.column] is None:
            raise UnreadableImageError("it could not be read when the image features were computed")
        return item[self.column]


def _digest(content) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest_encoder(encoder) -> str:
    config = {name: value for name, value in encoder.config.to_dict().items() if name not in WITHOUT_EFFECT}
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if not name.endswith("mask_token")}
    return digest_weights(weights, config=_digest(config))


def check_usable(kind: str, args) -> None:
    """
    Raise `ValueError` where training cannot use cached features of a kind.

    Args:
        kind: "image" or "text".
        args: The training arguments.
    """
    encoder, loss = {"image": ("vision", "cmvm"), "text": ("text", "cmlm")}[kind]
    if getattr(args, f"freeze_{encoder}") != "all":
        raise ValueError(
            f"Cached {kind} features are those of an encoder that does not train, and freeze_{encoder} is "
            f"{getattr(args, f'freeze_{encoder}')}: set it to all, or train on the data without cached features."
        )
    weight = getattr(args, f"{loss}_weight")
    if weight > 0:
        raise ValueError(
            f"Cached {kind} features are one vector for each {kind}, and {loss}_weight={weight} "
            f"needs those of its tokens: set {loss}_weight to 0, or train without cached features."
        )
    if kind == "text":
        return
    for name, needed in (("min_crop_scale", 1.0), ("auto_augment", None)):
        if getattr(args, name) != needed:
            raise ValueError(
                f"Cached image features are of whole images, and {name}={getattr(args, name)} shows others to the "
                f"model: set {name} to {needed}, or train without cached features."
            )


def check_flips(source: FeatureSource, item: dict, horizontal_flip: float) -> None:
    """Raise `ValueError` where images are flipped and their features are only of unflipped ones."""
    features = item[source.column]
    if horizontal_flip > 0 and features is not None and len(features) < 2:
        raise ValueError(
            f"horizontal_flip={horizontal_flip} flips images, and the data set has no features of flipped ones: cache "
            "them with flipped=True, or set horizontal_flip to 0."
        )
