"""Exporting parts of a COTS model as standard classes, in repositories that need no custom code.

Hosted widgets run no custom code. The text encoder alone is a standard sentence-transformers model. The vision
encoder, with the embeddings of fixed labels as its head, is a standard image classifier. Each docstring says how far
its export equals COTS, and what is refused.
"""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel, ProcessorMixin, ViTForImageClassification, ViTImageProcessor

from ..hub_export import CARD_NAME, check_processor, cots_model_of, mark_generated, write_json
from ..modeling_cots import Standardization
from ..processing_cots import forget_calls

HYPOTHESIS_TEMPLATE = "This is a photo of {}."  # as the zero-shot-image-classification pipeline
IMAGE_BATCH = 32
ACTIVATIONS = {None: "torch.nn.modules.linear.Identity", nn.GELU: "torch.nn.modules.activation.GELU"}

TEXT_CARD = """
# {name}

The text encoder of a two-stream vision-language model (COTS, Lu et al., CVPR 2022,
[arXiv 2204.07441](https://arxiv.org/abs/2204.07441)), for [sentence-transformers](https://www.sbert.net). It gives the
{dim} numbers that the whole model gives for a text, to be compared with those of other texts or of images.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{model_id}")
embeddings = model.encode(["a dog runs in the snow", "a child on a beach"])
print(model.similarity(embeddings, embeddings))
```

It learned from captions of images: texts are near each other if they would describe the same image. Texts of more
than {max_length} tokens are cut.
"""

CLASSIFIER_CARD = """
# {name}

The vision encoder of a two-stream vision-language model (COTS, Lu et al., CVPR 2022,
[arXiv 2204.07441](https://arxiv.org/abs/2204.07441)) as an image classifier. Its head was not trained: its rows are
the embeddings of "{template}" for {num_labels} labels. It ranks them as the whole model does.

```python
from transformers import pipeline

classifier = pipeline("image-classification", model="{model_id}")
print(classifier("image.jpg"))
```

A score says which of the labels fits best, not whether any does. {sharpness}

Labels: {labels}
"""

SHARPNESS = {
    False: "Scores are sharper or flatter than those of the whole model.",
    True: "Scores are near those of the whole model for images like those that it was set up with.",
}


def export_text_encoder(
    model: PreTrainedModel, processor: ProcessorMixin, folder: str | os.PathLike, *, model_id: str | None = None
) -> None:
    """
    Write the text encoder as a standard sentence-transformers model: transformer, mean pooling, a dense layer for each
    of the projection, normalize.

    Its embeddings are those of `encode_text`, in float32. COTS has no pooler: where the standard class has one, it is
    filled with zeros, and nothing reads it.

    Args:
        model: A [`COTSModel`] or [`COTSForPreTraining`].
        processor: Its [`COTSProcessor`].
        folder: Created if need be; a card in it stays.
        model_id: Where the card's example loads the model from; by default the folder's name.

    Raises `ValueError` for a text encoder that is not a class of transformers.
    """
    model, folder = cots_model_of(model), Path(folder)
    check_processor(model, processor)
    _check_standard(model.text_model, "text encoder")
    encoder = AutoModel.from_config(_plain_copy(model.text_model.config)).float()
    missing, unexpected = encoder.load_state_dict(model.text_model.state_dict(), strict=False)
    if unexpected or not all("pooler" in name for name in missing):
        raise ValueError(
            f"{type(encoder).__name__} cannot take the weights of the text encoder: {missing + unexpected}."
        )
    for name in missing:
        nn.init.zeros_(encoder.get_parameter(name))
    encoder.save_pretrained(folder)
    max_length = save_tokenizer(model, processor.tokenizer, folder)
    _save_sentence_modules(model, folder, max_length)
    name = folder.name if model_id is None else model_id
    text = TEXT_CARD.format(
        name=name.rpartition("/")[2], model_id=name, dim=model.config.projection_dim, max_length=max_length
    )
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "cots"]
    data = ModelCardData(library_name="sentence-transformers", pipeline_tag="sentence-similarity", tags=tags)
    _write_card(folder, data, text)


