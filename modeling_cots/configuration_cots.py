"""Configuration of a COTS model: what its weights need, and nothing about how they were trained.

The training constants of the paper (momentum, queue length, loss weights, filter) are fields of
`COTSTrainingArguments`.
"""

import sys
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# The layers of queries and values in all encoders that COTS may have, by the ends of their names.
ADAPTED_LAYERS = ["query", "value", "q_proj", "v_proj", "query_proj", "value_proj", "q_lin", "v_lin", "q", "v", "Wqkv"]
PAPER_IMAGE_SIZE = 384  # supplement: "ViT-B/16, 384 x 384"; ViTConfig's own default is 224
IMAGE_POOLINGS = "cls", "cls_mean"


@strict
class COTSConfig(PreTrainedConfig):
    r"""
    Configuration of [`COTSModel`] and [`COTSForPreTraining`]. Without arguments: the model of the paper
    (Lu et al., CVPR 2022), BERT-base and ViT-B/16 at 384 x 384, both projected to 256.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the text encoder; any encoder with `last_hidden_state`. A dict without `model_type`
            is a BERT configuration.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the vision encoder; any encoder with a `[CLS]` vector whose `forward` takes
            `bool_masked_pos`. A dict without `model_type` is a ViT configuration, at 384 x 384 unless it says
            otherwise.
        projection_dim (`int`, defaults to 256):
            Length of the image and text embeddings (supplement).
        projection_hidden_size (`int`, *optional*):
            Width of a hidden layer, with GELU, in each projection. By default there is none: projections are linear
            (supplement).
        standardize_features (`bool`, defaults to `False`):
            Whether each dimension of the encoders' global features is centered and divided by its standard deviation
            before the projection. The model carries both numbers as buffers; `COTSTrainer` fits them to its data.
        image_pooling (`str`, defaults to `"cls"`):
            The global image feature: `"cls"`, the output at [CLS] (supplement), or `"cls_mean"`, that and the mean of
            the patches' outputs behind it, twice as long. Encoders that were pre-trained without captions, such as
            DINOv2, hold much of what an image shows in its patches.
        temperature (`float`, defaults to 0.05):
            Similarities are divided by it (supplement). It is fixed, not learned.
        image_vocab_size (`int`, defaults to 8192):
            Number of visual tokens that the masked-image head tells apart: the codes of the DALL-E dVAE.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the normal initialization of the projections and heads.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the masked-text head shares its output matrix with the word embeddings, as in BERT.

    Raises `ValueError` for a temperature or a size that is not positive and for an image size that the patch size
    does not divide.

    ```python
    >>> from modeling_cots import COTSConfig, COTSModel

    >>> config = COTSConfig(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2})
    >>> model = COTSModel(config)
    ```"""

    model_type = "cots"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="vit", init_kwargs={"image_size": PAPER_IMAGE_SIZE}
        ),
    }
    keys_to_ignore_at_inference = ["text_model_output", "vision_model_output"]
    # Whether the package was imported, which registers our pipelines with transformers.
    pipelines_are_registered = False

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    projection_dim: int = 256
    projection_hidden_size: int | None = None
    standardize_features: bool = False
    image_pooling: str = "cls"
    temperature: float | int = 0.05
    image_vocab_size: int = 8192
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.pipelines_are_registered:
            # A repository has this for processes without the package. With it, transformers would ask for
            # `trust_remote_code` and not look into its registry of tasks (tests/test_pipeline_cots.py).
            kwargs.pop("custom_pipelines", None)
        vision_config = self.vision_config
        if isinstance(vision_config, dict) and vision_config.get("model_type", "vit") == "vit":
            # SubConfigSpec applies its init_kwargs only to an absent configuration, not to a partial dict.
            self.vision_config = {"image_size": PAPER_IMAGE_SIZE, **vision_config}
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here a plain ValueError; the strict dataclass wraps what it calls itself

    def to_dict(self) -> dict[str, Any]:
        _name_adapted_layers()
        return super().to_dict()

    def validate_architecture(self):
        """Raise `ValueError` for values that no model can be built from."""
        if not self.temperature > 0:
            raise ValueError(f"`temperature` divides the similarities and must be positive, got {self.temperature}.")
        if self.image_pooling not in IMAGE_POOLINGS:
            raise ValueError(f"`image_pooling` must be one of {', '.join(IMAGE_POOLINGS)}, got {self.image_pooling}.")
        for name in ("projection_dim", "image_vocab_size", "projection_hidden_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for image_side, patch_side in zip(self.image_size, self.patch_size, strict=True):
            if patch_side < 1:
                raise ValueError(f"vision_config.patch_size must be at least 1, got {patch_side}.")
            if image_side < patch_side or image_side % patch_side != 0:
                raise ValueError(
                    f"vision_config.image_size ({image_side}) must be a multiple of vision_config.patch_size "
                    f"({patch_side}), such as {max(1, round(image_side / patch_side)) * patch_side}."
                )

    @property
    def image_feature_size(self) -> int:
        """Length of the global image feature."""
        return (2 if self.image_pooling == "cls_mean" else 1) * self.vision_config.hidden_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return encoder_sides(self.vision_config, "patch_size")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the vision encoder is built for, in pixels."""
        return encoder_sides(self.vision_config, "image_size")


def _name_adapted_layers() -> None:
    """
    Tell peft, where it is in use, which layers an adapter without `target_modules` goes to in a COTS model.

    peft has no way to ask the model: it looks into tables by `model_type`, right after it has called `to_dict` for
    that. Queries and values are its own choice for BERT (tests/training/test_adapters.py).
    """
    tables = vars(sys.modules.get("peft.utils.constants", object)).items()
    for name, table in list(tables):
        if name.startswith("TRANSFORMERS_MODELS_TO_") and table.get("bert") == ["query", "value"]:
            table.setdefault(COTSConfig.model_type, list(ADAPTED_LAYERS))


def encoder_sides(config: PreTrainedConfig, name: str) -> tuple[int, int]:
    """Height and width that an encoder's configuration has as `name`. Raises `ValueError` where it has none."""
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(f"vision_config ({config.model_type}) has no `{name}`; COTS needs a patch-based encoder.")
    return (value, value) if isinstance(value, int) else tuple(value)


__all__ = ["COTSConfig"]
