"""Writing features and reading them back: what is in the columns, damaged and missing shards, changed data."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_cots import COTSModel, ScenesDataset, open_pairs
from modeling_cots.data import feature_writing
from modeling_cots.data.feature_cache import FeatureSource
from modeling_cots.data.feature_writing import FeatureComputer, cache_features
from modeling_cots.data.items import modality_of
from modeling_cots.image_reading_cots import UnreadableImageError


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


@pytest.fixture
def photos(tmp_path):
    """Five images with two captions each; one is no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (40, 30), (50 * number, 0, 90)).save(folder / f"{number}.png")
        lines += [f'{{"file_name": "{number}.png", "caption": "a red {word} {number}"}}' for word in ("dog", "boat")]
    (folder / "3.png").write_bytes(b"broken")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def cached(photos, model, processor, tmp_path, **options):
    dataset = open_pairs(str(photos), "train")
    options = {"max_text_length": 12, "progress": False, "batch_size": 2, **options}
    return cache_features(dataset, model, processor, tmp_path / "cache", **options)


@pytest.fixture
def counted(monkeypatch):
    """Items that features were computed of."""
    computed, compute = [], FeatureComputer.compute

    def count(self, items, **options):
        computed.append((self.source.kind, len(items)))
        return compute(self, items, **options)

    monkeypatch.setattr(FeatureComputer, "compute", count)
    return computed


