"""Items and collators for the tests of batches."""

import io
import random
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from modeling_cots.data.image_augmentation import ImageTransform
from modeling_cots.data.image_collators import COTSDataCollator
from modeling_cots.image_reading_cots import read_image

SIZE, PATCH, MAX_TEXT_LENGTH = 32, 8, 24
MEAN = [0.5, 0.4, 0.3]
WORDS = "a red circle above small blue square two green triangles the white dog runs people walk unheard".split()
TEXT = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def draw_image(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    """Noise, so that no two crops are alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def item(number: int, captions=("a red circle",), image=None, **values) -> dict:
    image = {"bytes": encode(draw_image(number)), "path": None} if image is None else image
    return {
        "image": image,
        "captions": list(captions),
        "pair_id": number,
        "name": f"{number}.png",
        "seed": 1000 + number,
        **values,
    }


def collator(processor, **options) -> COTSDataCollator:
    transform = ImageTransform((SIZE, SIZE), MEAN)
    defaults = {"image_transform": transform, "patch_size": (PATCH, PATCH), "max_text_length": MAX_TEXT_LENGTH}
    return COTSDataCollator(processor, **{**defaults, **options})


def grid_collator(tokenizer, grid: tuple[int, int], **options) -> COTSDataCollator:
    """A collator that masks a grid of patches of 1 x 1 pixel."""
    size = {"height": grid[0], "width": grid[1]}
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=SimpleNamespace(size=size))

    def black(source) -> torch.Tensor:
        read_image(source)
        return torch.zeros(3, *grid, dtype=torch.uint8)

    return collator(processor, image_transform=black, patch_size=(1, 1), **options)


def row_of(batch: dict, index: int) -> dict[str, torch.Tensor]:
    """One sample of a batch, without the padding that longer neighbors caused."""
    length = int(batch["attention_mask"][index].sum())
    tokens = ("input_ids", "attention_mask", "masked_input_ids", "text_targets")
    return {name: value[index, :length] if name in tokens else value[index] for name, value in batch.items()}


def assert_equal(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def ambient_states() -> tuple:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
