"""Turns images and captions into batches: decodes, augments, chooses a caption, tokenizes and masks (COTS, MVLM).

An image that cannot be read keeps its row in the batch, with `valid` False, so that all processes keep equal shapes.
The trainer leaves such rows out of losses, queues and metrics.
"""

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling
from transformers.models.flava.image_processing_flava import FlavaMaskingGenerator
from transformers.utils import logging

from ..image_reading_cots import UnreadableImageError, read_pixels
from ..processing_cots import TOKENIZER_LOCK
from .feature_cache import FeatureSource
from .image_augmentation import AS_TENSORS, resize_for
from .image_token_cache import TokenSource
from .items import SampleRandomness, caption_ids, encode_names
from .skip_report import SkipReport

logger = logging.get_logger(__name__)

# BEiT masks blocks of at least 16 patches on a grid of 14 x 14; smaller grids get proportionally smaller blocks.
BEIT_MIN_BLOCK, BEIT_NUM_PATCHES = 16, 196
# A processor's call that leaves pixels bytes: they are normalized on the device.
RAW_PIXELS = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}


class COTSDataCollator:
    """
    Turns B items of a data set into one training batch.

    Args:
        processor: Has an `image_processor` with a `size` of height and width, and a `tokenizer`.
        image_transform: An image as `read_image` takes it -> raw pixels (3, H, W) uint8, see [`ImageTransform`].
        patch_size: Height and width of a patch, for the masks.
        max_text_length: Longer captions are cut to so many tokens.
        image_mask_ratio: Share of patches that CMVM masks, block-wise as in BEiT.
        text_mask_ratio: Share of tokens that CMLM masks, by BERT's 80/10/10 rule.
        mask_images, mask_texts: Whether to draw masks at all.
        token_source: Describes the cached image tokens of the items, if they are to be used. `image_transform` must
            then be an [`ImageTransform`] without crop and policy.
        features: Describe the cached features of the items that are to be used, by kind ("image", "text"). They take
            the place of pixels, for which the same holds, and of token ids.

    Returns a dict of tensors:
        pixel_values (B, 3, H, W) uint8, which [`PixelNormalizer`] normalizes on the device;
        input_ids, attention_mask (B, L); pair_ids, caption_ids (B,) int64; valid (B,) bool;
        names (B, 120) uint8, see `encode_names`;
        with cached features image_features (B, H) and text_features (B, H) float32 in the place of either;
        with `mask_images` bool_masked_pos (B, patches) bool;
        with `token_source` image_tokens (B, patches) int64;
        with `mask_texts` masked_input_ids (B, L) and text_targets (B, L), -100 where nothing is predicted.
    """

    def __init__(
        self,
        processor,
        *,
        image_transform: Callable[[object], torch.Tensor],
        patch_size: tuple[int, int],
        max_text_length: int,
        image_mask_ratio: float = 0.4,
        text_mask_ratio: float = 0.15,
        mask_images: bool = True,
        mask_texts: bool = True,
        token_source: TokenSource | None = None,
        features: Mapping[str, FeatureSource] = MappingProxyType({}),
    ):
        self.tokenizer = processor.tokenizer
        self.image_transform = image_transform
        self.patch_size = patch_size
        self.max_text_length = max_text_length
        self.image_mask_ratio = image_mask_ratio
        self.mask_images = mask_images
        self.token_source = token_source
        self.features = dict(features)
        self.word_masker = None
        if mask_texts:
            self.word_masker = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=text_mask_ratio)
        self.image_size = (processor.image_processor.size["height"], processor.image_processor.size["width"])
        self.report = SkipReport()

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        images, image_tokens, captions, text_features, bool_masked_pos = [], [], [], [], []
        with SampleRandomness() as seed_for:
            for item in items:
                seed_for(item.get("seed"))
                number = random.choice(range(len(item["captions"])))
                captions.append(item["captions"][number])
                if "text" in self.features:
                    text_features.append(self.features["text"].read(item, number))
                image, tokens = self._load(item)
                images.append(image)
                image_tokens.append(tokens)
                if self.mask_images:
                    bool_masked_pos.append(self._mask_patches())
        batch = {
            "image_features" if "image" in self.features else "pixel_values": self._stack(images),
            "pair_ids": torch.tensor([item["pair_id"] for item in items]),
            "caption_ids": caption_ids(captions),
            "valid": torch.tensor([image is not None for image in images]),
            "names": encode_names([item["name"] for item in items]),
        }
        if text_features:
            batch["text_features"] = torch.stack(text_features)
        else:
            tokens = tokenize(self.tokenizer, captions, self.max_text_length)
            batch.update(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        if self.mask_images:
            batch["bool_masked_pos"] = torch.stack(bool_masked_pos)
        if self.token_source is not None:
            nothing = torch.zeros(self.token_source.num_patches, dtype=torch.int64)
            batch["image_tokens"] = torch.stack([nothing if tokens is None else tokens for tokens in image_tokens])
        if self.word_masker is not None:
            batch.update(self._mask_words(tokens, [item.get("seed") for item in items]))  # type: ignore[arg-type]
        return batch

    def _load(self, item: dict) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The pixels or features and the cached tokens of an item; twice `None` for an image that cannot be read."""
        try:
            if "image" in self.features:
                is_flipped = self.image_transform.draw_flip()  # type: ignore[attr-defined]
                return self.features["image"].read(item, int(is_flipped)), None
            if self.token_source is None:
                return self.image_transform(item["image"]), None
            pixels, is_flipped = self.image_transform.draw(item["image"])  # type: ignore[attr-defined]
            return pixels, self.token_source.read(item, is_flipped)
        except UnreadableImageError as error:
            self.report.add(item["name"], error)
            return None, None

    def _stack(self, images: list[torch.Tensor | None]) -> torch.Tensor:
        """One tensor; zeros stand for images that cannot be read."""
        if "image" in self.features:
            blank = torch.zeros(self.features["image"].size)
            return torch.stack([blank if image is None else image for image in images])
        blank = torch.zeros(3, *self.image_size, dtype=torch.uint8)
        filled = [blank if image is None else image for image in images]
        # In the order of memory that images have, (H, W, 3): the device transposes them sooner.
        return torch.stack([image.permute(1, 2, 0) for image in filled]).permute(0, 3, 1, 2)

    def _mask_patches(self) -> torch.Tensor:
        """(patches,) bool, row by row: blocks that together cover the mask ratio, or a few patches less.

        A block is smaller than the grid. Where the grid is too small or too narrow for one, single patches are masked.
        """
        grid = tuple(side // patch_side for side, patch_side in zip(self.image_size, self.patch_size, strict=True))
        num_patches = grid[0] * grid[1]
        num_masked = round(self.image_mask_ratio * num_patches)
        generator = FlavaMaskingGenerator(
            grid,
            total_mask_patches=num_masked,
            mask_group_min_patches=max(1, round(min(1, num_patches / BEIT_NUM_PATCHES) * BEIT_MIN_BLOCK)),
        )
        mask = generator().bool().flatten()
        if not mask.any():
            mask[random.sample(range(num_patches), num_masked)] = True
        return mask

    def _mask_words(self, tokens: dict, seeds: list[int | None]) -> dict[str, torch.Tensor]:
        """BERT's corruption of each caption. It is drawn for its own tokens only, so that padding shifts no draw."""
        masked_input_ids = tokens["input_ids"].clone()
        text_targets = torch.full_like(masked_input_ids, -100)
        real = tokens["attention_mask"].bool()
        with SampleRandomness() as seed_for:
            for row, seed in enumerate(seeds):
                seed_for(seed)
                masked, targets = self._mask_caption(
                    masked_input_ids[row, real[row]], tokens["special_tokens_mask"][row, real[row]]
                )
                masked_input_ids[row, real[row]] = masked
                text_targets[row, real[row]] = targets
        return {"masked_input_ids": masked_input_ids, "text_targets": text_targets}

    def _mask_caption(self, input_ids: torch.Tensor, is_special: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Corrupted ids and targets, both (L,), of one caption; like BERT, at least one of its words is masked."""
        masked, targets = self.word_masker.torch_mask_tokens(
            input_ids.clone().unsqueeze(0), is_special.clone().unsqueeze(0)
        )
        masked, targets = masked[0], targets[0]
        words = (is_special == 0).nonzero().flatten().tolist()
        if words and (targets == -100).all():
            chosen = random.choice(words)
            masked[chosen], targets[chosen] = self.tokenizer.mask_token_id, input_ids[chosen]
        return masked, targets


class COTSEvaluationCollator:
    """
    Turns B items of a data set into one batch for embedding: images as the processor prepares them, and all captions.

    Args:
        processor: Has an `image_processor` and a `tokenizer`.
        max_text_length: Longer captions are cut to so many tokens.
        features: As in [`COTSDataCollator`].

    Returns a dict of tensors: pixel_values (B, 3, H, W) uint8, which [`PixelNormalizer`] normalizes on the device;
    pair_ids (B,); valid (B,) bool; and for the C captions of the B images input_ids, attention_mask (C, L) and
    caption_pair_ids (C,). With cached features image_features (B, H) and text_features (C, H) in the place of either.
    """

    def __init__(
        self, processor, *, max_text_length: int, features: Mapping[str, FeatureSource] = MappingProxyType({})
    ):
        self.image_processor, self.tokenizer = processor.image_processor, processor.tokenizer
        self.max_text_length = max_text_length
        self.features = dict(features)
        self.report = SkipReport()

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        images: list = []  # or features
        valid = []
        for item in items:
            try:
                images.append(self._read(item))
                valid.append(True)
            except UnreadableImageError as error:
                self.report.add(item["name"], error)
                images.append(self._blank())
                valid.append(False)
        batch = {"valid": torch.tensor(valid)}
        if "image" in self.features:
            batch["image_features"] = torch.stack(images)
        else:
            batch["pixel_values"] = self.image_processor(images, **AS_TENSORS, **RAW_PIXELS)["pixel_values"]
            assert batch["pixel_values"].dtype == torch.uint8, batch["pixel_values"].dtype
        if "text" not in self.features:
            return {**batch, **caption_batch(items, self.tokenizer, self.max_text_length)}
        rows = [self.features["text"].read_all(item) for item in items]
        return {**batch, **pair_ids_of(items), "text_features": torch.from_numpy(np.concatenate(rows))}

    def _read(self, item: dict) -> torch.Tensor:
        if "image" in self.features:
            return self.features["image"].read(item, 0)
        return resize_for(read_pixels(item["image"]), self.image_processor)

    def _blank(self) -> torch.Tensor:
        if "image" in self.features:
            return torch.zeros(self.features["image"].size)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)


def caption_batch(items: list[dict], tokenizer, max_text_length: int) -> dict[str, torch.Tensor]:
    """All C captions of B items: input_ids, attention_mask (C, L), caption_pair_ids (C,); and pair_ids (B,)."""
    captions = [caption for item in items for caption in item["captions"]]
    tokens = tokenize(tokenizer, captions, max_text_length)
    return {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        **pair_ids_of(items),
    }


def pair_ids_of(items: list[dict]) -> dict[str, torch.Tensor]:
    """pair_ids (B,) of B items, and caption_pair_ids (C,) of all their captions."""
    return {
        "pair_ids": torch.tensor([item["pair_id"] for item in items]),
        "caption_pair_ids": torch.tensor([item["pair_id"] for item in items for _ in item["captions"]]),
    }


def tokenize(tokenizer, captions: list[str], max_text_length: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, special_tokens_mask of C captions: (C, L), padded to the longest of them."""
    # Half a surrogate pair, which JSON can escape, is no Unicode text: tokenizers fail at it.
    captions = [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]
    with TOKENIZER_LOCK:
        return tokenizer(
            captions,
            padding=True,
            truncation=True,
            max_length=max_text_length,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
