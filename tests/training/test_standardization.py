"""Standardized features: fitted to the training data before the momentum copy is made, and part of the model after."""

import shutil
from itertools import pairwise

import pytest
import torch
from torch.utils.data import IterableDataset
from trainer_states import state_of
from video_files import write_video

from modeling_cots import COTSForPreTraining, COTSModel, ScenesDataset
from modeling_cots.data.videos import VideoDataset
from modeling_cots.training.standardization import needs_fitting


@pytest.fixture
def config(tiny_config):
    tiny_config.standardize_features, tiny_config.projection_hidden_size = True, 24
    return tiny_config


def test_it_is_fitted_to_the_features_of_the_training_data(make_trainer, config, tiny_processor):
    trainer = make_trainer(config)
    model = trainer.model.cots.eval()
    scenes = ScenesDataset("train", 24, 32)
    images = [item["image"] for item in scenes]
    captions = [caption for item in scenes for caption in item["captions"]]
    with torch.no_grad():
        for kind, features in {
            "vision": torch.cat(
                [
                    model.run_vision_model(**tiny_processor(images=image, return_tensors="pt")).pooler_output
                    for image in images
                ]
            ),
            "text": torch.cat(
                [
                    model.run_text_model(
                        tiny_processor(text=[text], truncation=True, max_length=24, return_tensors="pt")["input_ids"]
                    ).pooler_output
                    for text in captions
                ]
            ),
        }.items():
            standardization = getattr(model, f"{kind}_projection").standardization
            torch.testing.assert_close(standardization.mean, features.mean(dim=0), rtol=0, atol=1e-5)
            torch.testing.assert_close(standardization.std, features.std(dim=0, correction=0), rtol=0, atol=1e-5)
            copied = getattr(trainer.momentum_state.encoder.model, f"{kind}_projection").standardization
            assert torch.equal(copied.mean, standardization.mean) and torch.equal(copied.std, standardization.std)


def test_training_leaves_it_as_it_was_fitted_and_the_model_carries_it(make_trainer, config, tmp_path):
    trainer = make_trainer(config)
    before = {name: value.clone() for name, value in trainer.model.named_buffers() if "standardization" in name}
    assert len(before) == 4
    trainer.train()
    after = dict(trainer.model.named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    trainer.export_model(str(tmp_path / "exported"))
    exported = COTSModel.from_pretrained(tmp_path / "exported")
    assert not needs_fitting(exported)
    assert torch.equal(
        exported.text_projection.standardization.std, before["cots.text_projection.standardization.std"]
    )


def test_what_is_fitted_stays_whatever_comes_later(make_trainer, config):
    """A model that goes on training, on other data, keeps the numbers that its projections have learned with."""
    first = make_trainer(config)
    mean = first.model.cots.vision_projection.standardization.mean.clone()
    again = type(first)(
        model=first.model,
        args=first.args,
        train_dataset=ScenesDataset("validation", 9, 32),
        processing_class=first.processing_class,
        image_tokenizer=first.image_tokenizer,
    )
    assert torch.equal(again.model.cots.vision_projection.standardization.mean, mean)


def test_a_resumed_run_equals_the_whole_one(make_trainer, config, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make_trainer(config, output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resumed = make_trainer(config, output_dir=str(tmp_path / "stopped"), **arguments)
    with torch.no_grad():
        resumed.model.cots.text_projection.standardization.mean.add_(1.0)
    resumed.train(resume_from_checkpoint="latest")
    expected, got = state_of(whole), state_of(resumed)
    assert any("standardization" in name for name in expected)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_videos_are_standardized_by_their_frames(make_trainer, config, tmp_path):
    paths = [write_video(tmp_path / f"{number}.mp4", range(4 * number, 4 * number + 6)) for number in range(4)]
    videos = VideoDataset([f"video{i}" for i in range(4)], paths, [["a red circle"]] * 4)
    off = {"cmvm_weight": 0.0, "cmlm_weight": 0.0, "image_tokenizer": None, "min_crop_scale": 1.0}
    trainer = make_trainer(config, train_dataset=videos, **off)
    assert not needs_fitting(trainer.model.cots)


def test_a_stream_is_refused(make_trainer, config):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ScenesDataset("train", 24, 32))

    with pytest.raises(ValueError, match="a stream is read only once: open the data whole, or set standardize_fea"):
        make_trainer(config, train_dataset=Stream(), cmvm_weight=0)


def test_data_without_a_readable_image_are_refused(make_trainer, config):
    class Broken(ScenesDataset):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "image": b"broken"}

    with pytest.raises(ValueError, match="None of 24 images or videos of the training set could be read"):
        make_trainer(config, train_dataset=Broken("train", 24, 32))


def test_without_training_data_nothing_is_fitted(config, make_trainer, tiny_processor):
    from modeling_cots import COTSTrainer

    args = make_trainer(config, cmvm_weight=0).args
    trainer = COTSTrainer(model=COTSForPreTraining(config), args=args, processing_class=tiny_processor)
    assert needs_fitting(trainer.model.cots)


def test_losses_begin_nearer_to_chance_with_standardized_features(make_trainer, config):
    """What it is for: encoders whose features have a large common part give all pairs the same embedding."""
    gaps = []
    for standardize in (False, True):
        config.standardize_features = standardize
        trainer = make_trainer(config, max_steps=1, learning_rate=0.0, cmvm_weight=0, cmlm_weight=0, kl_weight=0)
        embeds = trainer.predict(ScenesDataset("validation", 12, 32)).predictions[0]
        gaps.append(float((embeds @ embeds.T).mean()))
    assert all(later < earlier for earlier, later in pairwise(gaps))
