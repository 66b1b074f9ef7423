"""Features of frozen encoders that are computed once: the same training as without, and no combination that is not."""

import copy
import shutil

import pytest
import torch
from torch.utils.data import Dataset
from trainer_states import state_of

from modeling_cots import COTSForPreTraining, COTSTrainer, ScenesDataset
from modeling_cots.data import feature_writing
from modeling_cots.data.feature_writing import FeatureDataset, cache_features

UNMASKED = {"cmvm_weight": 0.0, "cmlm_weight": 0.0, "min_crop_scale": 1.0}
FROZEN = {"freeze_vision": "all", "freeze_text": "all", **UNMASKED}
BOTH = [FROZEN, {**FROZEN, "freeze_text": "1"}, {**FROZEN, "freeze_vision": "none"}]


class SomeBroken(ScenesDataset):
    """Scenes, as files are, in memory as bytes; two cannot be read."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "image": b"broken"} if index in (3, 17) else item


@pytest.fixture
def scenes():
    return SomeBroken("train", 24, 32)


@pytest.fixture
def held_out():
    return SomeBroken("validation", 20, 32)


@pytest.fixture
def make(make_trainer, scenes, held_out, tmp_path):
    """A trainer with frozen encoders, `cached` or not."""

    def make(cached: bool, config=None, **arguments):
        if cached:
            arguments["feature_cache"] = str(tmp_path / "features")
        arguments = {"train_dataset": scenes, "eval_dataset": held_out, **FROZEN, **arguments}
        return make_trainer(config, **arguments)

    return make


@pytest.fixture
def forbid_computing(monkeypatch):
    def forbid():
        def fail(*args, **kwargs):
            raise AssertionError("features are computed again")

        monkeypatch.setattr(feature_writing.pq, "write_table", fail)

    return forbid


@pytest.mark.parametrize("options", [*BOTH, {**FROZEN, "horizontal_flip": 0.5, "kl_weight": 0.0}], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_training_and_evaluation_equal_those_without_a_cache(
    make, tiny_config, options, standardize, forbid_computing
):
    tiny_config.text_config.hidden_dropout_prob = 0.2  # of an encoder that trains, and of none that is frozen
    tiny_config.standardize_features = standardize
    states, lines, metrics = [], [], []
    for cached in (False, True):
        trainer = make(cached, copy.deepcopy(tiny_config), **options)
        torch.manual_seed(1)
        trainer.train()
        states.append(state_of(trainer))
        lines.append(
            [[line[name] for name in ("loss", "loss_i2t", "loss_kl")] for line in trainer.state.log_history[:3]]
        )
        metrics.append(trainer.evaluate())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=0, atol=2e-6, msg=name)
    for mine, expected in zip(lines[1], lines[0], strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)
    for name in ("eval_recall_sum", "eval_t2i_mean_rank", "eval_skipped_images"):
        assert metrics[1][name] == metrics[0][name], name
    forbid_computing()
    again = make(True, copy.deepcopy(tiny_config), **options)  # found again
    torch.manual_seed(1)
    again.train()
    for name, expected in states[1].items():
        assert torch.equal(state_of(again)[name], expected), name


def test_neither_encoders_nor_images_are_touched_in_training_or_evaluation(make, monkeypatch):
    trainer = make(True)
    assert isinstance(trainer.train_dataset, FeatureDataset) and isinstance(trainer.eval_dataset, FeatureDataset)
    for model in (trainer.model.cots, trainer.momentum_state.encoder.model):
        for encoder in (model.vision_model, model.text_model):
            encoder.register_forward_pre_hook(lambda *args: pytest.fail("an encoder runs"))
    from modeling_cots.data import image_collators

    monkeypatch.setattr(image_collators, "read_pixels", lambda *args: pytest.fail("an image is read"))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["image_features"].shape == batch["text_features"].shape == (8, 32)
    assert not {"pixel_values", "input_ids"} & set(batch)
    trainer.train()
    trainer.evaluate()


def test_other_data_than_the_cached_are_measured_from_images(make, scenes):
    trainer = make(True)
    plain = make(False)
    other = ScenesDataset("validation", 15, 32)
    assert trainer.evaluate(other)["eval_recall_sum"] == plain.evaluate(other)["eval_recall_sum"]
    # Training resizes in another way than the processor: its features are not those of an evaluation.
    expected, got = plain.predict(scenes).predictions, trainer.predict(trainer.train_dataset).predictions
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=1e-6)
    held_out = trainer.eval_dataset.dataset
    assert trainer.predict(held_out).metrics["test_recall_sum"] == trainer.evaluate()["eval_recall_sum"]


def test_a_resumed_run_equals_the_whole_one(make, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make(True, output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resumed = make(True, output_dir=str(tmp_path / "stopped"), **arguments)
    resumed.train(resume_from_checkpoint="latest")
    expected, got = state_of(whole), state_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_a_changed_encoder_is_computed_anew_beside_the_first(make, tiny_config, tmp_path):
    def folders() -> set[str]:
        return {path.name for path in (tmp_path / "features").iterdir()}

    make(True)
    first = folders()
    assert len(first) == 4, "images and captions of both splits"
    other = copy.deepcopy(tiny_config)
    other.vision_config.layer_norm_eps = 1e-5
    make(True, other)
    assert len(folders() - first) == 2, "the images of both"
    second = folders()
    make(True, horizontal_flip=0.5)
    assert len(folders() - second) == 1, "of the training images, flipped ones as well"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_crop_scale": 0.5}, "whole images, and min_crop_scale=0.5 shows others"),
        ({"auto_augment": "rand-m5-n2-mstd0.5"}, "auto_augment=rand-m5-n2-mstd0.5 shows others"),
        ({"cmvm_weight": 1.0}, "image features are one vector .* cmvm_weight=1.0 needs those of its tokens"),
        ({"cmlm_weight": 0.5}, "text features are one vector .* cmlm_weight=0.5 needs those of its tokens"),
        ({"freeze_vision": "1", "freeze_text": "none"}, "feature_cache is for encoders that are frozen whole"),
    ],
)
def test_what_no_cached_feature_could_serve_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(True, **arguments)


def test_streams_videos_and_custom_collators_are_refused(make, make_trainer, tmp_path, tiny_config, tiny_processor):
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ScenesDataset("train", 24, 32))

    class Videos(Dataset):
        modality = "video"

        def __len__(self):
            return 1

    with pytest.raises(ValueError, match="A stream has no end"):
        make(True, train_dataset=Stream())
    with pytest.raises(ValueError, match="Frames of videos are drawn anew"):
        make(True, train_dataset=Videos())
    args = make(True).args
    with pytest.raises(ValueError, match="custom data_collator knows of no cached features"):
        COTSTrainer(
            model=COTSForPreTraining(tiny_config), args=args, processing_class=tiny_processor, data_collator=list
        )


def columns(model, processor, folder, **options) -> FeatureDataset:
    options = {"max_text_length": 24, "progress": False, **options}
    return cache_features(ScenesDataset("train", 24, 32), model.cots, processor, folder, **options)


@pytest.fixture
def model(make_trainer):
    return make_trainer(cmvm_weight=0).model.eval()


def test_columns_of_the_data_are_used_without_a_cache_of_the_run(make, model, tiny_processor, tmp_path):
    trainer = make(False, train_dataset=columns(model, tiny_processor, tmp_path))
    assert "image_features" in next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze_vision": "1"}, "an encoder that does not train, and freeze_vision is 1: set it to all"),
        ({"freeze_text": "none"}, "an encoder that does not train, and freeze_text is none: set it to all"),
        ({"horizontal_flip": 0.5}, "horizontal_flip=0.5 .* no features of flipped ones"),
        ({"min_crop_scale": 0.5}, "min_crop_scale=0.5"),
        ({"cmvm_weight": 1.0}, "cmvm_weight=1.0"),
        ({"cmlm_weight": 1.0}, "cmlm_weight=1.0"),
    ],
)
def test_columns_that_training_cannot_use_are_refused(make, model, tiny_processor, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(False, train_dataset=columns(model, tiny_processor, tmp_path), **arguments)


def test_columns_of_another_encoder_size_cut_or_view_are_refused(make, model, tiny_processor, tiny_config, tmp_path):
    def refused(message: str, dataset: FeatureDataset) -> None:
        with pytest.raises(ValueError, match=f"features do not fit this run: .*{message}"):
            make(False, train_dataset=dataset)

    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cots.vision_model.layers[1].mlp.fc2.bias.add_(1e-3)
    refused("encoder .* and not", columns(other, tiny_processor, tmp_path))
    config = copy.deepcopy(tiny_config)
    config.vision_config.image_size = 24
    resized = COTSForPreTraining(config)
    refused(r"image_size .24, 24. and not .32, 32.", columns(resized, tiny_processor, tmp_path))
    refused("max_text_length 5 and not 24", columns(model, tiny_processor, tmp_path, max_text_length=5))
    refused("view evaluation and not training", columns(model, tiny_processor, tmp_path, view="evaluation"))


def test_the_model_refuses_masks_and_inputs_beside_features(model, tiny_masked_inputs):
    inputs = tiny_masked_inputs
    features = torch.zeros(4, 32)
    with pytest.raises(ValueError, match="leave out `bool_masked_pos`"):
        model(inputs["input_ids"], image_features=features, bool_masked_pos=inputs["bool_masked_pos"])
    masked = {name: inputs[name] for name in ("masked_input_ids", "masked_token_pos")}
    with pytest.raises(ValueError, match="leave out `masked_input_ids`"):
        model(pixel_values=inputs["pixel_values"], text_features=features, **masked)
    with pytest.raises(ValueError, match="one of the three"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"], image_features=features)
    with pytest.raises(ValueError, match="one of the two"):
        model(inputs["input_ids"], image_features=features, text_features=features)


def test_features_of_one_kind_serve_the_masked_pass_of_the_other(make):
    """A text encoder that trains with CMLM is conditioned on cached image features."""
    states = []
    for cached in (False, True):
        trainer = make(cached, freeze_text="none", cmlm_weight=1.0)
        torch.manual_seed(1)
        trainer.train()
        states.append(state_of(trainer))
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=0, atol=2e-6, msg=name)


def test_a_run_in_half_precision_caches_and_uses_features_of_that_precision(make):
    trainer = make(True, bf16=True, max_steps=2)
    assert {source.precision for source in trainer.features.values()} == {"bfloat16"}
    trainer.train()
    assert trainer.measured_features.of(trainer.eval_dataset[0]) != {}, "and so does its evaluation"
    assert trainer.evaluate()["eval_recall_sum"] >= 0
