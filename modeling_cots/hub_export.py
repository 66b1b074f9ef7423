"""Writing a COTS model as a complete repository folder: all that a Hub user expects, and nothing of training.

The folder holds weights and configuration of the two encoders, processor and tokenizer, the flat code files that
transformers loads where this package is not installed, the files that sentence-transformers reads, the handler of
Inference Endpoints, and a card. `hub_push.py` sends it to a hub. This file is one of the code files itself, so that a
model loaded from a hub can be exported again.
"""

import copy
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files

from .encoders_cots import check_vocabulary
from .image_processing_cots import COTSImageProcessor
from .onnx_cots import ONNX_FOLDER
from .pipeline_cots import CUSTOM_PIPELINES
from .processing_cots import IMAGE_PROCESSOR_CODE, PROCESSOR_CODE, VIDEO_PROCESSOR_CODE

AUTO_MAP = {
    "AutoConfig": "configuration_cots.COTSConfig",
    "AutoModel": "modeling_cots.COTSModel",
    "AutoModelForZeroShotImageClassification": "modeling_cots.COTSModel",
    **PROCESSOR_CODE,
    **IMAGE_PROCESSOR_CODE,
    **VIDEO_PROCESSOR_CODE,
}
# The code files that transformers loads from a repository. Files that these import are copied as well.
CODE_FILES = (
    "configuration_cots.py",
    "modeling_cots.py",
    "processing_cots.py",
    "image_processing_cots.py",
    "video_processing_cots.py",
    "pipeline_cots.py",
    "onnx_cots.py",
)
# Name of the handler in the package, and the name that Inference Endpoints look for in a repository.
HANDLER_FILES = ("hub/handler.py", "handler.py")
# What the handler and the code files need. An endpoint installs it with pip.
REQUIREMENTS = "transformers>=5.20,<6\ntorch\ntorchvision\npillow\n"
CARD_NAME = "README.md"
CARD_MARK = "<!-- generated card, sha256:{} -->"

SENTENCE_TRANSFORMERS_FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
            "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
        },
        "module_output_name": "sentence_embedding",
    },
    "1_Normalize/config.json": {
        "module_input_name": "sentence_embedding",
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}

BASIC_CARD = """
# {name}

A two-stream vision-language model for image-text retrieval: COTS (Lu et al., CVPR 2022,
[arXiv 2204.07441](https://arxiv.org/abs/2204.07441)). Images and texts are encoded apart, without any cross-attention,
so that a collection is embedded once and searched by dot products.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{model_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{model_id}", trust_remote_code=True)
```

The text encoder is {text}; the vision encoder is {vision},
for images of {height} x {width} pixels. Embeddings have {dim} numbers and unit length. What the model was trained
on and how well it does was not stated when this card was made.
"""