def export_zero_shot_classifier(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    labels: Sequence[str],
    folder: str | os.PathLike,
    *,
    hypothesis_template: str = HYPOTHESIS_TEMPLATE,
    images: Sequence | None = None,
    model_id: str | None = None,
) -> None:
    """
    Write the vision encoder as a standard `ViTForImageClassification` whose head is the embeddings of `labels`.

    The head is the vision projection, then the product with the label embeddings, over the temperature: one matrix.
    COTS also divides by the length of the image embedding, which a standard class cannot do. So the labels of an image
    rank as in COTS, while its logits are those of COTS times that length: the softmax is too sharp or too flat. With
    `images` the head is divided by the mean length over these, and scores are near those of COTS for similar images.

    Args:
        model: A [`COTSModel`] or [`COTSForPreTraining`].
        processor: Its [`COTSProcessor`].
        labels: At least two different ones.
        folder: Created if need be; a card in it stays.
        hypothesis_template: The text that is embedded for a label, with `{}` in the place of the label.
        images: PIL images of the kind that will be classified.
        model_id: Where the card's example loads the model from; by default the folder's name.

    Raises `ValueError` for a vision encoder other than ViT, and for labels or a template that cannot be used.
    """
    model, folder, labels = cots_model_of(model), Path(folder), _checked_labels(labels)
    check_processor(model, processor)
    image_processor = standard_image_processor(processor.image_processor)
    _check_classifier(model.config.vision_config.model_type, hypothesis_template)
    if model.training:  # dropout would blur the embeddings; the caller's model stays as it is
        model = copy.deepcopy(model).eval()
    mean_length = 1.0 if images is None else mean_embedding_length(model, processor, images)
    texts = [hypothesis_template.replace("{}", label) for label in labels]
    query = processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    with torch.no_grad():
        label_weights = model.encode_text(**query).double() / (model.config.temperature * mean_length)
    build_classifier(model, labels, label_weights).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    name = folder.name if model_id is None else model_id
    text = CLASSIFIER_CARD.format(
        name=name.rpartition("/")[2],
        model_id=name,
        template=hypothesis_template,
        num_labels=len(labels),
        labels=", ".join(labels),
        sharpness=SHARPNESS[images is not None],
    )
    data = ModelCardData(library_name="transformers", pipeline_tag="image-classification", tags=["cots", "vision"])
    _write_card(folder, data, text)


def build_classifier(model: PreTrainedModel, labels: list[str], label_weights) -> ViTForImageClassification:
    """The vision encoder with a head that multiplies the projected [CLS] vector with `label_weights` (labels, d).

    The projection W h + b and the product with the weights r of a label are one linear map: (r W) h + r b.
    """
    config = _plain_copy(model.vision_model.config)
    config.id2label = dict(enumerate(labels))  # sets num_labels as well
    config.label2id = {label: index for index, label in enumerate(labels)}
    classifier = ViTForImageClassification(config).float()
    classifier.vit.load_state_dict(model.vision_model.state_dict())
    if model.config.image_pooling != "cls":
        raise ValueError(
            "A standard classifier reads the output at [CLS] alone, and this model the mean of the patches as well "
            f"(image_pooling={model.config.image_pooling}): there is no such export of it."
        )
    layers = dense_layers(model.vision_projection)
    if len(layers) > 1:
        raise ValueError(
            "The head of a standard classifier is linear, and the projections of this model have a hidden layer "
            f"(projection_hidden_size={model.config.projection_hidden_size}): there is no such export of it."
        )
    weight, bias, _ = layers[0]
    with torch.no_grad():
        classifier.classifier.weight.copy_(label_weights @ weight)
        classifier.classifier.bias.copy_(label_weights @ bias)
    return classifier


@torch.no_grad()
def dense_layers(projection: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor, type | None]]:
    """
    The linear layers of a projection: weight, bias (both float64), and the class of the activation behind, or `None`.

    The standardization in front of them is part of the first one: W (x - mean) / std + b.
    """
    layers: list[tuple[torch.Tensor, torch.Tensor, type | None]] = []
    scale, shift = 1.0, None
    for part in projection if isinstance(projection, nn.Sequential) else [projection]:
        if isinstance(part, Standardization):
            scale, shift = 1 / part.std.double(), part.mean.double()
        elif isinstance(part, nn.Linear):
            weight, bias = part.weight.double() * scale, part.bias.double()
            layers.append((weight, bias if shift is None else bias - weight @ shift, None))
            scale, shift = 1.0, None
        else:
            layers[-1] = (*layers[-1][:2], type(part))
    return layers


