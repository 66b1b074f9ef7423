"""`TokenSource`: which cached image tokens a run may use, and how it refuses the others."""

import dataclasses

import numpy as np
import pytest
import torch

from modeling_cots import ImageTokenizer, ScenesDataset
from modeling_cots.data.image_token_cache import TokenSource
from modeling_cots.image_reading_cots import UnreadableImageError
from modeling_cots.method.image_tokenizer import digest_codebook
from modeling_cots.training.setup import choose_image_tokens

SOURCE = TokenSource(50, (32, 32), (8, 8), "abc")


def tokenizer(vocab_size: int = 50, seed: int = 0, mean: float = 0.5) -> ImageTokenizer:
    return ImageTokenizer.random(vocab_size, [mean] * 3, [0.5] * 3, seed=seed)


class WithTokens(ScenesDataset):
    """Scenes with tokens of a given source."""

    source = TokenSource.of(tokenizer(), (32, 32), (8, 8))
    num_versions = 1

    def __getitem__(self, index: int) -> dict:
        tokens = [[7] * 16] * self.num_versions
        return {**super().__getitem__(index), "image_tokens": tokens, "image_tokens_source": self.source.to_json()}


def with_tokens(num_versions: int = 1, **changes) -> WithTokens:
    dataset = WithTokens("train", 8, 32)
    dataset.source, dataset.num_versions = dataclasses.replace(dataset.source, **changes), num_versions
    return dataset


# The fingerprint


def test_equal_tokenizers_have_equal_sources_whatever_the_normalization():
    source = TokenSource.of(tokenizer(), (32, 32), (8, 8))
    assert source == TokenSource.of(tokenizer(mean=0.2), (32, 32), (8, 8))
    assert source == TokenSource.from_json(source.to_json())
    assert source.num_patches == 16


@pytest.mark.parametrize(
    "other",
    [
        lambda: TokenSource.of(tokenizer(seed=1), (32, 32), (8, 8)),
        lambda: TokenSource.of(tokenizer(51), (32, 32), (8, 8)),
        lambda: TokenSource.of(tokenizer(), (64, 32), (8, 8)),
        lambda: TokenSource.of(tokenizer(), (32, 32), (16, 8)),
    ],
)
def test_other_weights_or_sizes_are_another_source(other):
    source = TokenSource.of(tokenizer(), (32, 32), (8, 8))
    assert source != other()
    assert source.differences(other())


def test_the_digest_sees_every_weight_and_the_mapping():
    module = torch.nn.Linear(3, 2)
    before = digest_codebook(module, epsilon=0.1)
    assert before == digest_codebook(module, epsilon=0.1) != digest_codebook(module, epsilon=0.2)
    with torch.no_grad():
        module.bias[1] += 1e-6
    assert digest_codebook(module, epsilon=0.1) != before


def test_more_tokens_than_uint16_has_room_for_are_refused():
    large = tokenizer()
    large.codebook.config.vocab_size = 65_537
    with pytest.raises(ValueError, match="65,537 tokens"):
        TokenSource.of(large, (32, 32), (8, 8))
    large.codebook.config.vocab_size = 65_536
    assert TokenSource.of(large, (32, 32), (8, 8)).vocab_size == 65_536


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"image_size": 3, "patch_size": [1, 1]}', SOURCE.to_json()[:-1]])
def test_a_source_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError, match="image_tokens_source"):
        TokenSource.from_json(text)


# Reading


def item(tokens, source: TokenSource = SOURCE) -> dict:
    return {"name": "a.jpg", "image_tokens": tokens, "image_tokens_source": source.to_json()}


def test_the_row_of_the_plain_or_the_flipped_image_is_read():
    tokens = np.stack([np.arange(16), np.arange(16) + 65_000]).astype(np.uint16)
    for rows in (tokens, tokens.tolist()):
        plain, flipped = (SOURCE.read(item(rows), is_flipped) for is_flipped in (False, True))
        assert plain.dtype == flipped.dtype == torch.int64
        assert plain.tolist() == list(range(16)) and flipped.tolist() == list(range(65_000, 65_016))


