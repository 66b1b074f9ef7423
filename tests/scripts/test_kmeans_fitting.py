"""Image tokens by k-means: fitted once, found again, and used in training and beside the data."""

import json
import sys

import pytest
import tokenize_images
import torch
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from modeling_cots import COTSForPreTraining, ScenesDataset
from modeling_cots.data.opening import open_dataset
from modeling_cots.scripts import kmeans_fitting, pretraining
from modeling_cots.scripts.factory import build_image_tokenizer
from modeling_cots.scripts.kmeans_fitting import cluster, find_or_fit, patch_features

pytest.importorskip("faiss")
RAW = [0.0] * 3, [1.0] * 3


@pytest.fixture
def encoder(tmp_path) -> str:
    """The folder of a tiny pre-trained vision encoder."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=7)).save_pretrained(tmp_path / "encoder")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_centers_use_all_tokens_and_are_the_same_in_every_run():
    features = F.normalize(torch.randn(400, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    first, second = cluster(features, 8), cluster(features, 8)
    assert torch.equal(first, second)
    assigned = torch.cdist(features, first).argmin(dim=1)
    assert len(assigned.unique()) == 8
    for number in range(8):  # nearly a fixed point of Lloyd's algorithm
        assert (features[assigned == number].mean(dim=0) - first[number]).norm() < 0.1
    with pytest.raises(ValueError, match="8 tokens cannot be fitted to 5 patches"):
        cluster(features[:5], 8)


def test_it_is_fitted_once_and_found_again(encoder, tiny_config, tmp_path, monkeypatch):
    dataset, name = ScenesDataset("train", 12, image_size=32), f"kmeans:{encoder}"
    fitted = find_or_fit(name, dataset, tiny_config, 8, *RAW, str(tmp_path / "run"))
    monkeypatch.setattr(kmeans_fitting, "patch_features", None)  # a second fit would fail
    found = find_or_fit(name, dataset, tiny_config, 8, *RAW, str(tmp_path / "run"))
    patches = tiny_config.patch_size
    assert found.fingerprint(patches) == fitted.fingerprint(patches)
    by_folder = build_image_tokenizer(str(tmp_path / "run" / "image_tokenizer"), None, 8)
    assert by_folder.fingerprint(patches) == fitted.fingerprint(patches)
    with pytest.raises(TypeError):  # other tokens are wanted
        find_or_fit(name, dataset, tiny_config, 9, *RAW, str(tmp_path / "run"))
    trained_on = Dinov2Model.from_pretrained(encoder)
    trained_on.layernorm.weight.data += 0.1
    trained_on.save_pretrained(encoder)
    with pytest.raises(TypeError):  # the folder holds another encoder by now
        find_or_fit(name, dataset, tiny_config, 8, *RAW, str(tmp_path / "run"))


def test_features_are_of_the_first_images_that_can_be_read(encoder, tiny_config):
    class Broken(ScenesDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "image": {"bytes": b"no image", "path": None}} if index in self.broken else item

    dataset = Broken("train", 6, image_size=32)
    dataset.broken = {1, 4}
    tokenizer = kmeans_fitting.KMeansImageTokenizer.from_encoder(encoder, 4, *RAW, revision="main")
    assert len(patch_features(tokenizer, dataset, tiny_config)) == 4 * 16
    dataset.broken = set(range(6))
    with pytest.raises(ValueError, match="None of the first 6 images could be read"):
        patch_features(tokenizer, dataset, tiny_config)


def test_a_stream_is_refused(encoder, tiny_config, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match="a stream is read only once"):
        find_or_fit(f"kmeans:{encoder}", Stream(), tiny_config, 4, *RAW, str(tmp_path))


@pytest.fixture
def model_config(tmp_path) -> str:
    """A file of a tiny model with 32-pixel images, 16 patches and 8 image tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    fields = {
        "text_config": {**sizes, "vocab_size": 100, "max_position_embeddings": 64},
        "vision_config": {**sizes, "image_size": 32, "patch_size": 8},
        "projection_dim": 8,
        "image_vocab_size": 8,
    }
    (tmp_path / "model.json").write_text(json.dumps(fields))
    return str(tmp_path / "model.json")


def test_training_predicts_the_tokens_and_so_it_does_beside_the_data(encoder, model_config, tmp_path, monkeypatch):
    """First by an encoder that runs in training, then by tokens that tokenize_images.py has written once."""
    train = {"model_config": model_config, "eval_split": "none", "max_steps": 2, "cmvm_weight": 1, "use_cpu": True}
    train |= {"per_device_train_batch_size": 8, "report_to": "none", "min_crop_scale": 1}

    def start(**options) -> COTSForPreTraining:
        options = {**train, **options}
        pretraining.main([f"--{name}={value}" for name, value in options.items()])
        return COTSForPreTraining.from_pretrained(options["output_dir"])

    model = start(dataset="scenes", image_tokenizer=f"kmeans:{encoder}", output_dir=tmp_path / "run")
    assert model.config.image_vocab_size == 8
    photos, tokenized = tmp_path / "photos", tmp_path / "tokenized"
    photos.mkdir()
    scenes = ScenesDataset("train", 16, image_size=32)
    rows = [{"file_name": f"{row}.png", "text": scenes[row]["captions"][0]} for row in range(16)]
    for row, fields in enumerate(rows):
        scenes[row]["image"].save(photos / fields["file_name"])
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["tokenize_images.py", photos, "--output_dir", tokenized, "--model_config", model_config]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--image_tokenizer", f"kmeans:{encoder}"])
    monkeypatch.setattr(tokenize_images, "VOCAB_SIZE", 8)
    tokenize_images.main()
    assert len(open_dataset(str(tokenized), "train", image_size=32)[0]["image_tokens"][0]) == 16
    own = str(tokenized / "image_tokenizer")
    start(dataset=tokenized, image_tokenizer=own, output_dir=tmp_path / "second")
    with pytest.raises(ValueError, match="The cached image tokens do not fit this run: codebook"):
        start(dataset=tokenized, image_tokenizer=str(tmp_path / "run" / "image_tokenizer"), output_dir=tmp_path / "no")
