"""COTSModel and COTSForPreTraining at work: gradients, checkpointing, learning, attention, precision, compilation."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from modeling_cots import COTSForPreTraining, COTSModel
from modeling_cots.modeling_cots import image_text_contrastive_loss

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


def total_loss(output: ModelOutput) -> torch.Tensor:
    """The model's own loss, or one that all encoders and heads of `COTSForPreTraining` take part in."""
    if output.get("loss") is not None:
        return output.loss
    loss = image_text_contrastive_loss(output.image_embeds @ output.text_embeds.t() / 0.1)
    for logits in (output.image_token_logits, output.text_token_logits):
        loss = loss + cross_entropy(logits, torch.arange(len(logits)) % 20)
    return loss


def gradients(model: PreTrainedModel, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total_loss(model(**inputs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Training


@both_models
def test_every_parameter_gets_a_gradient(model, inputs):
    found = gradients(model, inputs)
    assert [name for name, gradient in found.items() if gradient is None] == []
    # A bias of the keys shifts all scores of a query alike, which softmax does not see: zero but for rounding.
    zero = [name for name, gradient in found.items() if not gradient.any()]
    assert [name for name in zero if "key.bias" not in name and "k_proj.bias" not in name] == []


@both_models
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # the new name is not in all of 5.x
@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_gradient(model, inputs, arguments):
    model.train()
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable(arguments)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(layers) == 4 and all(layer.gradient_checkpointing for layer in layers)
    runs = []
    layers[0].attention.self.register_forward_hook(lambda *args: runs.append(1))
    found = gradients(model, inputs)
    assert len(runs) == 2  # once forward and once more backward
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
    model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in layers)


@both_models
def test_it_learns_four_pairs(model, inputs):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses, norms = [], []
    for _ in range(300):
        optimizer.zero_grad()
        loss = total_loss(model(**inputs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    assert losses[-1] < 0.1 * losses[0] and norms[-1] < 0.1 * norms[0]


# Attention


@both_models
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 1e-1)]
)
@torch.no_grad()
def test_eager_equals_sdpa(model, inputs, side, dtype, tolerance):
    masks = {
        "none": torch.ones(4, 7).long(),
        "right": inputs["attention_mask"],
        "left": inputs["attention_mask"].flip(1),
    }
    inputs = {**inputs, "attention_mask": masks[side], "pixel_values": inputs["pixel_values"].to(dtype)}
    model.to(dtype).set_attn_implementation("sdpa")
    sdpa = model(**inputs)
    model.set_attn_implementation("eager")
    eager = model(**inputs)
    for name in {"image_embeds", "text_embeds", "image_token_logits", "text_token_logits"} & eager.keys():
        torch.testing.assert_close(eager[name], sdpa[name], atol=tolerance, rtol=0)


@both_models
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_flex_attention_equals_sdpa(model, inputs, side):
    """Not compiled, for which a CPU takes minutes: the same masks and scores, computed without a fused kernel."""
    if side == "left":
        inputs = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    model.set_attn_implementation("sdpa")
    sdpa = model(**inputs)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        flex = model(**inputs)
    for name in {"image_embeds", "text_embeds", "image_token_logits", "text_token_logits"} & flex.keys():
        torch.testing.assert_close(flex[name], sdpa[name], atol=1e-5, rtol=0)


@both_models
def test_attention_can_be_switched_as_a_whole_and_by_encoder(model):
    def implementations() -> tuple[str, str]:
        return model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation

    model.set_attn_implementation("eager")
    assert implementations() == ("eager", "eager")
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    assert implementations() == ("sdpa", "eager")
    model.set_attn_implementation({"": "sdpa", "vision_config": "sdpa"})
    assert implementations() == ("sdpa", "sdpa") and model.config._attn_implementation == "sdpa"
    attention = model.base_model.vision_model.layers[0].attention
    assert attention.config is model.config.vision_config


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_is_chosen_at_loading(tiny_config, tmp_path, implementation):
    COTSModel(tiny_config).save_pretrained(tmp_path)
    model = COTSModel.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.text_model.config._attn_implementation == implementation
    assert model.vision_model.config._attn_implementation == implementation


# Precision and compilation


@both_models
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_embeddings_are_float32_of_unit_length(model, inputs, dtype):
    expected = model(**inputs)
    output = model.to(dtype)(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
    for name in ("image_embeds", "text_embeds"):
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name].norm(dim=-1), torch.ones(4))
        torch.testing.assert_close(output[name], expected[name], atol=5e-2, rtol=0)
    if isinstance(model, COTSModel):
        assert output.logits_per_image.dtype == output.loss.dtype == torch.float32


@both_models
@torch.no_grad()
def test_autocast_keeps_similarities_in_float32(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    torch.testing.assert_close(output.image_embeds.norm(dim=-1), torch.ones(4))
    assert output.image_embeds.dtype == output.text_embeds.dtype == torch.float32
    if isinstance(model, COTSModel):
        exact = output.image_embeds @ output.text_embeds.t() / model.config.temperature
        assert torch.equal(output.logits_per_image, exact)


@both_models
def test_compiles_as_one_graph(model, inputs):
    """Masked positions make shapes depend on data: for those the graph may break, without them never."""
    inputs = {name: value for name, value in inputs.items() if "masked" not in name}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        output, expected = compiled(**inputs), model(**inputs)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.text_embeds, expected.text_embeds, atol=1e-5, rtol=1e-5)
