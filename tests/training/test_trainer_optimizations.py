"""What makes a step fast or small against the plain way: fused optimizer, checkpointed layers, half precision."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import is_torch_greater_or_equal

from modeling_cots import COTSTrainingArguments


def train(make_trainer, **arguments):
    trainer = make_trainer(**arguments)
    trainer.train()
    return trainer


def assert_same_state(one, other, tolerance: float) -> None:
    for name in ("model", "momentum_state"):
        expected, found = (getattr(trainer, name).state_dict() for trainer in (one, other))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], atol=tolerance, rtol=0)


def test_the_fused_optimizer_is_the_default_and_equals_the_plain_one(make_trainer, tmp_path):
    default = COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim
    assert default == ("adamw_torch_fused" if is_torch_greater_or_equal("2.8", accept_dev=True) else "adamw_torch")
    # A gradient that is zero but for rounding (of key biases) must not become a step by being divided by itself.
    arguments = {"max_steps": 6, "learning_rate": 1e-4, "adam_epsilon": 1e-4}
    fused = train(make_trainer, **arguments, optim="adamw_torch_fused")
    plain = train(make_trainer, **arguments, optim="adamw_torch")
    kinds = [trainer.optimizer.param_groups[0]["fused"] for trainer in (fused, plain)]
    assert kinds == [True, None]
    assert_same_state(plain, fused, tolerance=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # its new name is not in all of 5.x
def test_checkpointed_layers_change_no_loss(make_trainer):
    plain = train(make_trainer)
    checkpointed = train(make_trainer, gradient_checkpointing=True)
    layers = [module for module in checkpointed.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 4 and all(layer.gradient_checkpointing for layer in layers)
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (plain, checkpointed)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3
    assert_same_state(plain, checkpointed, tolerance=1e-6)


@pytest.mark.parametrize(("arguments", "dtype"), [({"bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_the_momentum_encoders_run_in_the_precision_of_the_training(make_trainer, arguments, dtype):
    """Inside their layers; weights, embeddings and what the queue holds are float32 in any case."""
    trainer = make_trainer(**arguments)
    momentum_model, dtypes = trainer.momentum_state.encoder.model, set()
    for stream in (momentum_model.vision_model, momentum_model.text_model):
        for name, module in stream.named_modules():
            if isinstance(module, torch.nn.Linear) and name:
                module.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    embeds = []
    momentum_model.vision_projection.register_forward_hook(lambda module, args, output: embeds.append(output.dtype))
    trainer.train()
    assert dtypes == {dtype} and set(embeds) == {dtype}
    assert {parameter.dtype for parameter in momentum_model.parameters()} == {torch.float32}
    assert trainer.queue.image_embeds.dtype == torch.float32


def test_momentum_embeddings_in_half_precision_are_those_of_full_precision_but_for_rounding(make_trainer):
    halves, wholes = make_trainer(bf16=True), make_trainer()
    wholes.momentum_state.load_state_dict(halves.momentum_state.state_dict())
    items = [halves.train_dataset[index] for index in range(8)]
    batch = halves._prepare_inputs(halves.data_collator(items))
    for half, whole in zip(
        halves.cots_objective.momentum_encode(batch), wholes.cots_objective.momentum_encode(batch), strict=True
    ):
        assert not torch.equal(half.float(), whole)
        # bfloat16 has eight bits: two layers deep, a unit vector keeps its direction to a thousandth.
        assert (torch.cosine_similarity(half.float(), whole) > 0.999).all()


def test_image_tokens_are_made_before_the_model_fills_the_memory(make_trainer):
    trainer, calls = make_trainer(max_steps=1), []
    for name, module in (("image tokenizer", trainer.image_tokenizer), ("model", trainer.model)):
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    trainer.train()
    assert calls == ["image tokenizer", "model"]


class WaitsForDevice(TorchDispatchMode):
    """Counts the operations at which the host would have to wait for an accelerator, as what follows needs a value."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [index for index in args[1] or () if index is not None] if name in ("index", "index_put_") else ()
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or any(i.dtype == torch.bool for i in masks):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_the_host_seldom_waits_for_the_device_in_a_step(make_trainer, monkeypatch):
    """Once a list of masked positions, in the model and in the loss, and for the readable pairs; no `.item()` of ours.

    The other two are transformers': each text encoder looks whether there is any padding, so as to do without a mask.
    """
    trainer = make_trainer()
    trainer.train()
    items = [trainer.train_dataset[index] for index in range(8)]
    batch = trainer._prepare_inputs(trainer.data_collator(items))
    trainer.model.train()
    trainer.momentum_state.encoder.is_copy = False  # else the momentum encoders do not run
    monkeypatch.setattr(trainer, "encoders_by_length", [])  # captions run by length on a CPU alone
    with WaitsForDevice() as waits:
        trainer.compute_loss(trainer.model, batch).backward()
        trainer.momentum_state.encoder.update_(trainer.model.cots, 0.99)
    assert sorted(waits.names) == 2 * ["_local_scalar_dense"] + 2 * ["index"] + 3 * ["nonzero"]
