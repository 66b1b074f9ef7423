"""Building the two encoders from their configurations, and refusing encoders and tokenizers that do not fit.

Encoders are transformers' own. The text encoder needs `input_ids` and `last_hidden_state`. The vision encoder needs a
[CLS] vector (the global image feature of COTS) and `bool_masked_pos` (masked image modeling).
"""

import inspect

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

BFLOAT16_NOTE = "Linear layers run in bfloat16, which this CPU computes faster than float32; {} overrides."


def accepts(function, name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def _build_encoder(config: PreTrainedConfig, **wanted) -> PreTrainedModel:
    """`AutoModel.from_config`, with the `wanted` constructor arguments that the encoder's class has."""
    encoder_class = MODEL_MAPPING.get(type(config), AutoModel)
    if isinstance(encoder_class, (tuple, list)):
        encoder_class = encoder_class[0]
    known = {name: value for name, value in wanted.items() if accepts(encoder_class.__init__, name)}
    return AutoModel.from_config(config, **known)


def build_text_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    encoder = _build_encoder(config, add_pooling_layer=False)
    if config.is_encoder_decoder or not accepts(encoder.forward, "input_ids"):
        raise ValueError(
            f"`{config.model_type}` cannot be the text encoder of COTS, which must take `input_ids` and "
            "return `last_hidden_state`, such as bert, roberta, distilbert or modernbert."
        )
    return encoder


def build_vision_encoder(config: PreTrainedConfig, use_mask_token: bool) -> PreTrainedModel:
    encoder = _build_encoder(config, add_pooling_layer=False, use_mask_token=use_mask_token)
    parameter_names = [name.rpartition(".")[2] for name, _ in encoder.named_parameters()]
    if not accepts(encoder.forward, "bool_masked_pos") or "cls_token" not in parameter_names:
        raise ValueError(
            f"`{config.model_type}` cannot be the vision encoder of COTS, which must have a [CLS] vector "
            "and take `bool_masked_pos`, such as vit, deit, beit or dinov2."
        )
    if use_mask_token and "mask_token" not in parameter_names:
        raise ValueError(
            f"This `{config.model_type}` encoder has no mask token, which masked image modeling needs: "
            "set `use_mask_token=True` in its vision_config."
        )
    return encoder


def max_text_length(encoder: PreTrainedModel) -> int | None:
    """Number of tokens that a text encoder has positions for, or None where its configuration sets no limit."""
    num_positions = getattr(encoder.config, "max_position_embeddings", None)
    if num_positions is None:
        return None
    # RoBERTa and its relatives count positions from the padding id on, so that the first ones are never used.
    tables = [module for name, module in encoder.named_modules() if name.endswith("position_embeddings")]
    unused = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return num_positions - max(unused, default=0)


def check_vocabulary(tokenizer, config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a tokenizer with more tokens than the text encoder of a [`COTSConfig`] has embeddings."""
    num_tokens, vocab_size = len(tokenizer), config.text_config.vocab_size
    if num_tokens > vocab_size:
        raise ValueError(
            f"The tokenizer has {num_tokens} tokens and the text encoder only {vocab_size} embeddings: give the "
            "tokenizer that the encoder was trained with."
        )


def copy_encoder_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Load the weights of a pre-trained encoder. Raises `ValueError` if they do not cover `target`, masks aside."""
    missing, _ = target.load_state_dict(source.state_dict(), strict=False)
    missing = [name for name in missing if not name.endswith("mask_token")]
    if missing:
        raise ValueError(
            f"The checkpoint of {type(source).__name__} lacks {len(missing)} weights of the encoder: {missing[:3]} ..."
        )


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices (AVX512 BF16 or AMX)."""
    # No public function says it, and torch runs bfloat16 everywhere, more slowly than float32 without them.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test is not None and test() for test in tests)


def use_bfloat16_(model: PreTrainedModel) -> None:
    """
    Run the linear layers of both encoders in bfloat16, and everything between them in float32.

    Nearly all of the time goes into linear layers. With a float32 residual stream the embeddings are twice as near
    those of float32 as in bfloat16 throughout. A model that runs so cannot be saved.
    """
    for encoder in (model.text_model, model.vision_model):
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
                module.register_forward_pre_hook(_to_weight_dtype)
    model.has_rounded_weights = True


def _to_weight_dtype(module: nn.Linear, args: tuple) -> tuple:
    return (args[0].to(module.weight.dtype), *args[1:])
