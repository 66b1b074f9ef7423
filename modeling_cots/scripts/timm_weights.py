"""A timm ViT as a transformers `ViTModel`: another starting point for the vision encoder of COTS.

    COTSModel.from_encoders("bert-base-uncased", load_timm_vit("timm/vit_base_patch16_384.augreg_in21k_ft_in1k"))

Both libraries hold the same network (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929) under different names. timm
fetches the weights and resamples the position embeddings; here they are renamed, and the result is compared with
timm's own.
"""

import re
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from transformers import ViTConfig, ViTModel

RENAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.norm1\.", r"layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.(q|k|v)\.", r"layers.\1.attention.\2_proj."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"layers.\1.mlp."),
)
FORWARD_TOLERANCE = 1e-3  # of the largest output: far above rounding, far below what another activation makes


def load_timm_vit(name_or_path: str | Path, image_size: int | None = None, revision: str | None = None) -> ViTModel:
    """
    Load a pre-trained timm ViT as a `ViTModel` without pooler, for `from_encoders`.

    Args:
        name_or_path (`str` or `Path`):
            Hub id (`"timm/vit_base_patch16_384.augreg_in21k_ft_in1k"`), timm model name
            (`"vit_base_patch16_384.augreg_in21k_ft_in1k"`), or folder with `config.json` and `model.safetensors`.
        image_size (`int`, *optional*):
            Side in pixels of the images; timm resamples the position embeddings (bicubic). By default the
            size that the checkpoint was trained at.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub id.

    Returns the model in eval mode; its `last_hidden_state` (B, 1 + patches, hidden size) equals timm's
    `forward_features`. Pixels must be normalized as the timm configuration of the checkpoint says.

    Raises `ValueError` for a folder without those files, a name that timm does not know, and a timm model that is not
    a plain ViT with a [CLS] token. All weights of a checkpoint but the classifier must have a place in ViTModel.
    """
    timm_vit = _create_timm_vit(str(name_or_path), revision)
    if image_size is not None:
        timm_vit.set_input_size(img_size=(image_size, image_size))
    vit = ViTModel(_vit_config(timm_vit), add_pooling_layer=False).eval()
    weights = _rename(_split_qkv(timm_vit.state_dict()))
    _refuse_other_weights(name_or_path, weights, vit.state_dict())
    vit.load_state_dict(weights)
    _refuse_other_arithmetic(name_or_path, timm_vit, vit)
    return vit


def _create_timm_vit(name_or_path: str, revision: str | None) -> VisionTransformer:
    """timm's own model with its weights, in eval mode, without the classifier."""
    if Path(name_or_path).is_dir():
        for file_name in ("config.json", "model.safetensors"):  # without the latter timm would unpickle another file
            if not (Path(name_or_path) / file_name).is_file():
                raise ValueError(f"The folder {name_or_path} has no {file_name}; timm's `save_for_hf` writes both.")
        source = f"local-dir:{name_or_path}"
    else:
        source = f"hf-hub:{name_or_path}" if "/" in name_or_path else name_or_path
        if revision is not None:
            source += f"@{revision}"
    try:
        # With the classifier: for `num_classes=0` timm would load the rest and silently skip missing weights.
        model = timm.create_model(source, pretrained=True).eval()
    except RuntimeError as error:  # an unknown name, one without weights, or weights of another architecture
        raise ValueError(f"timm cannot load {name_or_path}: {error}") from error
    if not isinstance(model, VisionTransformer) or not isinstance(model.blocks[0], Block):
        raise ValueError(f"{name_or_path} is a {type(model).__name__} of timm that is not a plain ViT with [CLS].")
    model.reset_classifier(0)
    return model


def timm_vit_config(name: str, image_size: int) -> ViTConfig:
    """
    The configuration of the model that `load_timm_vit` returns, from the name alone and without fetching anything.

    Raises `ValueError` for a name that timm does not know and for a model that is not a plain ViT.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(name.removeprefix("timm/"), num_classes=0, img_size=image_size)
    except (RuntimeError, TypeError) as error:  # an unknown name, or a model without `img_size`
        raise ValueError(f"timm cannot build {name}: {error}") from error
    if not isinstance(model, VisionTransformer) or not isinstance(model.blocks[0], Block):
        raise ValueError(f"{name} is a {type(model).__name__} of timm that is not a plain ViT with [CLS].")
    return _vit_config(model)


def _vit_config(timm_vit: VisionTransformer) -> ViTConfig:
    block, patch_embed = timm_vit.blocks[0], timm_vit.patch_embed
    return ViTConfig(
        hidden_size=timm_vit.embed_dim,
        num_hidden_layers=len(timm_vit.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc2.in_features,
        layer_norm_eps=block.norm1.eps,
        image_size=_int_if_square(patch_embed.img_size),
        patch_size=_int_if_square(patch_embed.patch_size),
        num_channels=timm_vit.in_chans,
        qkv_bias=block.attn.qkv.bias is not None,
    )


def _int_if_square(sides: tuple[int, int]) -> int | tuple[int, int]:
    return sides[0] if sides[0] == sides[1] else (sides[0], sides[1])


def _split_qkv(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm stacks query, key and value in one matrix (3 * hidden size, hidden size), in this order."""
    split = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            split |= {name.replace("qkv", part): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor
    return split


def _rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _refuse_other_weights(name_or_path, weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Refuse registers, LayerScale, SwiGLU and query-key norms: they add, lack or reshape weights."""
    leftover = [name for name in weights if name not in wanted]
    missing = [name for name in wanted if name not in weights]
    reshaped = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    if leftover or missing or reshaped:
        raise ValueError(
            f"{name_or_path} is not a plain ViT with a [CLS] token. Weights that a ViTModel has no place for: "
            f"{leftover[:3]} ({len(leftover)}); that it lacks: {missing[:3]} ({len(missing)}); of another shape: "
            f"{reshaped[:3]} ({len(reshaped)})."
        )


@torch.no_grad()
def _refuse_other_arithmetic(name_or_path, timm_vit: nn.Module, vit: ViTModel) -> None:
    """Compare features of a random image: another activation or scale does not show in the weights."""
    noise = torch.randn(
        1, timm_vit.in_chans, *timm_vit.patch_embed.img_size, generator=torch.Generator().manual_seed(0)
    )
    expected = timm_vit.forward_features(noise)
    error = (vit(noise).last_hidden_state - expected).abs().max() / expected.abs().max()
    if not error <= FORWARD_TOLERANCE:
        raise ValueError(
            f"{name_or_path} has the weights of a plain ViT but computes something else: its features differ from "
            f"ViTModel's by {error:.1e} of the largest one."
        )
