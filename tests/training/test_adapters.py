"""Adapters of peft in pre-training: what trains, what is saved, and that a resumed run and an export are exact."""

import copy

import pytest
import safetensors.torch
import torch
from tiny import TINY_ENCODER, VOCAB_SIZE
from trainer_states import state_of
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_cots import COTSConfig, COTSForPreTraining, COTSModel, COTSTrainer, ScenesDataset, lora_config
from modeling_cots.training.adapters import ADAPTER_WEIGHTS_NAME, check_adapters, has_adapters, pretraining_model_of

peft = pytest.importorskip("peft")
FORMS = ["get_peft_model", "add_adapter", "inject_adapter_in_model"]


def adapted(config, args, form: str = "get_peft_model", seed: int = 0, **options):
    """A model with LoRA, as the trainers of `run` get it."""
    torch.manual_seed(seed)
    model = COTSForPreTraining(config)
    lora = lora_config(args, rank=2, **options)
    if form == "get_peft_model":
        return peft.get_peft_model(model, lora)
    if form == "vera":  # it has matrices that all layers share
        vera = peft.VeraConfig(r=2, target_modules=["query", "value"], modules_to_save=lora.modules_to_save)
        return peft.get_peft_model(model, vera)
    if form == "inject_adapter_in_model":
        return peft.inject_adapter_in_model(lora, model)
    if peft.__version__ < MIN_PEFT_VERSION:
        pytest.skip(
            f"transformers adds adapters with peft {MIN_PEFT_VERSION} or later, and this is {peft.__version__}"
        )
    model.add_adapter(lora)
    return model


@pytest.fixture
def make_adapted(make_trainer):
    """A function that builds a COTSTrainer on a model with LoRA; keywords are arguments of training."""

    def make(form: str = "get_peft_model", seed: int = 0, lora=None, eval_dataset=None, **arguments) -> COTSTrainer:
        plain = make_trainer(eval_dataset=eval_dataset, **arguments)
        return COTSTrainer(
            model=adapted(plain.model.config, plain.args, form, seed, **(lora or {})),
            args=plain.args,
            train_dataset=plain.train_dataset,
            eval_dataset=eval_dataset,
            processing_class=plain.processing_class,
            image_tokenizer=plain.image_tokenizer,
            max_text_length=24,
        )

    return make


