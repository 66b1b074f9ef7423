"""Frozen layers: one run a step for both copies, and the numbers of a model whose weights merely have no gradient."""

import copy
import shutil

import pytest
import torch
from encoder_kinds import PAIRS_OF_KINDS, SIZES, cots_config, masks_of
from trainer_states import state_of
from transformers import AlbertConfig

from modeling_cots import COTSForPreTraining
from modeling_cots.encoders_cots import build_text_encoder
from modeling_cots.method.momentum import MomentumEncoder
from modeling_cots.training.adapters import with_lora
from modeling_cots.training.frozen_layers import FrozenEncoders, FrozenLayers

VISION_LAYER, TEXT_LAYER = "cots.vision_model.layers.{}.", "cots.text_model.encoder.layer.{}."


def all_masked(inputs: dict) -> dict:
    return {**inputs, **masks_of(inputs)}


def encode_both(model, momentum, frozen, inputs, masks) -> tuple[torch.Tensor, ...]:
    frozen.eval_()
    with frozen.record():
        output = model(**inputs, **masks)
    with torch.no_grad(), frozen.replay(momentum):
        image_embeds = momentum.encode_image(inputs["pixel_values"])
        text_embeds = momentum.encode_text(inputs["input_ids"], inputs["attention_mask"])
    return output.image_embeds, output.text_embeds, image_embeds, text_embeds


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("freeze", ["1", "2", "all"])
@pytest.mark.parametrize(("text", "vision"), PAIRS_OF_KINDS)
def test_every_encoder_gives_its_copy_what_the_copy_would_have_computed(tiny_inputs, text, vision, freeze, masked):
    torch.manual_seed(0)
    config = cots_config(text=text, vision=vision, tie_word_embeddings=text != "electra")
    if text == "electra":
        config.text_config.embedding_size = 16  # projected between the embeddings and the layers
    model = COTSForPreTraining(config).train()
    momentum = MomentumEncoder(model.cots).model
    with torch.no_grad():
        for parameter in momentum.parameters():  # upper layers differ, as they do after a few steps
            parameter.add_(0.05 * torch.randn_like(parameter))
    frozen = FrozenEncoders(model.cots, freeze, freeze)
    for part, name in zip(frozen.parts.values(), ("vision_model", "text_model"), strict=True):
        online, copied = getattr(model.cots, name), getattr(momentum, name)
        theirs = dict(copied.named_parameters())
        for parameter_name, parameter in online.named_parameters():
            if not parameter.requires_grad:
                theirs[parameter_name].data.copy_(parameter.data)
        assert part.num_frozen == (2 if freeze == "all" else int(freeze))
    with torch.no_grad():
        expected = (
            momentum.encode_image(tiny_inputs["pixel_values"]),
            momentum.encode_text(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]),
        )
    masks = masks_of(tiny_inputs)
    got = encode_both(model, momentum, frozen, tiny_inputs, masks if masked else {})[2:]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    with torch.no_grad():  # and outside of a step the copy runs as ever
        assert torch.equal(momentum.encode_image(tiny_inputs["pixel_values"]), expected[0])


def test_frozen_layers_run_once_a_step_and_in_evaluation_mode(make_trainer, monkeypatch):
    trainer = make_trainer(
        freeze_vision="1",
        freeze_text="all",
        batch_candidates=False,
        cmvm_weight=0,
        cmlm_weight=0,
        max_steps=2,
        logging_steps=5,
    )
    calls = []

    def count(model, name: str):
        for kind, module in {
            "vision 0": model.vision_model.layers[0].mlp,
            "vision 1": model.vision_model.layers[1].mlp,
            "text 0": model.text_model.encoder.layer[0].attention,
            "vision embeddings": model.vision_model.embeddings.patch_embeddings,
        }.items():
            module.register_forward_hook(
                lambda module, *args, kind=kind: calls.append((name, kind, module.training, torch.is_grad_enabled()))
            )

    count(trainer.model.cots, "online")
    count(trainer.momentum_state.encoder.model, "momentum")
    trainer.train()
    assert sorted(calls) == sorted(
        [
            ("online", "vision 0", False, True),
            ("online", "vision embeddings", False, True),
            ("online", "text 0", False, True),
            ("online", "vision 1", True, True),
        ]
        * 2
        + [("momentum", "vision 1", False, False)]  # in the first step the copy equals the online model
    )


