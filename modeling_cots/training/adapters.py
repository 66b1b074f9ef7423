"""Adapters of peft, such as LoRA, in pre-training: few weights train, and they alone are saved.

[`COTSTrainer`] takes a [`COTSForPreTraining`] with adapters in either form: wrapped by `peft.get_peft_model`, or with
`model.add_adapter`. A checkpoint then holds the adapters in place of the model; the momentum copy, the weights that
train. Merging is in `hub_export.py`, as an export of any COTS model does it.
"""

import copy
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import nn

from .arguments import COTSTrainingArguments
from .frozen_layers import ALL

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"  # peft's
BASE_CHECKSUM = "frozen_weights_checksum"
PREFIX = "base_model.model."  # of all names in a file of peft


def lora_config(args: COTSTrainingArguments, rank: int = 16, **options) -> "LoraConfig":
    """
    The configuration of LoRA for pre-training: all that a pair of pre-trained encoders needs to become a COTS model.

    LoRA goes to the queries and values of every attention layer of both encoders. The projections and the heads of
    the losses in use, which no encoder brings along, train whole.

    Args:
        args ([`COTSTrainingArguments`]): The weights of the losses say which heads there is something to learn for.
        rank: Of the factors; their product is scaled by `lora_alpha` / rank, which is 1 unless an option sets it.
        options: Others of `peft.LoraConfig`, which win.

    Raises `ValueError` where peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('LoRA needs peft: pip install "modeling_cots[lora]".') from error
    if rank < 1:
        raise ValueError(f"The rank of LoRA must be at least 1, got {rank}.")
    modules = ["text_projection", "vision_projection"]
    if args.cmvm_weight > 0:
        modules += ["text_to_image", "cmvm_head"]
    if args.cmlm_weight > 0:
        modules += ["image_to_text", "cmlm_head.0"]  # the output matrix after it is that of the word embeddings
    return LoraConfig(**{"r": rank, "lora_alpha": rank, "modules_to_save": modules, **options})


def with_lora(model: nn.Module, args: COTSTrainingArguments, rank: int) -> "PeftModel":
    """
    A [`COTSForPreTraining`] with LoRA, by `lora_config`.

    Raises `ValueError` as that does, and for an encoder that is frozen whole, whose LoRA would not train either.
    """
    for name in ("freeze_vision", "freeze_text"):
        if getattr(args, name) == ALL:
            raise ValueError(
                f"LoRA of rank {rank} trains in both encoders, and {name} is {ALL}: leave one of them out."
            )
    config = lora_config(args, rank)
    from peft import get_peft_model

    return get_peft_model(model, config)


def pretraining_model_of(model: nn.Module) -> nn.Module:
    """
    The model itself, or the one that a `PeftModel` wraps. Raises `ValueError` without one, as after a search, whose
    trials leave none in the trainer.
    """
    if model is None:
        raise ValueError(
            "A search leaves no model in its trainer: set the best values in args and call train() first."
        )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_adapters(model: nn.Module) -> bool:
    """Whether there are adapters of peft in a model, in either form."""
    return bool(getattr(model, "peft_config", None))


def check_adapters(model: nn.Module) -> None:
    """
    Raise `ValueError` for adapters that could not be trained, or not be saved whole.

    Whatever trains must be part of an adapter's file: a checkpoint has no other weights.
    """
    if not has_adapters(model):
        return
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("COTS has no prompts to learn: use an adapter of layers, such as LoRA.")
    saved = {tensor.data_ptr() for name in model.peft_config for tensor in _weights(model, name).values()}
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    lost = [name.removeprefix(PREFIX) for name, weight in trained if weight.data_ptr() not in saved]
    if lost:
        raise ValueError(
            f"{lost[0]} and {len(lost) - 1} more weights train and belong to no adapter, so that no checkpoint would "
            "hold them: name their modules in modules_to_save, or freeze them."
        )
    if not trained:
        raise ValueError("No weight of the adapters trains: activate one with set_adapter.")


def save_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write every adapter as peft does, "default" into the folder and others into folders of their names."""
    checksum = str(_frozen_checksum(model))
    for name, config in model.peft_config.items():
        _write(_weights(model, name), config, _folder_of(name, folder), {BASE_CHECKSUM: checksum})