@torch.no_grad()
def mean_embedding_length(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence) -> float:
    """Mean L2 norm of the projected image features, before COTS makes them unit vectors."""
    if len(images) == 0:
        raise ValueError("`images` is empty: give some images of the kind that will be classified, or none at all.")
    total = 0.0
    for start in range(0, len(images), IMAGE_BATCH):
        pixels = processor(images=list(images[start : start + IMAGE_BATCH]), return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixels.to(model.device, model.dtype), return_dict=True).pooler_output
        total += features.float().norm(dim=-1).sum().item()
    return total / len(images)


def _check_standard(part, role: str) -> None:
    if type(part).__module__.partition(".")[0] != "transformers":
        raise ValueError(
            f"The {role}, {type(part).__name__}, is no class of transformers: loading it would need custom code."
        )


def standard_image_processor(image_processor):
    """The class of transformers in place of ours, which reads images in its own way and resizes them alike."""
    if isinstance(image_processor, ViTImageProcessor):
        return ViTImageProcessor.from_dict(image_processor.to_dict())
    _check_standard(image_processor, "image processor")
    return image_processor


def _check_classifier(vision_type: str, hypothesis_template: str) -> None:
    if vision_type != "vit":
        raise ValueError(f"A ViTForImageClassification cannot be made of a `{vision_type}` encoder.")
    if hypothesis_template.count("{}") != 1:
        raise ValueError(
            f"`hypothesis_template` must have the place of the label, {{}}, once: {hypothesis_template!r}."
        )


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise ValueError(f"`labels` must be a list of texts that are not empty, got {labels!r}.")
    labels = [label.strip() for label in labels]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"`labels` must be at least two and all different, got {labels!r}.")
    return labels


def _plain_copy(config):
    """A copy of an encoder's configuration, without what it got as a part of a COTSConfig."""
    config = copy.deepcopy(config)
    config.dtype = torch.float32
    config._name_or_path = ""
    return config


def save_tokenizer(model: PreTrainedModel, tokenizer, folder: Path) -> int:
    """Save a tokenizer that cuts texts where COTS does and names no custom processor; return that length."""
    max_length = min(tokenizer.model_max_length, model.max_text_length or tokenizer.model_max_length)
    forget_calls(tokenizer)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("processor_class", "auto_map"):
        config.pop(name, None)
    if config["tokenizer_class"] == "TokenizersBackend":  # of no model in particular; by the name of all releases
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, {**config, "model_max_length": max_length})
    return max_length


def _save_sentence_modules(model: PreTrainedModel, folder: Path, max_length: int) -> None:
    # The names and keys that every release of sentence-transformers, and text-embeddings-inference, read.
    layers = dense_layers(model.text_projection)
    names = ["Transformer", "Pooling", *["Dense"] * len(layers), "Normalize"]
    paths = ["", *(f"{index}_{name}" for index, name in enumerate(names) if index > 0)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (path, name) in enumerate(zip(paths, names, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    width = model.config.text_config.hidden_size
    pooling = {f"pooling_mode_{name}": name == "mean_tokens" for name in ("cls_token", "max_tokens", "mean_tokens")}
    write_json(folder / paths[1] / "config.json", {"word_embedding_dimension": width, **pooling})
    for path, (weight, bias, activation) in zip(paths[2:-1], layers, strict=True):
        dense = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": True}
        write_json(folder / path / "config.json", {**dense, "activation_function": ACTIVATIONS[activation]})
        tensors = {"linear.weight": weight.float().cpu().contiguous(), "linear.bias": bias.float().cpu()}
        save_file(tensors, folder / path / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / paths[-1] / "config.json", {})
    settings = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings)


def _write_card(folder: Path, data: ModelCardData, text: str) -> None:
    if not (folder / CARD_NAME).exists():
        (folder / CARD_NAME).write_text(mark_generated(ModelCard(f"---\n{data}\n---\n{text}")), encoding="utf-8")