def test_tokens_of_another_source_further_on_are_refused():
    with pytest.raises(ValueError, match="a.jpg.*codebook xyz and not abc"):
        SOURCE.read(item([[0] * 16], dataclasses.replace(SOURCE, codebook="xyz")), False)


@pytest.mark.parametrize(("tokens", "is_flipped"), [([[0] * 15], False), ([[0] * 16], True), ([0] * 16, False)])
def test_tokens_of_a_wrong_shape_are_refused(tokens, is_flipped):
    with pytest.raises(ValueError, match="a.jpg has image tokens of shape"):
        SOURCE.read(item(tokens), is_flipped)


def test_an_image_without_tokens_is_skipped_as_unreadable():
    with pytest.raises(UnreadableImageError):
        SOURCE.read(item(None), False)


# Before training


def test_fitting_tokens_replace_the_tokenizer(make_trainer):
    for image_tokenizer in ("random", None):
        trainer = make_trainer(train_dataset=with_tokens(), min_crop_scale=1.0, image_tokenizer=image_tokenizer)
        assert trainer.image_tokenizer is None
        batch = trainer.data_collator([trainer.train_dataset[0]])
        assert batch["image_tokens"].tolist() == [[7] * 16]


@pytest.mark.parametrize("options", [{"min_crop_scale": 0.9}, {"min_crop_scale": 1.0, "auto_augment": "rand-m5-n2"}])
def test_tokens_of_whole_images_do_not_go_with_others(make_trainer, options):
    """The message names both ways out."""
    with pytest.raises(ValueError, match="set (min_crop_scale to 1.0|auto_augment to None).*without the column"):
        make_trainer(train_dataset=with_tokens(), **options)


def test_flipped_images_need_flipped_tokens(make_trainer):
    options = {"min_crop_scale": 1.0, "horizontal_flip": 0.5}
    with pytest.raises(ValueError, match="--mirrored.*set horizontal_flip to 0"):
        make_trainer(train_dataset=with_tokens(), **options)
    assert make_trainer(train_dataset=with_tokens(num_versions=2), **options).image_tokenizer is None


@pytest.mark.parametrize(
    ("changes", "image_tokenizer", "message"),
    [
        ({"codebook": "other"}, "random", "codebook other and not"),
        ({"image_size": (64, 64)}, "random", "image_size"),
        ({"patch_size": (16, 16)}, None, "patch_size"),
        ({"vocab_size": 40}, None, "vocab_size 40 and not 50"),
        ({"view": "a crop"}, None, "view"),
    ],
)
def test_tokens_that_do_not_fit_the_run_are_refused(make_trainer, changes, image_tokenizer, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(train_dataset=with_tokens(**changes), min_crop_scale=1.0, image_tokenizer=image_tokenizer)


def test_without_a_tokenizer_the_weights_cannot_be_compared(make_trainer):
    dataset = with_tokens(codebook="whose weights are elsewhere")
    assert make_trainer(train_dataset=dataset, min_crop_scale=1.0, image_tokenizer=None) is not None


def test_where_nothing_predicts_them_tokens_do_not_matter(make_trainer):
    trainer = make_trainer(train_dataset=with_tokens(codebook="other"), cmvm_weight=0.0, min_crop_scale=0.5)
    assert "image_tokens" not in trainer.data_collator([trainer.train_dataset[0]])


def test_with_neither_tokens_nor_tokenizer_there_is_nothing_to_predict(make_trainer):
    with pytest.raises(ValueError, match="needs an image_tokenizer"):
        make_trainer(image_tokenizer=None)


def test_a_custom_collator_gets_computed_tokens(make_trainer):
    trainer = make_trainer()
    chosen = choose_image_tokens(
        with_tokens(), trainer.model, trainer.args, trainer.image_tokenizer, has_own_collator=True
    )
    assert chosen == (None, trainer.image_tokenizer)
