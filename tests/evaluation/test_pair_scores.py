"""Scores of pairs against a slow twin, the momentum copy of a real checkpoint, and the parquet file."""

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import Dataset

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.evaluation.embedding import embed_pairs
from modeling_cots.evaluation.pair_scores import load_scoring_model, score_pairs, write_scores
from modeling_cots.method.filtering import mixture_threshold


class WithABadImage(Dataset):
    """Ten scenes, one of which is no image."""

    def __init__(self):
        self.scenes = ScenesDataset("train", 10, 32)

    def __len__(self):
        return 10

    def __getitem__(self, index):
        item = self.scenes[index]
        item["captions"] = item["captions"][: 1 + index % 3]
        if index == 4:
            item["image"] = {"bytes": b"no image", "path": None}
        return item


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


def test_scores_equal_those_of_one_pair_at_a_time(model, tiny_processor, tmp_path):
    dataset = WithABadImage()
    pairs = score_pairs(model, dataset, tiny_processor, Accelerator(), batch_size=4, max_text_length=24, num_std=1.0)
    expected = []
    for index in range(10):
        item = dataset[index]
        if index == 4:
            continue
        for number, caption in enumerate(item["captions"]):
            inputs = tiny_processor(
                images=item["image"], text=caption, truncation=True, max_length=24, return_tensors="pt"
            )
            with torch.no_grad():
                output = model(**inputs)
            expected.append((index, number, caption, (output.image_embeds @ output.text_embeds.T).item()))
    assert pairs.num_skipped_images == 1
    assert pairs.pair_ids.tolist() == [pair_id for pair_id, _, _, _ in expected]
    assert pairs.caption_numbers.tolist() == [number for _, number, _, _ in expected]
    scores = torch.tensor([score for _, _, _, score in expected])
    torch.testing.assert_close(pairs.scores, scores, rtol=1e-4, atol=1e-6)
    assert pairs.threshold == pytest.approx((scores.mean() - scores.std(correction=0)).item(), abs=1e-5)
    assert torch.equal(pairs.keep, pairs.scores >= pairs.threshold)
    assert 0 < (~pairs.keep).sum() < len(scores)

    path = tmp_path / "scores.parquet"
    write_scores(str(path), dataset, pairs, {"model": "tiny"})
    table = pq.read_table(path)
    assert table.column_names == ["pair_id", "image", "caption_number", "caption", "score", "kept"]
    assert table["score"].to_pylist() == sorted(table["score"].to_pylist())
    rows = {(row["pair_id"], row["caption_number"]): row for row in table.to_pylist()}
    for pair_id, number, caption, score in expected:
        row = rows[pair_id, number]
        assert row["caption"] == caption and row["image"] == f"train-{pair_id:05d}"
        assert row["score"] == pytest.approx(score, abs=1e-5)
        assert row["kept"] == (row["score"] >= float(table.schema.metadata[b"threshold"]))
    assert table.schema.metadata[b"model"] == b"tiny"


def test_a_checkpoint_is_scored_by_its_momentum_copy(make_trainer, tmp_path):
    trainer = make_trainer(
        save_strategy="steps", save_steps=3, momentum=0.5, learning_rate=0.1, batch_candidates=False
    )
    trainer.train()
    loaded, which = load_scoring_model(str(tmp_path / "run" / "checkpoint-3"))
    assert "momentum copy" in which and not loaded.training
    slow = trainer.momentum_state.encoder.model
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixel_values), slow.encode_image(pixel_values))
        online = trainer.model.cots.eval().encode_image(pixel_values)
    assert not torch.allclose(online, loaded.encode_image(pixel_values).detach(), atol=1e-3)

    trainer.export_model(str(tmp_path / "export"))
    exported, which = load_scoring_model(str(tmp_path / "export"))
    assert "no momentum copy" in which
    with torch.no_grad():
        torch.testing.assert_close(exported.encode_image(pixel_values), online)


def test_refuses_a_momentum_copy_of_another_model(make_trainer, tmp_path, tiny_config):
    trainer = make_trainer(save_strategy="steps", save_steps=3)
    trainer.train()
    tiny_config.projection_dim = 8
    tiny_config.save_pretrained(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(ValueError, match="does not fit the configuration"):
        load_scoring_model(str(tmp_path / "run" / "checkpoint-3"))


def test_unreadable_data_is_an_error(model, tiny_processor):
    dataset = [{**WithABadImage()[4], "image": Image.Image}]
    with pytest.raises(ValueError, match="None of the 1 images"):
        score_pairs(model, dataset, tiny_processor, Accelerator(), max_text_length=24)


def test_the_mixture_is_that_of_the_scores_with_other_images(model, tiny_processor):
    dataset = WithABadImage()
    settings = {"batch_size": 4, "max_text_length": 24}
    pairs = score_pairs(model, dataset, tiny_processor, Accelerator(), num_std=None, **settings)
    embeds = embed_pairs(model, dataset, tiny_processor, Accelerator(), **settings)
    images = dict(zip(embeds.image_ids.tolist(), embeds.image_embeds, strict=True))
    following = dict(zip(images, [*list(images)[1:], next(iter(images))], strict=True))
    texts = zip(embeds.text_ids.tolist(), embeds.text_embeds, strict=True)
    others = torch.stack([text @ images[following[image_id]] for image_id, text in texts])
    assert pairs.threshold == pytest.approx(mixture_threshold(pairs.scores, others).item(), abs=1e-5)