def load_adapters_(model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Load what `save_adapters` wrote. Raises `ValueError` where a file is missing, damaged, of other adapters, or was
    trained on other frozen weights.
    """
    from peft import set_peft_model_state_dict

    for name in model.peft_config:
        path = _folder_of(name, folder) / ADAPTER_WEIGHTS_NAME
        if not path.is_file():
            raise ValueError(
                f"There is no {path}: resume the adapter {name!r} from a checkpoint that was saved with it."
            )
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                checksum = (file.metadata() or {}).get(BASE_CHECKSUM)
            weights = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        own = {key: tensor.shape for key, tensor in _weights(model, name).items()}
        if own != {key: tensor.shape for key, tensor in weights.items()}:
            raise ValueError(f"{path} holds other adapters than the model: make them with the same configuration.")
        if checksum is not None and checksum != str(_frozen_checksum(model)):
            raise ValueError(
                f"{path} was trained on other frozen weights than those of this model: load the same encoders, and "
                "make what they do not bring along with the same seed."
            )
        if pretraining_model_of(model) is model:  # not wrapped: its names have no prefix
            weights = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
        set_peft_model_state_dict(model, weights, adapter_name=name)


def export_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """
    Write the active adapter of a [`COTSForPreTraining`] so that it fits the [`COTSModel`] in it, without heads.

    `PeftModel.from_pretrained(cots_model, folder)` puts both together again.
    """
    cots = pretraining_model_of(model).cots
    layers = {key: module for key, module in cots.named_modules() if hasattr(module, "get_base_layer")}
    name = next(iter(layers.values())).active_adapters[0]
    inside = f"{PREFIX}cots."
    weights = {
        PREFIX + key.removeprefix(inside) if key.startswith(inside) else key: tensor
        for key, tensor in _weights(model, name).items()
        # Of no layer are those that layers share, such as VeRA's.
        if key.startswith(inside) or not key.startswith(PREFIX)
    }
    config = copy.deepcopy(model.peft_config[name])
    config.target_modules = set(layers)
    config.modules_to_save = [
        module for module in config.modules_to_save or [] if any(f".{module}." in f"{key}." for key in weights)
    ] or None
    _write(weights, config, Path(folder), {})


def _weights(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """The weights of an adapter, by the names that peft gives them in a file."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if pretraining_model_of(model) is model:  # not wrapped: peft's names have no prefix
        return {PREFIX + name: tensor for name, tensor in weights.items()}
    return weights


def _folder_of(adapter: str, folder: str | os.PathLike) -> Path:
    return Path(folder) if adapter == "default" else Path(folder) / adapter


def _write(weights: dict[str, torch.Tensor], config, folder: Path, metadata: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(tensors, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt", **metadata})
    config = copy.deepcopy(config)
    config.inference_mode = True  # as peft saves it
    config.save_pretrained(folder)


def _frozen_checksum(model: nn.Module) -> int:
    """A checksum of what the adapters stand on, equal on every device: each weight's bits, summed as whole numbers."""
    types = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    of_adapters = {tensor.data_ptr() for name in model.peft_config for tensor in _weights(model, name).values()}
    sums = [
        int(weight.data.contiguous().view(types[weight.element_size()]).sum(dtype=torch.int64))
        for name, weight in pretraining_model_of(model).named_parameters()
        # An original module is out of use. Quantized weights have no such view.
        if weight.data_ptr() not in of_adapters
        and ".original_module." not in name
        and type(weight.data) is torch.Tensor
    ]
    return zlib.crc32(repr(sums).encode())
