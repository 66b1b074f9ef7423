"""What transformers asks of every model, for COTSModel and COTSForPreTraining: building, saving, loading, outputs,
resizing. Training, attention, precision: `test_modeling_cots_running.py`. What the numbers mean: beside each model."""

import copy

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel

both_models = pytest.mark.parametrize("model_class", [COTSModel, COTSForPreTraining])


@pytest.fixture
def model(tiny_config, model_class) -> PreTrainedModel:
    torch.manual_seed(0)
    return model_class(tiny_config).eval()


@pytest.fixture
def inputs(request, model_class) -> dict[str, torch.Tensor]:
    """Inputs that make each model compute all that it can."""
    if model_class is COTSModel:
        return {**request.getfixturevalue("tiny_inputs"), "return_loss": True}
    return request.getfixturevalue("tiny_masked_inputs")


def assert_same_outputs(first, second, **tolerance):
    first, second = (dict(_flat(output)) for output in (first, second))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def _flat(output, name: str = ""):
    """Every tensor of a nested output, with the place where it stands."""
    if isinstance(output, torch.Tensor):
        yield name, output
    elif output is not None:
        values = output.to_tuple() if isinstance(output, ModelOutput) else output
        for i, value in enumerate(values):
            yield from _flat(value, f"{name}[{i}]")


# Class attributes


@both_models
def test_class_attributes(model_class):
    assert model_class.base_model_prefix == "cots" and model_class.main_input_name == "input_ids"
    assert model_class.config_class is COTSConfig
    assert model_class.supports_gradient_checkpointing
    for feature in ("sdpa", "flash_attn", "flex_attn", "attention_backend"):
        assert getattr(model_class, f"_supports_{feature}")


@both_models
def test_base_model_and_encoders_are_found(model):
    cots = model.base_model
    assert isinstance(cots, COTSModel)
    assert isinstance(cots.text_model, PreTrainedModel) and isinstance(cots.vision_model, PreTrainedModel)
    assert model.get_input_embeddings() is cots.text_model.embeddings.word_embeddings
    replacement = torch.nn.Embedding(99, 32)
    model.set_input_embeddings(replacement)
    assert cots.text_model.embeddings.word_embeddings is replacement


# Initialization


@both_models
def test_initialization_from_the_meta_device_is_the_same(tiny_config, model_class, monkeypatch):
    """`from_pretrained` builds on the meta device and leaves garbage wherever `_init_weights` fills nothing in."""
    initialize = PreTrainedModel._initialize_weights

    def seeded_initialize(*args, **kwargs):
        torch.manual_seed(0)
        initialize(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded_initialize)
    built = model_class(copy.deepcopy(tiny_config))
    from_meta = model_class.from_pretrained(None, config=copy.deepcopy(tiny_config), state_dict={})
    for tensors in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(built, tensors)()), dict(getattr(from_meta, tensors)())
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), name


@both_models
def test_initializer_range_reaches_our_own_layers(tiny_config, model_class):
    tiny_config.initializer_range = 0.37
    torch.manual_seed(0)
    model = model_class(tiny_config)
    for name, module in model.named_modules():
        ours = isinstance(module, torch.nn.Linear) and "text_model" not in name and "vision_model" not in name
        if ours and module is not model.get_output_embeddings():
            assert module.weight.std().item() == pytest.approx(0.37, rel=0.15), name
            assert not module.bias.any(), name


@both_models
def test_every_tensor_is_a_parameter_or_a_buffer(model):
    for name, module in model.named_modules():
        stray = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert not stray, (name, stray)


# Saving and loading


@both_models
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_round_trip(tiny_config, inputs, tmp_path, model_class, tied):
    tiny_config.tie_word_embeddings = tied
    model = model_class(tiny_config).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "model.safetensors").is_file()
    reloaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_outputs(reloaded.eval()(**inputs), model(**inputs), atol=0, rtol=0)


@both_models
@torch.no_grad()
def test_from_a_state_dict_without_files(model, inputs):
    reloaded = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict()).eval()
    assert_same_outputs(reloaded(**inputs), model(**inputs), atol=0, rtol=0)


@both_models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip_in_half_precision(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    for requested, expected in (("auto", dtype), (dtype, dtype), (torch.float32, torch.float32)):
        reloaded = type(model).from_pretrained(tmp_path, dtype=requested)
        assert {parameter.dtype for parameter in reloaded.parameters()} == {expected}
        for name, tensor in reloaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name].to(expected)), name


@both_models
def test_missing_weights_are_all_reported(model, tmp_path):
    model.save_pretrained(tmp_path, state_dict={"nothing": torch.zeros(1)})
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(model.state_dict())


# Outputs


