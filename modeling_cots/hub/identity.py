"""The digest by which an index, or an export, knows the model that it was made with."""

import hashlib
import json

import torch

# How a configuration was saved and loaded, which changes no embedding.
CONFIG_BOOKKEEPING = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
_UNKNOWN = object()


def model_identity(model, processor) -> str:
    """
    A digest of the configuration, of the weights, of the image processor's settings and of the tokenizer.

    Weights are rounded to bfloat16 first, so that a model has the same identity in float32 and in bfloat16. Of the
    configuration, the values count that differ from their defaults: a later transformers may have more values. An
    ONNX export has the identity of the model that it was made of, as it says itself.
    """
    exported = getattr(model.config, "model_identity", None)
    if exported is not None:
        return exported
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(_configuration(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    images = json.loads(processor.image_processor.to_json_string())
    for name in ("auto_map", "image_processor_type", "processor_class", "transformers_version", "_processor_class"):
        images.pop(name, None)
    digest.update(json.dumps(images, sort_keys=True).encode())
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules["truncation"] = rules["padding"] = None  # these depend on the tokenizer's last call
        digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()


def _configuration(config) -> dict:
    """The model type, and the values of a configuration, and of those inside it, that differ from their defaults."""
    try:
        defaults = type(config)().to_dict()
    except (TypeError, ValueError):  # a class without defaults
        defaults = {}
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name not in CONFIG_BOOKKEEPING and not name.startswith("_") and value != defaults.get(name, _UNKNOWN)
    }
    inner = {name: _configuration(getattr(config, name)) for name in config.sub_configs}
    return {**values, **inner, "model_type": config.model_type}