def export_repository(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | os.PathLike,
    *,
    card: ModelCard | str | None = None,
    model_id: str | None = None,
) -> None:
    """
    Write a folder that is a complete Hub repository.

    Args:
        model: A [`COTSModel`], or a [`COTSForPreTraining`], which is written without its heads.
        processor: The [`COTSProcessor`] of the model.
        folder: Created if need be. Files of the same names are replaced, others stay, but for ONNX files, which an
            earlier export made of other weights.
        card: The card, written as it is. Without one, an existing `README.md` stays; if there is none, a short card
            is written that describes the model and says nothing about its training.
        model_id: Where the examples of that short card load the model from; by default the folder's name.

    Raises `ValueError` for a model that is not COTS, and without a processor that fits the model.
    """
    model, folder = cots_model_of(model), Path(folder)
    check_processor(model, processor)
    code_folder = find_code(model)
    shutil.rmtree(folder / ONNX_FOLDER, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, content in SENTENCE_TRANSFORMERS_FILES.items():
        write_json(folder / name, content)
    copy_code(code_folder, folder)
    _name_model_code(folder)
    _name_processor_code(folder)
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    if card is not None:
        (folder / CARD_NAME).write_text(str(card), encoding="utf-8")
    elif not (folder / CARD_NAME).exists():
        basic = build_basic_card(model, folder.name if model_id is None else model_id)
        (folder / CARD_NAME).write_text(mark_generated(basic), encoding="utf-8")


def cots_model_of(model: PreTrainedModel) -> PreTrainedModel:
    """The [`COTSModel`] in a model: without heads and the mask token that pre-training adds, with adapters merged.

    Raises `ValueError` for a model that is not COTS.
    """
    if getattr(model.config, "model_type", None) != "cots":
        raise ValueError(f"This exports COTS models, got {type(model).__name__}.")
    if hasattr(model, "get_base_model"):  # of peft
        model = model.get_base_model()
    cots = _with_adapters_merged(model.base_model)
    with torch.device("meta"):  # only for the names: some encoders have a mask token without pre-training, too
        names = type(cots)(copy.deepcopy(cots.config)).state_dict().keys()
    weights = cots.state_dict()
    if weights.keys() == names:
        return cots
    copied = type(cots)(copy.deepcopy(cots.config)).to(cots.dtype)
    copied.load_state_dict({name: weights[name] for name in names})
    return copied


def _with_adapters_merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with adapters of peft, in which their layers are plain ones again; others as they are."""
    if not any(_is_of_adapter(module) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if not _is_of_adapter(module):
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):  # a layer that trained whole
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            module.merge()
            plain = module.get_base_layer()
        owner, _, last = name.rpartition(".")
        setattr(merged.get_submodule(owner), last, plain)
    if getattr(merged, "_hf_peft_config_loaded", False):  # else it would be saved as adapters
        merged._hf_peft_config_loaded = False
    vars(merged).pop("peft_config", None)
    return merged


def _is_of_adapter(module: torch.nn.Module) -> bool:
    return hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "get_base_layer")


def check_processor(model: PreTrainedModel, processor: ProcessorMixin | None) -> None:
    """Raise `ValueError` for a processor without tokenizer or image processor, or with too many tokens."""
    if processor is None or not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(f"A repository needs the COTSProcessor of the model, got {type(processor).__name__}.")
    check_vocabulary(processor.tokenizer, model.config)


def find_code(model: PreTrainedModel) -> Path:
    """Folder of the code files: this package or, if this file was loaded with a model, the repository of that model.

    Raises `ValueError` for a model that was not loaded from a repository.
    """
    package, source = Path(__file__).parent, model.config.name_or_path
    if (package / HANDLER_FILES[0]).is_file():
        return package
    if not source:
        raise ValueError("This model was not loaded from a repository whose code files could be taken along.")
    if os.path.isdir(source):
        return Path(source)
    revision = getattr(model.config, "_commit_hash", None)
    return Path(snapshot_download(source, revision=revision, allow_patterns=["*.py"]))


def copy_code(source: Path, target: Path) -> None:
    """Copy the code files, the files that they import, and the handler."""
    files = {source / name for name in CODE_FILES}
    for file in [file for file in files if file.is_file()]:
        files.update(map(Path, get_relative_import_files(file)))
    handler = next((source / name for name in HANDLER_FILES if (source / name).is_file()), None)
    if handler is None or not all(file.is_file() for file in files):
        raise ValueError(f"{source} lacks some of the code files of COTS ({', '.join(CODE_FILES)}, handler.py).")
    for file, name in [*((file, file.name) for file in sorted(files)), (handler, HANDLER_FILES[1])]:
        if not (target / name).exists() or not os.path.samefile(file, target / name):
            shutil.copyfile(file, target / name)


def _name_model_code(folder: Path) -> None:
    """Tell the Auto classes and `pipeline`, in `config.json`, where the code is."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(auto_map=AUTO_MAP, architectures=["COTSModel"], custom_pipelines=CUSTOM_PIPELINES)
    write_json(folder / "config.json", config)


def _name_processor_code(folder: Path) -> None:
    """Tell the Auto classes, in `processor_config.json`, where the code of our processors is."""
    config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    config["auto_map"] = PROCESSOR_CODE
    if config["image_processor"]["image_processor_type"] == COTSImageProcessor.__name__:
        config["image_processor"]["auto_map"] = IMAGE_PROCESSOR_CODE
    if config.get("video_processor") is not None:
        config["video_processor"]["auto_map"] = VIDEO_PROCESSOR_CODE
    write_json(folder / "processor_config.json", config)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=isinstance(content, dict)) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ the card


