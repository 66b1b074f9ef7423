"""Weights in bfloat16: small steps count, a resumed run is exact, and the momentum copy stays float32."""

import copy
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer_states import state_of

from modeling_cots import COTSModel, COTSTrainingArguments
from modeling_cots.scripts.cost import estimate_training_cost
from modeling_cots.training.master_weights import MasterAdam, MasterAdamW


@pytest.mark.parametrize(
    ("ours", "plain"), [(MasterAdamW, torch.optim.AdamW), (MasterAdam, torch.optim.Adam)], ids=["adamw", "adam"]
)
def test_steps_are_those_of_float32_weights_and_are_not_lost(ours, plain):
    """By hand: the same gradients, rounded to bfloat16, for an optimizer of float32 weights."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50).bfloat16())
    master = nn.Parameter(weight.detach().float())
    unused = nn.Parameter(torch.ones(2).bfloat16())
    options = {"lr": 1e-4, "weight_decay": 0.1}
    optimizer, twin = ours([{"params": [weight]}, {"params": [unused]}], **options), plain([master], **options)
    before = weight.detach().clone()
    for step in range(40):
        optimizer.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = 1e-4 * (1 + step % 3)
        weight.grad = torch.randn(50).bfloat16()
        master.grad = weight.grad.float()
        optimizer.step()
        twin.step()
        assert torch.equal(weight.detach(), master.detach().bfloat16())
    assert torch.equal(optimizer.state_dict()["state"][0]["master"], master.detach())
    assert torch.equal(unused.detach(), torch.ones(2).bfloat16())
    assert not torch.equal(weight.detach(), before)


def test_a_state_comes_back_bit_for_bit_and_without_masters_is_refused():
    def make():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(9).bfloat16())
        return weight, MasterAdamW([weight], lr=1e-5)

    weight, optimizer = make()
    other, restored = make()
    for _ in range(3):
        weight.grad = torch.randn(9).bfloat16()
        optimizer.step()
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as from a file
    with torch.no_grad():
        other.copy_(weight)
    for own, each in ((weight, optimizer), (other, restored)):
        own.grad = torch.ones(9).bfloat16()
        each.step()
    assert torch.equal(weight.detach(), other.detach())
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(value, restored.state_dict()["state"][0][name]) and value.dtype == torch.float32, name
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(9))])
    with pytest.raises(ValueError, match="no float32 master weights"):
        restored.load_state_dict(plain.state_dict())


def test_training_has_bfloat16_weights_and_a_float32_copy(make_trainer, tmp_path):
    trainer = make_trainer(param_dtype="bfloat16", max_steps=4)
    dtypes = []
    trainer.momentum_state.encoder.model.vision_model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    trainer.train()
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.momentum_state.encoder.model.parameters()} == {torch.float32}
    assert set(dtypes) == {torch.bfloat16}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    plain = make_trainer(max_steps=4)
    plain.train()
    expected = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=0.02)
    trainer.export_model(str(tmp_path / "export"))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    COTSModel.from_pretrained(tmp_path / "export")


def test_a_resumed_run_is_exact(make_trainer, tmp_path):
    arguments = {"param_dtype": "bfloat16", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**arguments, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make_trainer(**arguments, output_dir=str(tmp_path / "resumed"))
    source = tmp_path / "whole" / "checkpoint-2"
    assert {tensor.dtype for tensor in load_file(source / "model.safetensors").values()} == {torch.bfloat16}
    checkpoint = shutil.copytree(source, tmp_path / "resumed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, got = state_of(whole), state_of(resumed)
    assert expected.keys() == got.keys() and any(name.endswith(".master") for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"param_dtype": "float16"}, "must be float32 or bfloat16"),
        ({"bf16": True}, "beside bf16"),
        ({"optim": "sgd"}, "one of the optimizers"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"freeze_text": "1"}, "beside freeze_text"),
        ({"compile_layers": True}, "beside compile_layers"),
        ({"encoder_learning_rate": 1e-5}, "beside encoder_learning_rate"),
    ],
)
def test_what_was_never_tried_is_refused(tmp_path, options, what):
    with pytest.raises(ValueError, match=what):
        COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{"param_dtype": "bfloat16", **options})


def test_less_memory_of_a_pair_is_counted(tiny_config, tmp_path):
    def count(**options):
        args = COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, queue_size=20, **options)
        return estimate_training_cost(tiny_config, args)

    plain, rounded = count(bf16=True), count(param_dtype="bfloat16")
    assert rounded.bytes_per_pair < 0.9 * plain.bytes_per_pair
    assert asdict(rounded)["flop_per_pair"] == asdict(plain)["flop_per_pair"]