@both_models
@torch.no_grad()
def test_tuples_hold_the_same_values(model, inputs):
    as_output = model(**inputs, output_hidden_states=True)
    assert isinstance(as_output, ModelOutput)
    by_keyword = model(**inputs, output_hidden_states=True, return_dict=False)
    model.config.return_dict = False
    by_config = model(**inputs, output_hidden_states=True)
    for as_tuple in (by_keyword, by_config):
        assert isinstance(as_tuple, tuple) and not any(isinstance(value, ModelOutput) for value in as_tuple)
        assert_same_outputs(as_tuple, as_output, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["get_text_features", "get_image_features"])
@torch.no_grad()
def test_feature_methods_return_tuples_on_request(tiny_config, tiny_inputs, method):
    model = COTSModel(tiny_config).eval()
    argument = tiny_inputs["input_ids" if "text" in method else "pixel_values"]
    features = getattr(model, method)(argument, output_hidden_states=True)
    assert list(features.keys()) == ["last_hidden_state", "pooler_output", "hidden_states"]
    assert features.last_hidden_state.shape[-1] == 32 and features.pooler_output.shape == (4, 16)
    as_tuple = getattr(model, method)(argument, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same_outputs(as_tuple, features, atol=0, rtol=0)


def _request(config: COTSConfig, how: str) -> dict[str, bool]:
    """Ask for hidden states and attentions by keyword, on the configuration, or on those of the encoders."""
    if how == "keyword":
        return {"output_hidden_states": True, "output_attentions": True}
    for asked in [config] if how == "config" else [config.text_config, config.vision_config]:
        asked.output_hidden_states = True
        asked.output_attentions = True
    return {}


@both_models
@pytest.mark.parametrize("how", ["keyword", "config", "sub-configs"])
@torch.no_grad()
def test_hidden_states_and_attentions(tiny_config, inputs, model_class, how):
    model = model_class._from_config(tiny_config, attn_implementation="eager").eval()
    output = model(**inputs, **_request(model.config, how))
    for encoder, length in ((output.text_model_output, 7), (output.vision_model_output, 17)):
        assert [tuple(states.shape) for states in encoder.hidden_states] == [(4, length, 32)] * 3
        assert [tuple(weights.shape) for weights in encoder.attentions] == [(4, 4, length, length)] * 2
        torch.testing.assert_close(encoder.attentions[1].sum(-1), torch.ones(4, 4, length))
    attended_padding = output.text_model_output.attentions[0][3, :, :, 2:]
    assert not attended_padding.any()


@both_models
@torch.no_grad()
def test_hidden_states_of_some_layers(model, inputs):
    everything, some = (model(**inputs, output_hidden_states=asked) for asked in (True, [0, 2]))
    for encoder in ("text_model_output", "vision_model_output"):
        expected, found = everything[encoder].hidden_states, some[encoder].hidden_states
        assert found[1] is None and torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])


def test_hidden_states_and_attentions_keep_their_gradient(tiny_config, tiny_inputs):
    """Relevance maps differentiate with respect to the attentions."""
    model = COTSModel._from_config(tiny_config, attn_implementation="eager")
    output = model(**tiny_inputs, output_attentions=True, output_hidden_states=True)
    kept = [
        getattr(encoder, name)[0]
        for encoder in (output.text_model_output, output.vision_model_output)
        for name in ("hidden_states", "attentions")
    ]
    for tensor in kept:
        tensor.retain_grad()
    output.logits_per_image[0, 0].backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


@pytest.mark.parametrize("how", ["keyword", "config", "sub-configs"])
def test_layers_of_pre_training_keep_their_gradient(tiny_config, tiny_masked_inputs, how):
    """On both sides, whether the masked pass runs beside the unmasked one or not."""
    model = COTSForPreTraining._from_config(tiny_config, attn_implementation="eager")
    output = model(**tiny_masked_inputs, **_request(model.config, how))
    for encoder, embeds in (("vision_model_output", "image_embeds"), ("text_model_output", "text_embeds")):
        kept = [output[encoder].hidden_states[0], output[encoder].attentions[0]]
        for tensor in kept:
            tensor.retain_grad()
        output[embeds].flatten()[0].backward(retain_graph=True)
        assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


# Vocabulary


@both_models
@pytest.mark.parametrize(("new_size", "multiple", "expected"), [(110, None, 110), (50, None, 50), (100, 64, 128)])
def test_resizing_the_vocabulary(model, inputs, new_size, multiple, expected):
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(new_size, pad_to_multiple_of=multiple)
    after = model.get_input_embeddings().weight
    assert after.shape == (expected, 32) and model.config.text_config.vocab_size == expected
    kept = min(99, expected)
    assert torch.equal(after[:kept], before[:kept])
    for name in ("input_ids", "masked_input_ids"):
        if name in inputs:
            inputs[name] = inputs[name].clamp(max=expected - 1)
    output = model(**inputs)
    if isinstance(model, COTSForPreTraining):
        assert output.text_token_logits.shape[-1] == expected
        assert model.get_output_embeddings().weight is after