def test_columns_hold_the_features_of_images_flipped_images_and_captions(photos, model, tiny_processor, tmp_path):
    dataset = cached(photos, model, tiny_processor, tmp_path, flipped=True)
    plain = open_pairs(str(photos), "train")
    assert len(dataset) == 5 and list(dataset.iter_captions()) == list(plain.iter_captions())
    assert modality_of(dataset) == "image" and dataset.names() == plain.names()
    for number in range(5):
        item = dataset[number]
        assert {name: item[name] for name in plain[number]} == plain[number]
        source = FeatureSource.of_item(item, "image")
        tokens = tiny_processor(
            text=item["captions"], padding=True, truncation=True, max_length=12, return_tensors="pt"
        )
        with torch.no_grad():
            expected = model.run_text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
        torch.testing.assert_close(torch.from_numpy(item["text_features"]), expected, rtol=0, atol=1e-6)
        if number == 3:
            assert item["image_features"] is None
            with pytest.raises(UnreadableImageError, match="could not be read when"):
                source.read(item, 0)
            continue
        assert item["image_features"].shape == (2, 32) and item["image_features"].dtype == np.float32
        pixels = tiny_processor(images=Image.open(photos / f"{number}.png"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            views = [model.run_vision_model(each).pooler_output for each in (pixels, pixels.flip(-1))]
        # Of one color, so that our resizing and the processor's agree.
        torch.testing.assert_close(torch.from_numpy(item["image_features"]), torch.cat(views), rtol=0, atol=1e-5)
        assert torch.equal(source.read(item, 1), torch.from_numpy(item["image_features"][1]))


def test_nothing_is_computed_twice_and_what_is_missing_or_damaged_is(
    photos, model, tiny_processor, tmp_path, counted, monkeypatch
):
    monkeypatch.setattr(feature_writing, "SHARD_ROWS", 2)
    first = cached(photos, model, tiny_processor, tmp_path)
    assert counted == [("image", 2), ("image", 2), ("image", 1), ("text", 2), ("text", 2), ("text", 1)]
    counted.clear()
    cached(photos, model, tiny_processor, tmp_path)
    assert counted == []
    image_shards, text_shards = (sorted((tmp_path / "cache").glob(f"{kind}-*/*")) for kind in ("image", "text"))
    image_shards[1].unlink()
    text_shards[0].write_bytes(text_shards[0].read_bytes()[:100])
    again = cached(photos, model, tiny_processor, tmp_path)
    assert counted == [("image", 2), ("text", 2)]
    for number in (0, 2, 4):
        np.testing.assert_allclose(again[number]["image_features"], first[number]["image_features"], atol=1e-6)
        np.testing.assert_allclose(again[number]["text_features"], first[number]["text_features"], atol=1e-6)


def test_changed_data_are_computed_anew(photos, model, tiny_processor, tmp_path, counted):
    cached(photos, model, tiny_processor, tmp_path)
    counted.clear()
    metadata = photos / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("a red dog 0", "a red cat 0"))
    cached(photos, model, tiny_processor, tmp_path)
    assert counted == [("text", 5)]
    counted.clear()
    Image.new("RGB", (41, 30), (1, 2, 3)).save(photos / "0.png")
    cached(photos, model, tiny_processor, tmp_path)
    assert counted == [("image", 5)]


def test_other_weights_tokenizer_or_normalization_are_computed_anew(
    photos, model, tiny_processor, tmp_path, counted, tiny_tokenizer
):
    import copy

    cached(photos, model, tiny_processor, tmp_path)
    counted.clear()
    processor = copy.deepcopy(tiny_processor)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    cached(photos, model, processor, tmp_path)
    assert counted == [("image", 5)]
    counted.clear()
    processor = copy.deepcopy(tiny_processor)
    processor.tokenizer.add_tokens(["boat"])
    cached(photos, model, processor, tmp_path)
    assert counted == [("text", 5)]
    counted.clear()
    with torch.no_grad():
        model.text_model.encoder.layer[0].output.dense.bias.add_(1e-4)
        model.text_projection.weight.add_(1.0)  # behind the features
    cached(photos, model, tiny_processor, tmp_path)
    assert counted == [("text", 5)]


def test_a_call_of_the_tokenizer_in_between_changes_nothing(photos, model, tiny_processor, tmp_path, counted):
    cached(photos, model, tiny_processor, tmp_path)
    counted.clear()
    tiny_processor(text=["a red dog"], padding="max_length", truncation=True, max_length=7)
    cached(photos, model, tiny_processor, tmp_path)
    assert counted == []


def test_the_model_stays_in_its_mode_and_random_numbers_are_left_alone(model, tiny_processor, tmp_path):
    model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    dataset = cache_features(
        ScenesDataset("train", 6, 32), model, tiny_processor, tmp_path, kinds=("image",), progress=False
    )
    assert torch.equal(torch.rand(1), expected) and model.training
    assert "text_features" not in dataset[0] and dataset[-1]["pair_id"] == 5
    copied = pickle.loads(pickle.dumps(dataset))  # as worker processes get it
    np.testing.assert_array_equal(copied[5]["image_features"], dataset[5]["image_features"])


def test_features_of_another_source_in_the_middle_of_the_data_are_refused(photos, model, tiny_processor, tmp_path):
    item = cached(photos, model, tiny_processor, tmp_path)[0]
    source = FeatureSource.of_texts(model, tiny_processor, 7)
    with pytest.raises(ValueError, match="text features of .* another source: max_text_length 12 and not 7"):
        source.read(item, 0)


def test_the_encoder_can_run_in_half_precision(photos, model, tiny_processor, tmp_path):
    """Its features are those under autocast, and lie beside those of full precision."""
    full = cached(photos, model, tiny_processor, tmp_path)
    half = cached(photos, model, tiny_processor, tmp_path, precision="bfloat16")
    for kind in ("image", "text"):
        whole, rounded = full[0][f"{kind}_features"], half[0][f"{kind}_features"]
        assert whole.dtype == rounded.dtype == "float32"
        assert not (whole == rounded).all() and abs(whole - rounded).max() < 0.1
        assert '"precision": "bfloat16"' in half[0][f"{kind}_features_source"]
    again = cached(photos, model, tiny_processor, tmp_path)
    assert (again[0]["image_features"] == full[0]["image_features"]).all()