def clones(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_train_alone_and_the_momentum_copy_follows_them_alone(make_adapted, form):
    trainer = make_adapted(form, batch_candidates=False, momentum=0.5)
    model, momentum = pretraining_model_of(trainer.model), trainer.momentum_state.encoder.model
    before, slow_before = clones(model.named_parameters()), clones(momentum.named_parameters())
    trainer.train()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    trains = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert moved == trains and any("lora_B" in name for name in moved)
    assert any("text_projection" in name for name in moved) and any("cmvm_head" in name for name in moved)
    of_cots = {name.removeprefix("cots.") for name in trains if name.startswith("cots.")}
    online = dict(model.cots.named_parameters())
    for name, tensor in momentum.named_parameters():
        assert (tensor is not online[name]) == (name in of_cots)
        assert torch.equal(tensor, slow_before[name]) == (name not in of_cots)


@pytest.mark.parametrize("form", [*FORMS, "vera"])
def test_a_resumed_run_equals_the_whole_run(make_adapted, tmp_path, form):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_adapted(form, output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    resumed = make_adapted(form, output_dir=str(tmp_path / "resumed"), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, got = state_of(whole), state_of(resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    saved = safetensors.torch.load_file(tmp_path / "whole" / "checkpoint-2" / ADAPTER_WEIGHTS_NAME)
    momentum = safetensors.torch.load_file(tmp_path / "whole" / "checkpoint-2" / "momentum_state.safetensors")
    assert not any("word_embeddings" in name for name in [*saved, *momentum])
    assert not (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.parametrize("form", [*FORMS, "vera"])
@torch.no_grad()
def test_exports_merged_and_apart_embed_as_the_trained_model(make_adapted, tiny_inputs, tmp_path, form):
    trainer = make_adapted(form, eval_dataset=ScenesDataset("validation", 8, 32), learning_rate=0.05)
    with torch.enable_grad():
        trainer.train()
    trained = pretraining_model_of(trainer.model).cots.eval()
    before = clones(trained.named_parameters())
    expected = trained(**tiny_inputs)
    trainer.export_model(str(tmp_path / "merged"))
    merged, loading = COTSModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    trainer.export_adapters(str(tmp_path / "apart"))
    torch.manual_seed(0)
    base = COTSForPreTraining(trainer.cots_objective.config).cots
    plain = copy.deepcopy(base)
    apart = peft.PeftModel.from_pretrained(base, str(tmp_path / "apart"))
    for model in (merged, apart):
        output = model.eval()(**tiny_inputs)
        torch.testing.assert_close(output.image_embeds, expected.image_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.text_embeds, expected.text_embeds, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.eval()(**tiny_inputs).text_embeds, expected.text_embeds, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.named_parameters())
    assert not any("head" in name for name in safetensors.torch.load_file(tmp_path / "apart" / ADAPTER_WEIGHTS_NAME))


def test_the_best_adapters_are_loaded_at_the_end(make_adapted, tmp_path):
    trainer = make_adapted(
        eval_dataset=ScenesDataset("validation", 8, 32),
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        learning_rate=0.05,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = safetensors.torch.load_file(f"{trainer.state.best_model_checkpoint}/{ADAPTER_WEIGHTS_NAME}")
    trainer.save_model(str(tmp_path / "now"))
    now = safetensors.torch.load_file(tmp_path / "now" / ADAPTER_WEIGHTS_NAME)
    assert all(torch.equal(now[name], tensor) for name, tensor in best.items())
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.metrics["test_recall_sum"] == pytest.approx(trainer.state.best_metric)


def test_what_could_not_be_saved_is_refused(make_adapted, tiny_config):
    trainer = make_adapted()
    with pytest.raises(ValueError, match="got COTSModel"):
        COTSTrainer(
            model=peft.get_peft_model(COTSModel(tiny_config), peft.LoraConfig(target_modules=["query"])),
            args=trainer.args,
            processing_class=trainer.processing_class,
        )
    with pytest.raises(ValueError, match="no adapters to export"):
        plain = copy.copy(trainer)
        plain.model = COTSForPreTraining(tiny_config)
        plain.export_adapters("nowhere")
    model = adapted(tiny_config, trainer.args)
    model.get_base_model().cots.text_model.embeddings.requires_grad_(True)
    with pytest.raises(ValueError, match="word_embeddings.* and 4 more weights .*modules_to_save"):
        check_adapters(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="No weight of the adapters trains"):
        check_adapters(model)
    assert has_adapters(model) and not has_adapters(COTSForPreTraining(tiny_config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, "other frozen weights"),
        ({"lora": {"r": 3}}, "other adapters"),
        ({"lora": {"target_modules": ["query"]}}, "other adapters"),
    ],
)
def test_another_model_does_not_take_the_adapters(make_adapted, tmp_path, arguments, message):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "saved")}
    make_adapted(**saving).train()
    other = make_adapted(max_steps=2, **arguments)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-1"))


def test_a_model_without_adapters_does_not_take_them_and_the_reverse(make_adapted, make_trainer, tmp_path):
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_adapted(**saving, output_dir=str(tmp_path / "adapters")).train()
    make_trainer(**saving, output_dir=str(tmp_path / "whole")).train()
    with pytest.raises(ValueError, match="this model has none"):
        make_trainer(max_steps=2).train(resume_from_checkpoint=str(tmp_path / "adapters" / "checkpoint-1"))
    with pytest.raises(ValueError, match=f"There is no .*{ADAPTER_WEIGHTS_NAME}"):
        make_adapted(max_steps=2).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))


TEXT_ENCODERS = {
    "bert": {},
    "roberta": {},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    "mpnet": {},
}
VISION_ENCODERS = {"vit": {}, "deit": {}, "dinov2": {}, "dinov3_vit": {}, "beit": {"use_mask_token": True}}


@pytest.mark.parametrize(
    ("text", "vision"),
    [*((text, "vit") for text in TEXT_ENCODERS), *(("bert", vision) for vision in VISION_ENCODERS if vision != "vit")],
)
def test_without_target_modules_queries_and_values_of_both_encoders_are_adapted(text, vision):
    config = COTSConfig(
        text_config={
            "model_type": text,
            **TINY_ENCODER,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 40,
            **TEXT_ENCODERS[text],
        },
        vision_config={"model_type": vision, **TINY_ENCODER, "image_size": 32, "patch_size": 8}
        | VISION_ENCODERS[vision],
        projection_dim=16,
        image_vocab_size=50,
    )
    model = COTSForPreTraining(config)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "get_base_layer")]
    # One layer of queries, keys and values together in ModernBERT, else two, in each of two layers.
    of_text = [name for name in adapted if ".text_model." in name]
    assert len(of_text) == (2 if text == "modernbert" else 4), adapted
    assert len(adapted) - len(of_text) == 4, adapted
    assert not any(word in name for name in adapted for word in ("key", "k_", "out", "mlp", "ffn", "head"))
    assert any(weight.requires_grad for weight in wrapped.parameters())


def test_lora_config_trains_whole_what_no_encoder_brings_along(make_trainer):
    trainer = make_trainer()
    everything = lora_config(trainer.args)
    assert everything.r == everything.lora_alpha == 16 and "cmvm_head" in everything.modules_to_save
    trainer.args.cmvm_weight = trainer.args.cmlm_weight = 0
    config = lora_config(trainer.args, rank=4, lora_alpha=8)
    assert config.modules_to_save == {"text_projection", "vision_projection"} or sorted(config.modules_to_save) == [
        "text_projection",
        "vision_projection",
    ]
    assert (config.r, config.lora_alpha) == (4, 8)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        lora_config(trainer.args, rank=0)
