"""Compiled layers against the layers themselves: outputs, gradients, whole runs, and what stays as it was."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling_cots import COTSForPreTraining, COTSModel, compile_layers
from modeling_cots.training import trainer

# Traces forward and backward and runs them in eager kernels: quick, and all but the code generation of inductor.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model(tiny_config) -> COTSForPreTraining:
    torch.manual_seed(0)
    return COTSForPreTraining(tiny_config).train()


def gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs)
    logits = output.image_token_logits.square().mean() + output.text_token_logits.square().mean()
    (logits + (output.image_embeds * output.text_embeds.flip(0)).sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def is_compiled(model) -> bool:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return all(layer._compiled_call_impl is not None for layer in layers)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # its new name is not in all of 5.x
@pytest.mark.parametrize("checkpointing", [False, True])
def test_changes_no_output_and_no_gradient(model, tiny_masked_inputs, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected, expected_output = gradients(model, tiny_masked_inputs), model(**tiny_masked_inputs)
    compile_layers(model, backend=BACKEND)
    assert is_compiled(model)
    found, output = gradients(model, tiny_masked_inputs), model(**tiny_masked_inputs)
    for name in ("image_embeds", "text_embeds", "image_token_logits", "text_token_logits"):
        torch.testing.assert_close(output[name], expected_output[name], atol=1e-5, rtol=1e-5)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_one_program_serves_all_layers_of_a_stream_and_all_lengths(model, tiny_masked_inputs):
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    counter.frame_count = 0
    for length in (7, 6, 5, 4, 3):
        cut = {
            n: t[:, :length] if n not in ("pixel_values", "bool_masked_pos") else t
            for n, t in tiny_masked_inputs.items()
        }
        model(**cut)
    assert counter.frame_count == 3  # images; texts of 7 tokens; texts of any length


@torch.no_grad()
def test_more_programs_than_torch_allows_by_default(model, tiny_inputs):
    """Modes, streams and shapes make more than 8, of which the later ones would silently not be compiled."""
    counter = CompileCounter()
    compile_layers(model, backend=counter)
    counter.frame_count = 0
    for training, grad in itertools.product((True, False), repeat=2):
        model.train(training)
        with torch.set_grad_enabled(grad):
            model(**tiny_inputs)
    for _ in range(2):
        model(**{name: tensor[:3] for name, tensor in tiny_inputs.items()})
    runs = counter.frame_count
    assert runs > 8
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(**tiny_inputs)
    assert counter.frame_count == runs


def test_names_saving_and_copies_stay_as_they_are(model, tiny_inputs, tmp_path):
    names = list(model.state_dict())
    compile_layers(model, backend=BACKEND)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    reloaded = COTSForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not is_compiled(copy.deepcopy(model)) and is_compiled(model)


@torch.no_grad()
def test_serves_embedding_too_and_every_encoder(tiny_config, tiny_inputs):
    model = COTSModel(tiny_config).eval()
    expected = model(**tiny_inputs)
    compile_layers(model, backend=BACKEND)
    torch.testing.assert_close(model(**tiny_inputs).logits_per_image, expected.logits_per_image, atol=1e-4, rtol=1e-5)
    bert = BertModel(tiny_config.text_config)
    compile_layers(bert, backend=BACKEND)
    assert is_compiled(bert)


def test_a_run_with_compiled_layers_equals_the_plain_one(make_trainer, monkeypatch, tmp_path):
    """Weights, momentum copy and queue after three steps, a checkpoint, and the run resumed from it."""
    monkeypatch.setattr(trainer, "compile_layers", functools.partial(compile_layers, backend=BACKEND))
    saving = {"save_strategy": "steps", "save_steps": 2}
    plain = make_trainer(output_dir=str(tmp_path / "plain"))
    plain.train()
    compiled = make_trainer(output_dir=str(tmp_path / "compiled"), compile_layers=True, **saving)
    assert is_compiled(compiled.model) and is_compiled(compiled.momentum_state)
    compiled.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), compile_layers=True)
    resumed.train(str(tmp_path / "compiled" / "checkpoint-2"))
    for name in ("model", "momentum_state"):
        expected = getattr(plain, name).state_dict()
        assert getattr(compiled, name).state_dict().keys() == expected.keys()
        for key, tensor in getattr(compiled, name).state_dict().items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-4, rtol=1e-4)
            assert torch.equal(tensor, getattr(resumed, name).state_dict()[key])
    compiled.export_model(str(tmp_path / "exported"))
    exported = COTSModel.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(tensor, compiled.model.cots.state_dict()[name]) for name, tensor in exported.items())


def test_refuses_where_nothing_can_be_compiled(model, make_trainer):
    with pytest.raises(ValueError, match="Linear has no layers"):
        compile_layers(nn.Linear(2, 2))

    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    with pytest.raises(ValueError, match="(?s)does not work on cpu here.*no compiler found"):
        compile_layers(model, backend=broken)
    assert not any(module._compiled_call_impl for module in model.modules())
    with pytest.raises(ValueError, match="compile_layers and torch_compile"):
        make_trainer(compile_layers=True, torch_compile=True)


@pytest.mark.slow
def test_generated_code_equals_the_layers(model, tiny_masked_inputs):
    expected = gradients(model, tiny_masked_inputs)
    compile_layers(model)
    found = gradients(model, tiny_masked_inputs)
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )
