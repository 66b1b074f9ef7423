"""Embedding a data set: every readable image and caption once, in order, whatever the batches."""

import pytest
import torch
from accelerate import Accelerator

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.evaluation import text_encoding
from modeling_cots.evaluation.embedding import PairEmbeddings, embed_pairs, find_examples, measure_retrieval


class WithBroken(ScenesDataset):
    """Validation scenes of which number 3 and 4 cannot be read."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "image": b"\xff\xd8 truncated"} if index in (3, 4) else item


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config)


def embed(model, dataset, processor, batch_size: int):
    return embed_pairs(
        model, dataset, processor, Accelerator(cpu=True), batch_size=batch_size, max_text_length=24, progress=False
    )


def test_equals_one_image_and_one_caption_at_a_time(model, tiny_processor):
    dataset = ScenesDataset("validation", 5, 32)
    embeds = embed(model, dataset, tiny_processor, batch_size=3)
    model.eval()
    assert embeds.image_ids.tolist() == [0, 1, 2, 3, 4]
    assert embeds.text_ids.tolist() == [i for i in range(5) for _ in range(5)]
    for i in range(5):
        item = dataset[i]
        inputs = tiny_processor(images=[item["image"]], return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(embeds.image_embeds[i], model.encode_image(**inputs)[0])
        for j, caption in enumerate(item["captions"]):
            tokens = tiny_processor(text=[caption], truncation=True, max_length=24, return_tensors="pt")
            with torch.no_grad():
                expected = model.encode_text(tokens["input_ids"], tokens["attention_mask"])[0]
            torch.testing.assert_close(embeds.text_embeds[5 * i + j], expected)


def test_unreadable_images_and_their_captions_are_left_out_and_counted(model, tiny_processor):
    dataset = WithBroken("validation", 8, 32)
    embeds = embed(model, dataset, tiny_processor, batch_size=2)  # batches with one, and with no readable image
    assert embeds.num_skipped_images == 2
    assert embeds.image_ids.tolist() == [0, 1, 2, 5, 6, 7]
    assert sorted(set(embeds.text_ids.tolist())) == [0, 1, 2, 5, 6, 7]
    whole = embed(model, dataset, tiny_processor, batch_size=8)
    torch.testing.assert_close(whole.image_embeds, embeds.image_embeds)
    metrics = measure_retrieval(embeds, protocol="flickr30k-1k")  # of which this is no whole test set
    assert metrics["skipped_images"] == 2


def test_no_readable_image_at_all_is_an_error(model, tiny_processor):
    class AllBroken(ScenesDataset):
        def __getitem__(self, index: int) -> dict:
            return {**super().__getitem__(index), "image": b""}

    with pytest.raises(ValueError, match="None of the 3 images"):
        embed(model, AllBroken("validation", 3, 32), tiny_processor, batch_size=2)


def test_examples_are_spread_over_the_data_set_and_find_the_nearest_first():
    """Seven images at their own angles, and texts at angles in between; number 30 was not readable."""
    ids = torch.tensor([0, 10, 20, 40, 50, 60, 70])

    def at(degrees) -> torch.Tensor:
        angles = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    # Of two captions of an image the first counts; that of 40 lies nearest to 50, then to 60, then to itself.
    text_ids = ids.repeat_interleave(2)
    texts = torch.stack([ids + torch.tensor([4, 1, 1, 14, 1, 1, -11]), ids + 90], dim=1).flatten()
    examples = find_examples(PairEmbeddings(at(ids), at(texts), ids, text_ids, num_skipped_images=1))
    assert (examples.num_images, examples.wanted) == (7, [0, 40, 70])
    assert examples.found == [[0, 10, 20], [50, 60, 40], [60, 50, 70]]
    few = find_examples(PairEmbeddings(at(ids[:2]), at(ids[:2]), ids[:2], ids[:2], num_skipped_images=0))
    assert (few.wanted, few.found) == ([0, 10], [[0, 10], [10, 0]])


def test_leaves_the_mode_and_the_random_numbers_as_they_were(model, tiny_processor):
    model.train()
    state = torch.get_rng_state()
    embed(model, ScenesDataset("validation", 4, 32), tiny_processor, batch_size=2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_captions_are_encoded_by_length_and_stay_with_their_image(model, tiny_processor, monkeypatch):
    """Captions of very different lengths, in batches of a few: the same embeddings as all in one padded batch."""

    class Uneven(ScenesDataset):
        def __getitem__(self, index: int) -> dict:
            item = super().__getitem__(index)
            return {**item, "captions": ["a", item["captions"][0], item["captions"][0] + " and a red star" * index]}

    dataset = Uneven("validation", 5, 32)
    monkeypatch.setattr(text_encoding, "TOKENS_AT_A_TIME_ON_CPU", 30)
    embeds = embed(model, dataset, tiny_processor, batch_size=2)
    assert embeds.text_ids.tolist() == [i for i in range(5) for _ in range(3)]
    captions = [caption for i in range(5) for caption in dataset[i]["captions"]]
    tokens = tiny_processor(text=captions, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval().encode_text(tokens["input_ids"], tokens["attention_mask"])
    torch.testing.assert_close(embeds.text_embeds, expected, atol=1e-5, rtol=0)