def frozen_by_hand(trainer, modules: list[str]) -> None:
    """The slow twin: weights without a gradient, and modules that no call of `train` reaches."""
    for name in modules:
        module = trainer.model.get_submodule(name).requires_grad_(False).eval()
        for each in module.modules():
            each.train = lambda mode=True, each=each: each


@pytest.fixture
def dropout_config(tiny_config):
    tiny_config.text_config.hidden_dropout_prob = 0.2
    tiny_config.vision_config.hidden_dropout_prob = 0.2
    return tiny_config


@pytest.mark.parametrize("masked", [0.0, 1.0])
@pytest.mark.parametrize(
    ("options", "modules"),
    [
        ({"freeze_vision": "all", "freeze_text": "all"}, ["cots.vision_model", "cots.text_model"]),
        (
            {"freeze_vision": 1, "freeze_text": "1"},
            [f"cots.{name}" for name in ("vision_model.embeddings", "vision_model.layers.0")]
            + [f"cots.text_model.{name}" for name in ("embeddings", "encoder.layer.0")],
        ),
        ({"freeze_text": "all"}, ["cots.text_model"]),
    ],
)
def test_training_equals_that_of_weights_without_a_gradient(make_trainer, dropout_config, options, modules, masked):
    arguments = {"cmvm_weight": masked, "cmlm_weight": masked, "max_steps": 3, "logging_steps": 1, "max_key_drift": 1}
    by_hand = make_trainer(dropout_config, **arguments)
    frozen_by_hand(by_hand, modules)
    frozen = make_trainer(dropout_config, **arguments, **options)
    wanted = {name for name, parameter in by_hand.model.named_parameters() if parameter.requires_grad}
    assert wanted == {name for name, parameter in frozen.model.named_parameters() if parameter.requires_grad}
    for trainer in (by_hand, frozen):
        torch.manual_seed(1)
        trainer.train()
    expected = state_of(by_hand)
    for name, tensor in state_of(frozen).items():  # the copy's state has no weights that it shares with the model
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (by_hand, frozen)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_resumed_run_equals_the_whole_one(make_trainer, dropout_config, tmp_path):
    arguments = {"freeze_vision": "1", "freeze_text": "all", "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make_trainer(dropout_config, output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resumed = make_trainer(dropout_config, output_dir=str(tmp_path / "stopped"), **arguments)
    resumed.train(resume_from_checkpoint="latest")
    expected, got = state_of(whole), state_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_gradient_checkpointing_changes_nothing(make_trainer):
    arguments = {"freeze_vision": "1", "freeze_text": "1"}
    plain, checkpointed = make_trainer(**arguments), make_trainer(**arguments, gradient_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    for name, expected in plain.model.state_dict().items():
        torch.testing.assert_close(checkpointed.model.state_dict()[name], expected, rtol=0, atol=1e-6)


def test_videos_share_what_is_frozen_too(tiny_inputs, tiny_config):
    torch.manual_seed(0)
    model = COTSForPreTraining(tiny_config)
    momentum = copy.deepcopy(model.cots).eval()
    frames = torch.randn(4, 20, 3, 32, 32)  # the copy runs them in two parts
    with torch.no_grad():
        expected = momentum.encode_video(frames)
    for freeze in ("1", "all"):
        frozen = FrozenEncoders(model.cots, freeze, "none")
        frozen.eval_()
        with frozen.record():
            model(input_ids=tiny_inputs["input_ids"], pixel_values_videos=frames)
        with torch.no_grad(), frozen.replay(momentum):
            torch.testing.assert_close(momentum.encode_video(frames), expected, rtol=0, atol=1e-6)


def test_the_log_and_the_record_say_what_is_frozen(make_trainer, monkeypatch):
    from modeling_cots.training import trainer as module
    from modeling_cots.training.record import build_record

    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    trainer = make_trainer(freeze_vision="1", freeze_text="all")
    assert len(warnings) == 1
    assert "of the vision encoder the embeddings and the lower 1 of 2 layers and the text encoder whole" in warnings[0]
    num_trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{num_trained:,} of" in warnings[0]
    record = build_record(
        trainer.model.cots, trainer.args, num_steps=0, train_dataset=None, eval_dataset=None, metrics=None
    )
    assert (record["settings"]["freeze_vision"], record["settings"]["freeze_text"]) == ("1", "all")
    assert record["settings"]["max_key_drift"] == 0.08
    make_trainer()
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        ({"freeze_vision": "all", "freeze_text": "all"}, "any"),
        ({"freeze_vision": "all", "freeze_text": "all", "max_key_drift": 0.5}, 0.5),
        ({"freeze_vision": "all", "freeze_text": "1"}, 0.08),
        ({}, 0.08),
    ],
)
def test_every_queued_key_counts_where_projections_alone_train(make_trainer, arguments, limit):
    """With encoders that move, keys of a drift of 1 count for nothing."""
    from modeling_cots.training.record import build_record

    trainer = make_trainer(**arguments, cmvm_weight=0, cmlm_weight=0)
    queue = trainer.queue
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for _ in range(4):
        result = trainer.cots_objective(trainer.model, inputs, 0)
        result.key_drift = torch.tensor(float("nan") if queue.num_pushed == 0 else 1.0)
        trainer.cots_objective.push(result)
    assert queue.fresh_keys.num_fresh == (min(3 * len(inputs["valid"]), queue.size) if limit == "any" else 0)
    record = build_record(
        trainer.model.cots, trainer.args, num_steps=0, train_dataset=None, eval_dataset=None, metrics=None
    )
    assert record["settings"]["max_key_drift"] == limit


