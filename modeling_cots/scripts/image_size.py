"""Vision encoders at another image size than they were trained at: position embeddings interpolated as they do it.

An encoder interpolates in every forward pass that is given images of another size. Here the same is done once, to the
weights, so that masks, token grid and processor follow from the configuration, and a saved model needs no option.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..configuration_cots import encoder_sides
from ..modeling_cots_pretraining import COTSForPreTraining


@torch.no_grad()
def resize_vision_encoder_(encoder: PreTrainedModel, image_size: int) -> None:
    """
    Make `encoder` one for images of `image_size` x `image_size` pixels, in place: its weights and its configuration.

    Its modules keep the sizes that they were built for: build a new one from `encoder.config`, and copy the weights.

    Raises `ValueError` for an encoder of images that are not square, or with weights of that size of an unknown kind.
    """
    config = encoder.config
    height, width = encoder_sides(config, "image_size")
    if height != width:
        raise ValueError(
            f"This {config.model_type} encoder is for images of {height} x {width}: leave image_size out."
        )
    patch_height, patch_width = encoder_sides(config, "patch_size")
    num_old = (height // patch_height) * (width // patch_width)
    num_new = (image_size // patch_height) * (image_size // patch_width)
    config.image_size = image_size
    for module in encoder.modules():
        if hasattr(module, "interpolate_pos_encoding") and getattr(module, "position_embeddings", None) is not None:
            positions = module.position_embeddings
            others = positions.shape[1] - num_old  # [CLS] and, in some encoders, a distillation token
            tokens = positions.new_empty(1, others + num_new, positions.shape[2])
            resized = module.interpolate_pos_encoding(tokens, image_size, image_size)
            module.position_embeddings = nn.Parameter(resized.clone())
        if hasattr(module, "relative_position_bias_table"):
            table = module.relative_position_bias_table
            grid = image_size // patch_height, image_size // patch_width
            module.relative_position_bias_table = nn.Parameter(_resize_table(table, module.window_size, grid))
    _check_shapes(encoder)


def _resize_table(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """BEiT's biases by offset (offsets + 3, heads) for another grid, as `BeitRelativePositionBias.forward` does it."""
    (rows, columns), size = (2 * side - 1 for side in old), [2 * side - 1 for side in new]
    offsets = table[: rows * columns].reshape(1, columns, rows, -1).permute(0, 3, 1, 2)
    offsets = F.interpolate(offsets, size=size, mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    return torch.cat([offsets, table[rows * columns :]])


def _check_shapes(encoder: PreTrainedModel) -> None:
    with torch.device("meta"):
        wanted = type(encoder)(encoder.config).state_dict()
    for name, tensor in encoder.state_dict().items():
        if name in wanted and tensor.shape != wanted[name].shape:
            raise ValueError(
                f"This {encoder.config.model_type} encoder cannot be resized to {encoder.config.image_size} pixels: "
                f"{name} has the shape {tuple(tensor.shape)} and not {tuple(wanted[name].shape)}."
            )


def resize_model(model: COTSForPreTraining, image_size: int) -> COTSForPreTraining:
    """The same model for images of `image_size` x `image_size` pixels; raises as `resize_vision_encoder_` does."""
    resize_vision_encoder_(model.cots.vision_model, image_size)
    built = COTSForPreTraining(model.config)
    built.load_state_dict(model.state_dict())
    return built