def build_basic_card(model: PreTrainedModel, model_id: str) -> ModelCard:
    """A short card: what the model is and how it is loaded, without claims about training and results."""
    config = model.config
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=["cots", "image-text-retrieval", "two-stream", "sentence-transformers"],
    )
    height, width = config.image_size
    text = BASIC_CARD.format(
        name=model_id.rpartition("/")[2],
        model_id=model_id,
        text=_describe(config.text_config),
        vision=_describe(config.vision_config),
        height=height,
        width=width,
        dim=config.projection_dim,
    )
    return ModelCard(f"---\n{data}\n---\n{text}")


def _describe(config) -> str:
    return f"`{config.model_type}` with {config.num_hidden_layers} layers, {config.hidden_size} wide"


def mark_generated(card: ModelCard | str) -> str:
    """The card with its own checksum in a last line, which no longer fits once somebody edits the card."""
    text = _normalized(str(card))
    return f"{text}\n\n{CARD_MARK.format(_digest(text))}\n"


def is_untouched(card: str) -> bool:
    """Whether a card is unedited since [`mark_generated`] wrote it, so that a newer one may replace it."""
    mark = re.escape(CARD_MARK).replace(r"\{\}", "([0-9a-f]{64})")
    found = re.fullmatch(f"(.*?)\\s*{mark}\\s*", _normalized(card), re.DOTALL)
    return found is not None and _digest(_normalized(found[1])) == found[2]


def unmarked(card: str) -> str:
    """The text of a generated card without its checksum."""
    return card.rpartition(CARD_MARK.partition("{")[0])[0]


def rename_card(card: str, old_id: str, new_id: str) -> str:
    """The card with `new_id` for `old_id` in its examples; a card that somebody edited is returned unchanged."""
    if not is_untouched(card):
        return card
    text = unmarked(card)
    for before in ("(", "model="):
        text = text.replace(f'{before}"{old_id}"', f'{before}"{new_id}"')
    return mark_generated(text)


def check_space(space_id: str) -> None:
    """Raise `ValueError` for what is not the id of a Space."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", space_id):
        raise ValueError(f"--space must name a Space as owner/name, got {space_id!r}.")


def link_space(card: str, space_id: str) -> str:
    """The card with one line below its title that links a Space in which the model can be tried."""
    line = f"[Try it in your browser](https://huggingface.co/spaces/{space_id})."
    generated = is_untouched(card)
    text = unmarked(card) if generated else card
    text = re.sub(r"\[Try it in your browser\]\(https://huggingface\.co/spaces/[\w./-]+\)\.\n+", "", text)
    title = re.match(r"(?s:---\n.*?\n---\n)?(?s:.*?)^# .*\n+", text, re.MULTILINE)
    place = len(text) if title is None else title.end()
    text = f"{text[:place].rstrip()}\n\n{line}\n\n{text[place:]}"
    return mark_generated(text) if generated else text


def copy_card_images(card: str, source: Path, target: Path) -> None:
    """Copy the images that a card shows: files in `source` (its folder) whose relative paths stand in its text."""
    for name in set(re.findall(r"[\w./-]+\.(?:png|jpe?g|webp)", card)):
        image = source / name
        if ".." not in Path(name).parts and not Path(name).is_absolute() and image.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target / name)


def _normalized(text: str) -> str:
    return "\n".join(text.splitlines()).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


__all__ = [
    "build_basic_card",
    "check_space",
    "copy_card_images",
    "export_repository",
    "is_untouched",
    "link_space",
    "mark_generated",
    "rename_card",
]
