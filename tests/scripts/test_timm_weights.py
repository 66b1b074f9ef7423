"""timm's ViT as a ViTModel: the same numbers, at any size, or a refusal."""

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from transformers import BertConfig, BertModel

from modeling_cots import COTSForPreTraining, COTSModel
from modeling_cots.scripts.timm_weights import load_timm_vit

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 7}
HUB_ID = "timm/vit_base_patch16_384.augreg_in21k_ft_in1k"


def small_timm_vit(architecture: str = "vit_base_patch16_384", **overrides):
    """A small timm model whose every weight is random: its initialization leaves biases 0 and [CLS] near 0."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **{**SMALL, **overrides}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_timm(model, folder: Path) -> Path:
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def images(size: int, batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def serve_as_hub(monkeypatch, folder: Path) -> list[tuple[str, str]]:
    """Let timm's downloads come from `folder`; returns the list of (repository, file) that will be asked for."""
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename))
        return str(folder / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    "overrides", [{}, {"qkv_bias": False}, {"mlp_ratio": 3.0}, {"patch_size": 16}, {"in_chans": 1}]
)
@torch.no_grad()
def test_local_folder_equals_timm(tmp_path, overrides):
    timm_vit = small_timm_vit(**overrides)
    vit = load_timm_vit(save_timm(timm_vit, tmp_path))
    pixel_values = images(32)[:, : timm_vit.in_chans]
    torch.testing.assert_close(
        vit(pixel_values).last_hidden_state, timm_vit.forward_features(pixel_values), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("image_size", [16, 48, 64])
@torch.no_grad()
def test_another_image_size_equals_timm_loaded_at_that_size(tmp_path, image_size):
    save_timm(small_timm_vit(), tmp_path)
    timm_vit = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=image_size).eval()
    vit = load_timm_vit(tmp_path, image_size=image_size)
    assert vit.config.image_size == image_size
    pixel_values = images(image_size)
    torch.testing.assert_close(
        vit(pixel_values).last_hidden_state, timm_vit.forward_features(pixel_values), atol=1e-4, rtol=0
    )


def test_config_says_what_the_model_is(tmp_path):
    vit = load_timm_vit(save_timm(small_timm_vit(mlp_ratio=2.0, qkv_bias=False), tmp_path))
    config = vit.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (32, 8, 64)
    assert config.layer_norm_eps == 1e-6 and config.qkv_bias is False
    assert vit.pooler is None and vit.embeddings.mask_token is None and not vit.training


def test_hub_id_goes_through_the_hub(tmp_path, monkeypatch):
    asked = serve_as_hub(monkeypatch, save_timm(small_timm_vit(), tmp_path))
    from_hub, from_folder = load_timm_vit(HUB_ID), load_timm_vit(tmp_path)
    assert asked == [(HUB_ID, "config.json"), (HUB_ID, "model.safetensors")]
    torch.testing.assert_close(dict(from_hub.state_dict()), dict(from_folder.state_dict()), atol=0, rtol=0)


def test_bare_name_takes_the_weights_that_timm_names(tmp_path, monkeypatch):
    timm_vit = timm.create_model("test_vit.r160_in1k").eval()
    asked = serve_as_hub(monkeypatch, save_timm(timm_vit, tmp_path))
    vit = load_timm_vit("test_vit.r160_in1k")
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    torch.testing.assert_close(vit.layernorm.bias, timm_vit.norm.bias)
    torch.testing.assert_close(vit.layers[1].mlp.fc1.weight, timm_vit.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"class_token": False, "global_pool": "avg"}, "embeddings.cls_token"),
        ({"reg_tokens": 4}, "reg_token"),
        ({"init_values": 1e-1}, "ls1.gamma"),
        ({"qk_norm": True}, "q_norm.weight"),
        ({"pre_norm": True}, "norm_pre.weight"),
        ({"mlp_layer": timm.layers.SwiGLU}, "fc1_g"),
        ({"mlp_layer": timm.layers.SwiGLUPacked}, "mlp.fc1.weight"),
        ({"no_embed_class": True}, "embeddings.position_embeddings"),
        ({"pos_embed": "none"}, "embeddings.position_embeddings"),
        ({"global_pool": "avg"}, "fc_norm.weight"),
        ({"final_norm": False}, "layernorm.weight"),
        ({"proj_bias": False}, "o_proj.bias"),
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "plain ViT"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "plain ViT"),
        ({"act_layer": "quick_gelu"}, "computes something else"),
    ],
)
def test_other_vits_are_refused_by_name(monkeypatch, overrides, named):
    """What is left over, missing or computed otherwise stands in the message; nothing is dropped in silence."""
    model = small_timm_vit(**overrides, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: model)
    with pytest.raises(ValueError, match=named):
        load_timm_vit("vit_base_patch16_384")


@pytest.mark.parametrize("architecture", ["deit_base_distilled_patch16_384", "test_vit_relpos", "test_resnet"])
def test_other_architectures_are_refused(monkeypatch, architecture):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4} if "deit" in architecture else {}
    model = timm.create_model(architecture, num_classes=0, **sizes)
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: model)
    with pytest.raises(ValueError, match="plain ViT"):
        load_timm_vit(architecture)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no_such_vit"):
        load_timm_vit("no_such_vit")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder_is_refused(tmp_path, missing):
    save_timm(small_timm_vit(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"has no {missing}"):
        load_timm_vit(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    save_for_hf(small_timm_vit(), str(tmp_path), safe_serialization=False)
    assert (tmp_path / "pytorch_model.bin").is_file()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_timm_vit(tmp_path)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path):
    folder = save_timm(small_timm_vit(), tmp_path)
    weights = save_timm(small_timm_vit(depth=2), tmp_path / "other") / "model.safetensors"
    weights.replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match="blocks.2"):
        load_timm_vit(folder)


@pytest.mark.parametrize("model_class", [COTSModel, COTSForPreTraining])
@torch.no_grad()
def test_becomes_the_vision_stream(tmp_path, model_class):
    timm_vit = small_timm_vit()
    text_model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    )
    vit = load_timm_vit(save_timm(timm_vit, tmp_path / "timm"), image_size=48)
    model = model_class.from_encoders(text_model, vit, projection_dim=16).eval()
    reloaded = model_class.from_pretrained(_saved(model, tmp_path / "cots")).eval()
    timm_vit.set_input_size(img_size=(48, 48))
    for cots in (model, reloaded):
        features = cots.base_model.get_image_features(images(48))
        torch.testing.assert_close(
            features.last_hidden_state, timm_vit.forward_features(images(48)), atol=1e-4, rtol=0
        )
        assert features.pooler_output.shape == (2, 16)


def _saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
