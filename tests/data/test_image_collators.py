"""From items to batches: what a row depends on, tokens, augmentation, and images that cannot be read."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from collator_items import (
    MAX_TEXT_LENGTH,
    MEAN,
    PATCH,
    SIZE,
    WORDS,
    ambient_states,
    assert_equal,
    collator,
    draw_image,
    encode,
    grid_collator,
    item,
    row_of,
    seed_everything,
)
from PIL import Image
from torch.utils.data import DataLoader

from modeling_cots.data.image_augmentation import ImageTransform
from modeling_cots.data.image_collators import (
    COTSEvaluationCollator,
)
from modeling_cots.data.items import NAME_BYTES, decode_name
from modeling_cots.data.pixel_normalization import PixelNormalizer
from modeling_cots.data.scenes.still import ScenesDataset
from modeling_cots.data.skip_report import MAX_REPORTED_NAMES

# The batch


@pytest.mark.parametrize("mask_images", [True, False])
@pytest.mark.parametrize("mask_texts", [True, False])
def test_a_batch_has_the_agreed_format(tiny_processor, mask_images, mask_texts):
    captions = ["a red circle", "", "two green triangles beside one large yellow star"]
    items = [item(7 + i, [caption]) for i, caption in enumerate(captions)]
    batch = collator(tiny_processor, mask_images=mask_images, mask_texts=mask_texts)(items)
    length = batch["input_ids"].shape[1]
    expected = {
        "pixel_values": ((3, 3, SIZE, SIZE), torch.uint8),
        "pair_ids": ((3,), torch.int64),
        "caption_ids": ((3,), torch.int64),
        "valid": ((3,), torch.bool),
        "names": ((3, NAME_BYTES), torch.uint8),
        "input_ids": ((3, length), torch.int64),
        "attention_mask": ((3, length), torch.int64),
    }
    if mask_images:
        expected["bool_masked_pos"] = ((3, (SIZE // PATCH) ** 2), torch.bool)
    if mask_texts:
        expected["masked_input_ids"] = expected["text_targets"] = ((3, length), torch.int64)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == expected
    assert batch["pair_ids"].tolist() == [7, 8, 9]
    assert batch["valid"].all()
    assert [decode_name(name) for name in batch["names"]] == [each["name"] for each in items]


def test_captions_are_cut_and_padded_to_the_longest_of_the_batch(tiny_processor):
    tokenizer = tiny_processor.tokenizer
    for captions, length in [(["", "a e"], 4), (["", ""], 2), (["", "dog " * 500], MAX_TEXT_LENGTH)]:
        batch = collator(tiny_processor)([item(i, [caption]) for i, caption in enumerate(captions)])
        assert batch["input_ids"].shape == (2, length)
        assert batch["attention_mask"].sum(1).tolist() == [2, length]
        empty = [tokenizer.cls_token_id, tokenizer.sep_token_id]
        assert batch["input_ids"][0].tolist() == empty + [tokenizer.pad_token_id] * (length - 2)
        assert batch["input_ids"][1, -1] == tokenizer.sep_token_id


def test_each_caption_of_an_image_is_as_likely(tiny_tokenizer):
    captions, num_draws = ["a", "e", "o", "s", "t"], 1000  # letters, so single tokens
    batch = grid_collator(tiny_tokenizer, (2, 2), mask_images=False, mask_texts=False)(
        [item(0, captions, draw_image(0, 2, 2), seed=seed) for seed in range(num_draws)]
    )
    counts = Counter(batch["input_ids"][:, 1].tolist())
    assert counts.keys() == {tiny_tokenizer.convert_tokens_to_ids(caption) for caption in captions}
    assert all(abs(count - 200) < 4 * (num_draws * 0.2 * 0.8) ** 0.5 for count in counts.values())


# What a sample's row depends on


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-n2-mstd0.5"])
def test_a_row_depends_on_its_item_alone(tiny_processor, auto_augment):
    transform = ImageTransform((SIZE, SIZE), MEAN, horizontal_flip=0.5, auto_augment=auto_augment)
    collate = collator(tiny_processor, image_transform=transform)
    items = [item(i, ["a dog", "two green triangles", " ".join(WORDS)]) for i in range(5)]
    seed_everything(1)
    batch = collate(items)
    seed_everything(2)
    backwards = collate([item(5, ["dog " * 30], image={"bytes": b"", "path": None}), *items[::-1]])
    for i in range(5):
        assert_equal(row_of(batch, i), row_of(backwards, 5 - i))
        assert_equal(row_of(batch, i), row_of(collate([items[i]]), 0))


def test_another_seed_draws_everything_anew(tiny_processor):
    collate = collator(tiny_processor, text_mask_ratio=0.5)
    one, other = (row_of(collate([item(0, [" ".join(WORDS)], seed=seed)]), 0) for seed in (1, 2))
    for name in ("pixel_values", "bool_masked_pos", "text_targets"):
        assert not torch.equal(one[name], other[name])


def test_worker_processes_change_nothing(tiny_processor):
    def batches(num_workers: int, epoch: int) -> list[dict]:
        dataset = ScenesDataset("train", 12, SIZE)
        dataset.set_epoch(epoch)
        return list(DataLoader(dataset, 4, num_workers=num_workers, collate_fn=collator(tiny_processor)))

    alone, conditioned = batches(0, epoch=1), batches(2, epoch=1)
    assert len(alone) == len(conditioned) == 3
    for left, right in zip(alone, conditioned, strict=True):
        assert_equal(left, right)
    assert not torch.equal(alone[0]["pixel_values"], batches(0, epoch=2)[0]["pixel_values"])


def test_ambient_random_numbers_are_left_alone(tiny_processor):
    transform = ImageTransform((SIZE, SIZE), MEAN, horizontal_flip=0.5, auto_augment="rand-m9-n2-mstd0.5")
    before = ambient_states()
    collator(tiny_processor, image_transform=transform)([item(0), item(1, image={"bytes": b"", "path": None})])
    assert ambient_states() == before


def test_an_error_of_the_augmentation_is_not_taken_for_a_bad_image(tiny_processor):
    def broken_transform(image):
        random.random(), torch.rand(1)
        raise OSError("disk full")

    before = ambient_states()
    with pytest.raises(OSError, match="disk full"):
        collator(tiny_processor, image_transform=broken_transform)([item(0)])
    assert ambient_states() == before


def test_items_without_a_seed_draw_from_the_ambient_generators(tiny_processor):
    items = [item(i, [" ".join(WORDS)], seed=None) for i in range(3)]
    del items[1]["seed"]
    collate = collator(tiny_processor)
    seed_everything(0)
    first, second = collate(items), collate(items)
    seed_everything(0)
    assert_equal(first, collate(items))
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["text_targets"], second["text_targets"])


# Images in the wild


def test_images_of_every_mode_and_shape_are_trained_through(tiny_processor):
    colors = draw_image(0)
    images = [
        *(encode(colors.convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA")),
        *(encode(colors.convert("CMYK"), format) for format in ("JPEG", "TIFF")),
        encode(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)),
        *(encode(draw_image(0, *shape)) for shape in ((1, 1), (1, 400), (400, 1))),
    ]
    items = [item(i, image={"bytes": data, "path": None}) for i, data in enumerate(images)]
    for batch in (collator(tiny_processor)(items), evaluation_collator(tiny_processor)(items)):
        assert batch["valid"].all()
        assert batch["pixel_values"].shape == (len(images), 3, SIZE, SIZE)
        assert batch["pixel_values"].dtype == torch.uint8


def evaluation_collator(processor) -> COTSEvaluationCollator:
    return COTSEvaluationCollator(processor, max_text_length=MAX_TEXT_LENGTH)


@pytest.fixture
def warnings_logged(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr("modeling_cots.data.skip_report.logger.warning", messages.append)
    return messages


@pytest.mark.parametrize("build", [collator, evaluation_collator])
def test_unreadable_images_keep_their_row_and_are_named_once(tiny_processor, warnings_logged, build):
    damaged = {"bytes": encode(draw_image(1), "JPEG")[:400], "path": None}
    missing = {"bytes": None, "path": "no/such/file.jpg"}
    items = [item(0), item(1, image=damaged), item(2), item(3, image=missing)]
    collate = build(tiny_processor)
    batch = collate(items)
    assert batch["valid"].tolist() == [True, False, True, False]
    assert batch["pair_ids"].tolist() == [0, 1, 2, 3]
    assert torch.equal(batch["pixel_values"][::2], build(tiny_processor)(items[::2])["pixel_values"])
    assert batch["pixel_values"].shape == (4, 3, SIZE, SIZE)
    collate(items)
    assert [message.split(",")[0] for message in warnings_logged] == [f"Skipped the image {i}.png" for i in (1, 3)]
    assert "FileNotFoundError" in warnings_logged[1]


def test_rows_without_an_image_are_blank(tiny_processor, warnings_logged):
    batch = collator(tiny_processor)([item(0, image={"bytes": b"", "path": None})])
    assert not batch["valid"].any()
    assert torch.equal(batch["pixel_values"], torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8))


def test_no_more_than_a_hundred_names_are_logged(tiny_tokenizer, warnings_logged):
    collate = grid_collator(tiny_tokenizer, (2, 2))
    items = [item(i, image={"bytes": b"", "path": None}) for i in range(MAX_REPORTED_NAMES + 20)]
    assert not collate(items)["valid"].any()
    assert len(warnings_logged) == MAX_REPORTED_NAMES + 1
    assert warnings_logged[-1] == "Further images that cannot be read are counted, but no longer named."


# Evaluation


def test_evaluation_takes_the_image_as_the_processor_prepares_it_and_all_captions(tiny_processor):
    captions = [["a dog", ""], ["two green triangles"], ["dog " * 500, "a", "the beach"]]
    items = [item(10 + i, texts) for i, texts in enumerate(captions)]
    before = ambient_states()
    batch = evaluation_collator(tiny_processor)(items)
    assert ambient_states() == before
    prepared = tiny_processor.image_processor([draw_image(10 + i) for i in range(3)], return_tensors="pt")
    torch.testing.assert_close(
        PixelNormalizer(tiny_processor)(batch)["pixel_values"], prepared["pixel_values"], rtol=0, atol=1e-6
    )
    assert batch["pair_ids"].tolist() == [10, 11, 12]
    assert batch["caption_pair_ids"].tolist() == [10, 10, 11, 12, 12, 12]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (6, MAX_TEXT_LENGTH)
    texts = [text for each in captions for text in each]
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        alone = tiny_processor.tokenizer(text, truncation=True, max_length=MAX_TEXT_LENGTH)["input_ids"]
        assert ids[mask.bool()].tolist() == alone
