"""Activations that are computed again: equal gradients and runs, bit for bit, no product twice, and less memory."""

import pytest
import torch
from encoder_kinds import PAIRS_OF_KINDS, SIZES, TEXT_CONFIGS, VISION_CONFIGS, cots_config, masks_of
from torch import nn
from trainer_states import state_of

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, compile_layers, lora_config
from modeling_cots.scripts.cost import flop_counter, kept_bytes
from modeling_cots.training.layer_compiling import encoder_layers
from modeling_cots.training.recomputed_activations import IS_SEEN, recompute_activations_

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# Each kind of encoder has its own names of the same things, and ignores or refuses others.
OWN_DROPOUT = {
    "distilbert": {"dropout": 0.1, "attention_dropout": 0.1},
    "modernbert": {"attention_dropout": 0.1, "mlp_dropout": 0.1, "embedding_dropout": 0.1},
    "beit": {**DROPOUT, "drop_path_rate": 0.2},
    "dinov2": {**DROPOUT, "drop_path_rate": 0.2},
    "dinov2_with_registers": {**DROPOUT, "drop_path_rate": 0.2},
}


def with_dropout(text: str, vision: str) -> COTSConfig:
    """A configuration of two kinds of encoders, which draw random numbers wherever they can."""
    return COTSConfig(
        text_config={"model_type": text, **TEXT_CONFIGS[text], **OWN_DROPOUT.get(text, DROPOUT)},
        vision_config={"model_type": vision, **VISION_CONFIGS[vision], **OWN_DROPOUT.get(vision, DROPOUT)},
        projection_dim=16,
        image_vocab_size=50,
    )


def build(config: COTSConfig, attention: str = "sdpa") -> COTSForPreTraining:
    torch.manual_seed(0)
    model = COTSForPreTraining(config).train()
    model.set_attn_implementation(attention)
    return model


def gradients(model: COTSForPreTraining, inputs: dict, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Those of something that every output has a part in; random numbers are the same in every call."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs)
        logits = output.image_token_logits.square().mean() + output.text_token_logits.square().mean()
        loss = logits + (output.image_embeds * output.text_embeds.flip(0)).sum()
    torch.rand(3)  # as anything else between forward and backward pass may draw
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("text", "vision"), PAIRS_OF_KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_changes_no_gradient_of_any_kind_of_encoder(tiny_inputs, text, vision, autocast):
    inputs = {**tiny_inputs, **masks_of(tiny_inputs)}
    model = build(with_dropout(text, vision))
    expected = gradients(model, inputs, autocast)
    assert any(not torch.equal(gradients(model.eval(), inputs, autocast)[name], expected[name]) for name in expected)
    recompute_activations_(model.train())
    assert_equal(gradients(model, inputs, autocast), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [False, True])
def test_no_product_is_computed_again(tiny_inputs, attention, dropout):
    inputs = {**tiny_inputs, **masks_of(tiny_inputs)}
    model = build(with_dropout("bert", "vit") if dropout else cots_config(), attention)
    counts, found = [], []
    for _ in range(2):
        with flop_counter() as counter:
            found.append(gradients(model, inputs))
        counts.append(counter.get_total_flops())
        recompute_activations_(model)
    assert_equal(found[1], found[0])
    assert counts[0] == counts[1] > 0


def test_attention_that_draws_is_computed_again_with_the_same_numbers():
    """On a GPU it is one operation, which draws by itself; here one that does so stands for it."""
    from modeling_cots.training.recomputed_activations import _choose

    for op in ("flash", "efficient", "cudnn"):
        attention = getattr(torch.ops.aten, f"_scaled_dot_product_{op}_attention").default
        names = [argument.name for argument in attention._schema.arguments]
        for dropout, name in ((0.0, "MUST_SAVE"), (0.1, "PREFER_RECOMPUTE")):
            positional = [dropout if each == "dropout_p" else None for each in names]
            assert _choose(None, attention, *positional).name == name
            assert _choose(None, attention, dropout_p=dropout).name == name
        assert _choose(None, attention).name == "MUST_SAVE"


@pytest.mark.skipif(not IS_SEEN, reason="this torch does not tell what it keeps")
def test_a_layer_keeps_12_of_20_units(tiny_inputs):
    """A unit is 16 bits of each number between two layers, which have 32 themselves (docs/performance.md)."""
    batch, tokens, width = 4, 1 + (32 // 8) ** 2, SIZES["hidden_size"]
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for recompute, kept in sizes.items():
        for num_layers in (2, 4):
            config = cots_config()
            config.vision_config.num_hidden_layers, config.vision_config.intermediate_size = num_layers, 4 * width
            model = build(config)
            if recompute:
                recompute_activations_(model)
            with torch.autocast("cpu", torch.bfloat16):
                kept.append(kept_bytes(lambda m=model: m.cots.vision_model(tiny_inputs["pixel_values"]), model))
    units = {key: (kept[1] - kept[0]) / 2 / (2 * batch * tokens * width) for key, kept in sizes.items()}
    statistics = 2 * 4 * 2 / 2 / width  # two numbers of each of two normalizations, and one of each of 4 heads
    casts = 12 * width**2 / (batch * tokens * width)  # of the weights, which are cast again too
    assert units[False] == pytest.approx(20 + 2 * statistics + casts)
    assert units[True] == pytest.approx(12 + statistics)


RUNS: list[dict] = [
    {},
    {"bf16": True},
    {"param_dtype": "bfloat16"},
    {"freeze_vision": "1", "freeze_text": "1"},
    {"batch_candidates": False, "gradient_accumulation_steps": 2},
    {"momentum": 0.0},  # the momentum pass is taken from the online one
]


@pytest.mark.parametrize("arguments", RUNS, ids=str)
def test_a_run_is_the_same(make_trainer, arguments):
    states = []
    for recompute in (False, True):
        trainer = make_trainer(with_dropout("bert", "vit"), recompute_activations=recompute, **arguments)
        layers = encoder_layers(trainer.model)
        assert len(layers) == 4 and all(layer.gradient_checkpointing is recompute for layer in layers)
        trainer.train()
        states.append(state_of(trainer))
    assert_equal(states[1], states[0])


def test_a_run_with_adapters_is_the_same(make_trainer):
    peft = pytest.importorskip("peft")
    states = []
    for recompute in (False, True):
        plain = make_trainer(recompute_activations=recompute)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(plain.model, lora_config(plain.args, rank=2, lora_dropout=0.1))
        trainer = COTSTrainer(
            model=adapted,
            args=plain.args,
            train_dataset=plain.train_dataset,
            processing_class=plain.processing_class,
            image_tokenizer=plain.image_tokenizer,
            max_text_length=24,
        )
        trainer.train()
        states.append(trainer.model.state_dict())
    assert_equal(states[1], states[0])


def test_compiled_layers_compute_the_same(tiny_config, tiny_inputs):
    torch.compiler.reset()
    inputs = {**tiny_inputs, **masks_of(tiny_inputs)}
    model = build(tiny_config)
    expected = gradients(model, inputs)
    recompute_activations_(model)
    compile_layers(model, backend="aot_eager")
    found = gradients(model, inputs)
    torch.compiler.reset()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_does_not_go_together_with(make_trainer):
    with pytest.raises(ValueError, match="Linear has no layers"):
        recompute_activations_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="two ways to save the same memory"):
        make_trainer(recompute_activations=True, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="torch_compile chooses by itself"):
        make_trainer(recompute_activations=True, torch_compile=True)
