"""With momentum 0 the online pass is the momentum pass: run once, where nothing is drawn, and with equal results."""

import shutil

import pytest
import torch
from encoder_kinds import PAIRS_OF_KINDS, cots_config, masks_of
from torch import nn
from trainer_states import state_of

from modeling_cots import COTSForPreTraining
from modeling_cots.method.momentum import MomentumEncoder
from modeling_cots.training.copied_passes import CopiedPasses
from modeling_cots.training.frozen_layers import FrozenEncoders


def without_dropout(config):
    """Whatever the encoders call it."""
    for part in (config.text_config, config.vision_config):
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("drop" in name or name == "layerdrop"):
                setattr(part, name, 0.0)
    return config


def count_runs(model: nn.Module) -> dict[str, int]:
    """Passes of each encoder; the numbers grow as the model is used."""
    runs = {"vision": 0, "text": 0}

    def counter(kind: str):
        def count(module, args, output):
            runs[kind] += 1

        return count

    for kind in runs:
        encoder = getattr(model, f"{kind}_model")
        norms = [each for each in encoder.modules() if isinstance(each, nn.LayerNorm)]
        norms[-1].register_forward_hook(counter(kind))  # the lower layers may be frozen
    return runs


def encode_twice(model, copied, momentum, inputs, masks) -> tuple[torch.Tensor, ...]:
    with copied.record():
        model(**inputs, **masks)
    with torch.no_grad(), copied.replay(momentum):
        return momentum.encode_image(inputs["pixel_values"]), momentum.encode_text(
            inputs["input_ids"], inputs["attention_mask"]
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("text", "vision"), PAIRS_OF_KINDS)
def test_every_encoder_gives_what_its_copy_would_have_computed(tiny_inputs, text, vision, masked):
    torch.manual_seed(0)
    model = COTSForPreTraining(without_dropout(cots_config(text=text, vision=vision))).train()
    encoder = MomentumEncoder(model.cots)
    copied = CopiedPasses(model.cots, lambda: encoder.is_copy, FrozenEncoders(model.cots, "none", "none"))
    momentum, runs = encoder.model, count_runs(encoder.model)
    expected = (
        momentum.encode_image(tiny_inputs["pixel_values"]),
        momentum.encode_text(tiny_inputs["input_ids"], tiny_inputs["attention_mask"]),
    )
    before = dict(runs)
    masks = masks_of(tiny_inputs) if masked else {}
    for mine, theirs in zip(encode_twice(model, copied, momentum, tiny_inputs, masks), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        assert not mine.requires_grad
    assert runs == before and all(before.values())
    again = momentum.encode_image(tiny_inputs["pixel_values"])  # outside of a step the copy runs as ever
    assert torch.equal(again, expected[0]) and runs["vision"] > before["vision"]


@pytest.mark.parametrize(
    ("field", "shared"),
    [("hidden_dropout_prob", {"vision"}), ("attention_probs_dropout_prob", {"vision"}), (None, {"vision", "text"})],
)
def test_a_pass_that_draws_is_not_the_same(tiny_inputs, field, shared):
    config = without_dropout(cots_config())
    if field is not None:
        setattr(config.text_config, field, 0.1)
    model = COTSForPreTraining(config).train()
    encoder = MomentumEncoder(model.cots)
    copied = CopiedPasses(model.cots, lambda: encoder.is_copy, FrozenEncoders(model.cots, "none", "none"))
    runs = count_runs(encoder.model)
    encode_twice(model, copied, encoder.model, tiny_inputs, {})
    assert {kind for kind, count in runs.items() if count == 0} == shared


def test_noise_from_a_hook_and_statistics_of_the_batch_are_seen(tiny_inputs):
    model = COTSForPreTraining(without_dropout(cots_config())).train()
    model.cots.text_model.embeddings.register_forward_hook(  # as NEFTune does it
        lambda module, args, output: output + torch.zeros_like(output).uniform_(-0.1, 0.1)
    )
    model.cots.vision_model.layernorm = nn.Sequential(nn.BatchNorm1d(17), model.cots.vision_model.layernorm)
    encoder = MomentumEncoder(model.cots)
    copied = CopiedPasses(model.cots, lambda: encoder.is_copy, FrozenEncoders(model.cots, "none", "none"))
    runs = count_runs(encoder.model)
    encode_twice(model, copied, encoder.model, tiny_inputs, {})
    assert runs["vision"] > 0 and runs["text"] > 0


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"freeze_vision": "1"}])
def test_training_is_that_of_two_passes(make_trainer, tiny_config, monkeypatch, arguments):
    """While no key is fresh, and after; the momentum copy runs only then, or to measure the age of keys."""
    config, states, runs = without_dropout(tiny_config), [], []
    for is_shared in (True, False):
        trainer = make_trainer(
            config=config, cmvm_weight=0, cmlm_weight=0, max_steps=6, logging_steps=100, queue_size=100, **arguments
        )
        if not is_shared:
            monkeypatch.setattr(trainer.copied_passes, "is_copy", lambda: False)
        runs.append(count_runs(trainer.momentum_state.encoder.model))
        trainer.train()
        states.append(state_of(trainer))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor), name
    assert all(runs[0][kind] < runs[1][kind] for kind in runs[0])


def test_with_a_momentum_nothing_is_shared(make_trainer, tiny_config):
    trainer = make_trainer(
        config=without_dropout(tiny_config), batch_candidates=False, max_steps=3, logging_steps=100, queue_size=100
    )
    runs = count_runs(trainer.momentum_state.encoder.model)
    trainer.train()
    # In the first step alone the copy has not moved.
    assert runs == {"vision": 2, "text": 2} and not trainer.momentum_state.encoder.is_copy


def test_weights_that_were_changed_between_two_calls_are_noticed(make_trainer, tiny_config):
    trainer = make_trainer(config=without_dropout(tiny_config), max_steps=2)
    trainer.train()
    encoder = trainer.momentum_state.encoder
    encoder.update_(trainer.model.cots, 0.0)
    assert encoder.is_copy
    with torch.no_grad():
        trainer.model.cots.text_projection.weight.mul_(2)
    trainer._begin_training(trainer.args, trainer.state, trainer.control)
    assert not encoder.is_copy


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_a_resumed_run_shares_what_the_whole_run_shares(make_trainer, tiny_config, tmp_path, momentum):
    arguments = {
        "config": without_dropout(tiny_config),
        "batch_candidates": False,
        "momentum": momentum,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make_trainer(**arguments, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make_trainer(**arguments, output_dir=str(tmp_path / "resumed"))
    checkpoint = shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert whole.momentum_state.encoder.is_copy is resumed.momentum_state.encoder.is_copy is (momentum == 0)
    expected, got = state_of(whole), state_of(resumed)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