def test_a_drift_limit_without_candidates_of_the_batch_is_refused(make_trainer):
    make_trainer(freeze_vision="all", freeze_text="all", cmvm_weight=0, cmlm_weight=0, batch_candidates=False)
    with pytest.raises(ValueError, match="max_key_drift compares queued keys with those of the batch: leave it out"):
        make_trainer(max_key_drift=0.08, batch_candidates=False)
    with pytest.raises(ValueError, match="max_key_drift must be above 0, got 0.0"):
        make_trainer(max_key_drift=0.0)


def test_lora_in_an_encoder_that_is_frozen_whole_is_refused(make_trainer):
    trainer = make_trainer(freeze_text="all")
    with pytest.raises(ValueError, match="LoRA of rank 2 trains in both encoders, and freeze_text is all: leave one"):
        with_lora(trainer.model, trainer.args, 2)


@pytest.mark.parametrize("freeze", ["0", "-1", "some", "1.5", "", True])
def test_what_is_no_number_of_layers_is_refused(make_trainer, freeze):
    with pytest.raises(ValueError, match="freeze_text must be `all`, `none` or a number of layers from below, got"):
        make_trainer(freeze_text=freeze)


def test_more_layers_than_there_are_and_shared_layers_are_refused(make_trainer, tiny_config):
    with pytest.raises(ValueError, match="freeze_vision=3, and the vision encoder has 2 layers"):
        make_trainer(freeze_vision="3")
    albert = build_text_encoder(AlbertConfig(**SIZES, embedding_size=16, vocab_size=99))
    with pytest.raises(ValueError, match="`albert` encoder cannot be told apart: set freeze_text to `all`"):
        FrozenLayers(albert, "1", "text")


def test_a_learning_rate_of_frozen_encoders_is_refused(make_trainer):
    with pytest.raises(ValueError, match="no weight of an encoder trains"):
        make_trainer(freeze_vision="all", freeze_text="all", encoder_learning_rate=1e-5)
    make_trainer(freeze_vision="1", freeze_text="all", encoder_learning_rate=1e-5)
