"""Small configurations of every kind of encoder that COTS takes."""

import torch

from modeling_cots import COTSConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT_SIZES = {**SIZES, "vocab_size": 99, "pad_token_id": 0, "max_position_embeddings": 64}
VISION_SIZES = {**SIZES, "image_size": 32, "patch_size": 8}
SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
TEXT_CONFIGS = {
    "bert": TEXT_SIZES,
    "roberta": TEXT_SIZES,
    "electra": {**TEXT_SIZES, "embedding_size": 32},
    "mpnet": TEXT_SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "pad_token_id": 0},
    "modernbert": {**TEXT_SIZES, **SPECIAL_TOKENS},
}
VISION_CONFIGS = {
    "vit": VISION_SIZES,
    "deit": VISION_SIZES,
    "beit": {**VISION_SIZES, "use_mask_token": True},
    "dinov2": VISION_SIZES,
    "dinov2_with_registers": VISION_SIZES,
}


PAIRS_OF_KINDS = [
    ("bert", "vit"),
    ("mpnet", "beit"),
    ("distilbert", "dinov2"),
    ("modernbert", "dinov2_with_registers"),
    ("electra", "deit"),
    ("roberta", "vit"),
]


def masks_of(inputs: dict) -> dict:
    """Every token of `tiny_inputs` masked."""
    return {
        "bool_masked_pos": torch.ones(4, 16, dtype=torch.bool),
        "masked_input_ids": inputs["input_ids"].flip(1),
        "masked_token_pos": inputs["attention_mask"].bool(),
    }


def cots_config(text: str = "bert", vision: str = "vit", **overrides) -> COTSConfig:
    return COTSConfig(
        text_config={"model_type": text, **TEXT_CONFIGS.get(text, {})},
        vision_config={"model_type": vision, **VISION_CONFIGS.get(vision, VISION_SIZES)},
        projection_dim=16,
        image_vocab_size=50,
        **overrides,
    )
