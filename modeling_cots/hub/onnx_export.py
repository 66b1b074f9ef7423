"""The two encoders as ONNX files, in the layout that transformers.js and onnxruntime's users expect on the Hub.

`onnx/text_model.onnx` takes `input_ids` and `attention_mask` and gives `text_embeds`; `onnx/vision_model.onnx` takes
`pixel_values` and gives `image_embeds`. Both outputs have unit length. Smaller variants stand beside them, made by
onnxruntime's own tools: `_fp16`, `_int8` and `_quantized`, as transformers.js names them. What runs the
files is `onnx_cots.py`.
"""

import contextlib
import copy
import json
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_torch_greater_or_equal
from transformers.utils.logging import tqdm

from ..hub_export import (
    CARD_NAME,
    HANDLER_FILES,
    check_processor,
    cots_model_of,
    find_code,
    is_untouched,
    mark_generated,
    unmarked,
    write_json,
)
from ..onnx_cots import DTYPES, METADATA, ONNX_FOLDER, COTSOnnxModel, model_file
from .identity import model_identity
from .standard_exports import save_tokenizer, standard_image_processor
from .transformers_js import merge_encoders

logger = transformers_logging.get_logger(__name__)

ENCODERS = ("text", "vision")
OPSET = 17  # the first with LayerNormalization; onnxruntime has had it since 1.13
MAX_BYTES = 2**31 - 2**20  # one ONNX file is one protobuf message
ONNX_CODE = ("onnx_cots.py", "image_reading_cots.py")
ONNX_REQUIREMENTS = ("onnxruntime", "tokenizers", "huggingface_hub", "numpy", "pillow")
KEPT = 98.0  # percent of the validation queries whose first result 8-bit files must keep
BATCH_SIZE = 32
QUIET_SECONDS = 2.0  # shorter work shows no progress bar


@dataclass(frozen=True)
class OnnxVariant:
    """
    A pair of files.

    Args:
        dtype: A key of `DTYPES`.
        text_bytes, vision_bytes: Sizes of the files.
        kept_by_texts, kept_by_images: Percent of the validation texts and images that have the same first result as
            with the model; `None` where nothing was measured.
    """

    dtype: str
    text_bytes: int
    vision_bytes: int
    kept_by_texts: float | None = None
    kept_by_images: float | None = None

    @property
    def kept(self) -> tuple[float, float]:
        """Both shares, where they were measured."""
        assert self.kept_by_texts is not None and self.kept_by_images is not None
        return self.kept_by_texts, self.kept_by_images


@dataclass(frozen=True)
class Recipe:
    """
    What becomes 8 bits wide: products with weights, and look-ups in embeddings, but for what loses most by it.

    Args:
        operators: Types of the nodes.
        attention: Whether the attention's projections are among them.
        widening: Whether layers with more outputs than inputs are among them.
    """

    operators: tuple[str, ...] = ("MatMul", "Gemm", "Gather")
    attention: bool = True
    widening: bool = True

    def excludes(self, node, weights: dict) -> bool:
        """Whether a node stays as it is; `weights` has the shape of each."""
        if not self.attention and re.search(r"/(attention|attn)/", node.name):
            return True
        shape = next((weights[name] for name in node.input if name in weights), (0, 0))
        return not self.widening and node.op_type == "MatMul" and shape[1] > shape[0]


# From the fastest to the most exact; sizes of the attention count for little beside those of the other layers.
RECIPES = (
    Recipe(),
    Recipe(attention=False),
    Recipe(("MatMul", "Gemm"), attention=False),
    Recipe(("MatMul", "Gemm"), attention=False, widening=False),
)
UNMEASURED = RECIPES[1]


class TextEncoder(nn.Module):
    """Token ids and mask (B, L) to `text_embeds` (B, projection_dim); longer texts are cut as COTSModel cuts them."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self.model.max_text_length is not None:
            input_ids, attention_mask = (part[:, : self.model.max_text_length] for part in (input_ids, attention_mask))
        return self.model.encode_text(input_ids, attention_mask)


class VisionEncoder(nn.Module):
    """Pixels (B, 3, H, W) to `image_embeds` (B, projection_dim)."""

    def __init__(self, model: PreTrainedModel, interpolates: bool):
        super().__init__()
        self.model = model
        self.interpolates = interpolates

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixel_values, interpolate_pos_encoding=self.interpolates)


class TextTokens(nn.Module):
    """Token ids and mask (B, L) to `last_hidden_state` (B, L, H), which sentence-transformers itself pools."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.run_text_model(input_ids, attention_mask).last_hidden_state


def export_sentence_onnx(model: PreTrainedModel, folder: str | os.PathLike, *, model_id: str | None = None) -> None:
    """
    Write the ONNX files of an `export_text_encoder` folder: `onnx/model.onnx`, and `onnx/model_int8.onnx`.

    `SentenceTransformer(..., backend="onnx")` loads them, and pools and projects by the folder's other modules.

    Args:
        model: The [`COTSModel`] or [`COTSForPreTraining`] that the folder was made of.
        folder: What `export_text_encoder` has written.
        model_id: Where the card's example loads the model from; by default the folder's name.

    Raises `ValueError` as `export_onnx` does, and for another folder.
    """
    _check_packages()
    model, folder = _plain_model(model), Path(folder)
    if not (folder / "modules.json").exists() or not (folder / "3_Normalize").exists():
        raise ValueError(f"{folder} is not what `export_text_encoder` writes: call that first.")
    path = folder / ONNX_FOLDER / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    _export(TextTokens(model), _text_example(), "last_hidden_state", path, model.config.text_config.model_type)
    _quantize_file(path, path.with_name("model_int8.onnx"), UNMEASURED, is_signed=True)
    sizes = [path.with_name(name).stat().st_size / 1e6 for name in ("model.onnx", "model_int8.onnx")]
    name = folder.name if model_id is None else model_id
    _write_section(folder, SENTENCE_SECTION.format(model_id=name, plain=sizes[0], int8=sizes[1]))


def export_onnx(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | os.PathLike,
    *,
    images: Sequence | None = None,
    texts: Sequence[str] | None = None,
    model_id: str | None = None,
) -> list[OnnxVariant]:
    """
    Write both encoders as ONNX files, with the tokenizer and `preprocessor_config.json` that their runtimes read.

    Float32 files equal `encode_text` and `encode_image` to 1e-4. Batch, length and, where the encoder interpolates its
    positions, image size are dynamic. 8-bit files quantize all that keeps the first result of `KEPT` percent of the
    validation queries, or, without any, the layers that do so in general. The files of an earlier export are replaced
    all together, at the end. The card gets a table of the files.

    Args:
        model: A [`COTSModel`] or [`COTSForPreTraining`].
        processor: Its [`COTSProcessor`].
        folder: A repository of the same model, or a new folder. Its `config.json` stays; where there is none, one of
            type `clip` is written, which runtimes without custom code know, and both encoders in one graph as well,
            `onnx/model.onnx`, for the pipeline of transformers.js.
        images: Validation images, as the processor takes them; every text searches them, and they search the texts.
        texts: Validation captions.
        model_id: Where the card's example loads the model from; by default the folder's name.

    Returns what was written and measured. Raises `ValueError` for an encoder that cannot be exported, with the reason,
    and without the packages of the extra `onnx`.
    """
    _check_packages()
    model, folder = _plain_model(model), Path(folder)
    check_processor(model, processor)
    queries = _check_queries(images, texts)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as name:
        temporary = Path(name)
        (temporary / ONNX_FOLDER).mkdir()
        _export_text(model, temporary / model_file("text", "float32"))
        _export_vision(model, temporary / model_file("vision", "float32"))
        _stamp(temporary, model, processor)
        variants = _write_variants(temporary, model, processor, queries)
        shutil.rmtree(folder / ONNX_FOLDER, ignore_errors=True)
        (temporary / ONNX_FOLDER).rename(folder / ONNX_FOLDER)
    _write_preprocessor(processor, folder)
    if not _is_whole_model(folder):
        save_tokenizer(model, processor.tokenizer, folder)
        write_json(folder / "config.json", clip_config(model))
        for dtype in DTYPES:
            merge_encoders(folder, dtype, model.config.temperature)
    _write_code(find_code(model), folder)
    _write_card(folder, variants, queries, folder.name if model_id is None else model_id)
    return variants


def _is_whole_model(folder: Path) -> bool:
    """Whether the folder is a model's repository, and not new or an earlier export."""
    path = folder / "config.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("model_type") != "clip"


def _check_queries(images: Sequence | None, texts: Sequence[str] | None) -> tuple[list, list[str]] | None:
    if images is None and texts is None:
        return None
    if not images or not texts:
        raise ValueError("To measure 8-bit files, give validation images and texts, at least one of each.")
    return list(images), list(texts)


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"An ONNX export needs onnx and onnxruntime ({error}): pip install 'modeling_cots[onnx]'."
        ) from error


def _plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 on the CPU, without dropout, with an attention that exports to standard operators."""
    model = copy.deepcopy(cots_model_of(model)).float().cpu().eval()
    for name, part in (("text", model.text_model), ("vision", model.vision_model)):
        num_bytes = sum(4 * parameter.numel() for parameter in part.parameters())
        if num_bytes > MAX_BYTES:
            raise ValueError(
                f"The {name} encoder has {num_bytes / 2**30:.1f} GB in float32, and an ONNX file holds at most 2 GB."
            )
    # Before torch 2.9 its exporter makes NaN of a token that sees padding alone, as in a sliding window, and of all
    # others with it (tests/hub/test_onnx_export.py).
    model.set_attn_implementation("sdpa" if is_torch_greater_or_equal("2.9", accept_dev=True) else "eager")
    return model


def _export_text(model: PreTrainedModel, path: Path) -> None:
    _export(TextEncoder(model), _text_example(), "text_embeds", path, model.config.text_config.model_type)


def _text_example() -> dict:
    """Example inputs of a text encoder, with their dynamic axes."""
    input_ids = torch.ones(2, 8, dtype=torch.long)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0  # a mask of ones alone could be left out of what is recorded
    axes = {0: "batch", 1: "length"}
    return {"input_ids": (input_ids, axes), "attention_mask": (attention_mask, axes)}


def _export_vision(model: PreTrainedModel, path: Path) -> None:
    height, width = model.config.image_size
    pixels = torch.zeros(2, model.config.vision_config.num_channels, height, width)
    interpolates = takes_other_sizes(model)
    axes = {0: "batch", 2: "height", 3: "width"} if interpolates else {0: "batch"}
    encoder = VisionEncoder(model, interpolates)
    inputs = {"pixel_values": (pixels, axes)}
    _export(encoder, inputs, "image_embeds", path, model.config.vision_config.model_type)


@torch.no_grad()
def takes_other_sizes(model: PreTrainedModel) -> bool:
    """Whether the vision encoder takes images of another size and shape than its own."""
    height, width = model.config.image_size
    patch = model.config.vision_config.patch_size
    patch_height, patch_width = patch if isinstance(patch, list | tuple) else (patch, patch)
    pixels = torch.zeros(1, model.config.vision_config.num_channels, height + patch_height, width + 2 * patch_width)
    try:
        model.encode_image(pixels, interpolate_pos_encoding=True)
    except (ValueError, RuntimeError):
        return False
    return True


@torch.no_grad()
def _export(encoder: nn.Module, inputs: dict, output: str, path: Path, encoder_type: str) -> None:
    """Trace an encoder; `inputs` holds an example of each and the names of its dynamic axes."""
    try:
        with warnings.catch_warnings():
            # By tracing, which torch calls legacy: the exporter that replaces it fixes the image size to that of the
            # example wherever an encoder interpolates (tests/hub/test_onnx_export.py).
            warnings.simplefilter("ignore")
            torch.onnx.export(
                encoder.eval(),
                tuple(example for example, _ in inputs.values()),
                path,
                dynamo=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[output],
                dynamic_axes={name: axes for name, (_, axes) in inputs.items()} | {output: {0: "batch"}},
            )
    except Exception as error:  # the exporter raises its own errors, torch's and those of the encoder's code
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"The `{encoder_type}` encoder cannot be exported to ONNX: {reason}") from error


def _stamp(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Write into both files, and so into their variants, what model they are of."""
    import onnx

    said = {
        "model_identity": model_identity(model, processor),
        "temperature": model.config.temperature,
        "projection_dim": model.config.projection_dim,
        "max_text_length": model.max_text_length,
        "image_size": list(model.config.image_size),
    }
    for encoder in ENCODERS:
        path = folder / model_file(encoder, "float32")
        recorded = onnx.load(path)
        onnx.helper.set_model_props(recorded, {METADATA: json.dumps(said)})
        onnx.save(recorded, path)


# ---------------------------------------------------------------------------------------------------- smaller variants


def _write_variants(folder: Path, model: PreTrainedModel, processor: ProcessorMixin, queries) -> list[OnnxVariant]:
    """Write the smaller files, and measure all."""
    expected = None if queries is None else _embed(model, processor, *queries, name="COTSModel")

    def measured(dtype: str) -> OnnxVariant:
        text_bytes, vision_bytes = ((folder / model_file(name, dtype)).stat().st_size for name in ENCODERS)
        if expected is None:
            return OnnxVariant(dtype, text_bytes, vision_bytes)
        found = _embed(COTSOnnxModel(folder, dtype=dtype), processor, *queries, name=dtype)
        of_texts, of_images = kept_first(found, expected)
        return OnnxVariant(dtype, text_bytes, vision_bytes, of_texts, of_images)

    _write_float16(folder)
    variants = [measured("float32"), measured("float16")]
    for number, recipe in enumerate(RECIPES):
        if queries is None and recipe is not UNMEASURED:
            continue
        _quantize(folder, "int8", recipe)
        variant = measured("int8")
        if queries is None or min(variant.kept) >= KEPT:
            break
        if number == len(RECIPES) - 1:
            logger.warning(
                f"8-bit files keep the first result of {min(variant.kept):.1f} % of the validation queries, less than "
                f"{KEPT:.0f} %: where that counts, use the float16 files."
            )
    _quantize(folder, "quantized", recipe)
    return [*variants, variant, measured("quantized")]


def _write_float16(folder: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    for encoder in ENCODERS:
        plain = onnx.load(folder / model_file(encoder, "float32"))
        onnx.save(convert_float_to_float16(plain, keep_io_types=True), folder / model_file(encoder, "float16"))


def _quantize(folder: Path, dtype: str, recipe: Recipe) -> None:
    # Signed weights are fastest where a CPU has VNNI instructions. Without these their products may overflow, which
    # unsigned ones never do: browsers get those.
    for encoder in ENCODERS:
        _quantize_file(
            folder / model_file(encoder, "float32"), folder / model_file(encoder, dtype), recipe, dtype == "int8"
        )


def _quantize_file(plain: Path, path: Path, recipe: Recipe, is_signed: bool) -> None:
    """Weights in 8 bits by output channel, activations in 8 bits as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(plain).graph
    weights = {weight.name: weight.dims for weight in graph.initializer}
    with _without_hints():
        quantize_dynamic(
            plain,
            path,
            op_types_to_quantize=list(recipe.operators),
            nodes_to_exclude=[node.name for node in graph.node if recipe.excludes(node, weights)],
            per_channel=True,
            weight_type=QuantType.QInt8 if is_signed else QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )


@contextlib.contextmanager
def _without_hints():
    """onnxruntime's quantization advises, through the root logger, a step that changes nothing here."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)


@torch.no_grad()
def _embed(model, processor: ProcessorMixin, images: list, texts: list[str], name: str) -> tuple:
    """Embeddings (M, d) of images and (N, d) of texts, as arrays."""
    image_embeds, text_embeds = [], []
    steps = [(images, "images", image_embeds), (texts, "text", text_embeds)]
    total = sum(len(items) for items, *_ in steps)
    with tqdm(total=total, desc=f"Measuring {name}", delay=QUIET_SECONDS) as progress:
        for items, kind, embeds in steps:
            for start in range(0, len(items), BATCH_SIZE):
                batch = items[start : start + BATCH_SIZE]
                options = {} if kind == "images" else {"padding": True, "truncation": True}
                inputs = processor(**{kind: batch}, **options, return_tensors="pt")
                if kind == "images":
                    embeds.append(model.encode_image(inputs["pixel_values"]).numpy())
                else:
                    embeds.append(model.encode_text(inputs["input_ids"], inputs["attention_mask"]).numpy())
                progress.update(len(batch))
    return np.concatenate(image_embeds), np.concatenate(text_embeds)


def kept_first(found: tuple, expected: tuple) -> tuple[float, float]:
    """
    Percent of the texts, and of the images, that have the same first result with `found` as with `expected`.

    Args:
        found, expected: Embeddings of the images (M, d) and of the texts (N, d). Equal texts count as one result.
    """
    (images, texts), (expected_images, expected_texts) = found, expected
    scores, expected_scores = texts @ images.T, expected_texts @ expected_images.T
    of_texts = scores.argmax(axis=1) == expected_scores.argmax(axis=1)
    _, group = np.unique(expected_texts, axis=0, return_inverse=True)
    of_images = group[scores.argmax(axis=0)] == group[expected_scores.argmax(axis=0)]
    return 100 * float(of_texts.mean()), 100 * float(of_images.mean())


# -------------------------------------------------------------------------------------------- what other runtimes read


def _write_preprocessor(processor: ProcessorMixin, folder: Path) -> None:
    """`preprocessor_config.json`, which transformers 5 no longer writes and transformers.js reads."""
    settings = standard_image_processor(processor.image_processor).to_dict()
    kept = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    kept += ("do_normalize", "image_mean", "image_std", "do_convert_rgb", "do_pad")
    settings = {name: settings[name] for name in kept if settings.get(name) is not None}
    # transformers.js knows processors by the names of transformers 4.
    write_json(
        folder / "preprocessor_config.json",
        {**settings, "image_processor_type": "ViTImageProcessor", "feature_extractor_type": "ViTFeatureExtractor"},
    )


def _write_code(source: Path, folder: Path) -> None:
    """The file that runs the export, the one that it imports, the handler, and what an endpoint installs for them."""
    handler = next(source / name for name in HANDLER_FILES if (source / name).is_file())
    for file, name in [(source / name, name) for name in ONNX_CODE] + [(handler, HANDLER_FILES[1])]:
        if not (folder / name).exists() or not os.path.samefile(file, folder / name):
            shutil.copyfile(file, folder / name)
    path = folder / "requirements.txt"
    needed = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    path.write_text("\n".join(dict.fromkeys([*needed, *ONNX_REQUIREMENTS])) + "\n", encoding="utf-8")


def clip_config(model: PreTrainedModel) -> dict:
    """`config.json` of type `clip`: sizes and the temperature, for runtimes that know no `cots`."""
    config = model.config
    text, vision = config.text_config, config.vision_config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    text_sizes, vision_sizes = ({name: getattr(part, name) for name in names} for part in (text, vision))
    text_sizes |= {"vocab_size": text.vocab_size, "max_position_embeddings": model.max_text_length}
    vision_sizes |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": -math.log(config.temperature),
        "text_config": {"model_type": "clip_text_model", "projection_dim": config.projection_dim, **text_sizes},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": config.projection_dim, **vision_sizes},
    }


# ------------------------------------------------------------------------------------------------------------ the card

ONNX_CARD = """
# {name}

Both encoders of a two-stream vision-language model (COTS, Lu et al., CVPR 2022,
[arXiv 2204.07441](https://arxiv.org/abs/2204.07441)) as ONNX files: text and image embeddings that are compared by dot
products, in Python without torch, in a browser or on a phone.
"""
ONNX_HEAD = "## ONNX files"
ONNX_SECTION = """

{head_of_files}
{rows}

{measured}

```python
from modeling_cots import COTSOnnxModel

model = COTSOnnxModel("{model_id}", dtype="int8")
text_embeds = model.encode_text(**model.tokenize(["two dogs run in the snow"]))
print(text_embeds.shape)  # encode_image(model.prepare_images([image])) likewise, of PIL images
```

transformers.js loads the same files by its `dtype` "fp32", "fp16", "int8" and "q8":

```js
import {{ AutoTokenizer, CLIPTextModelWithProjection }} from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("{model_id}");
const model = await CLIPTextModelWithProjection.from_pretrained("{model_id}", {{ dtype: "q8" }});
const {{ text_embeds }} = await model(tokenizer(["two dogs run in the snow"], {{ padding: true, truncation: true }}));
```
"""
SENTENCE_SECTION = """

`onnx/model.onnx` ({plain:.1f} MB) is the transformer in float32, and `onnx/model_int8.onnx` ({int8:.1f} MB) has most
of its weights in 8 bits, which is faster on a CPU and a little less exact.

```python
from sentence_transformers import SentenceTransformer  # pip install "sentence-transformers[onnx]"

model = SentenceTransformer("{model_id}", backend="onnx", model_kwargs={{"file_name": "model_int8.onnx"}})
print(model.encode(["a dog runs in the snow"]).shape)
```
"""
MEASURED = (
    "Measured on {images:,} images and {texts:,} texts of the validation data, against the model in float32: the\n"
    "share of queries with the same first result."
)
NOT_MEASURED = "How far their results differ from those of the model was not measured."


def _write_card(folder: Path, variants: list[OnnxVariant], queries, model_id: str) -> None:
    """Put the table of the files into the card; write a card if need be."""
    path = folder / CARD_NAME
    if not path.exists():
        tags = ["cots", "image-text-retrieval", "onnx", "transformers.js"]
        data = ModelCardData(pipeline_tag="zero-shot-image-classification", tags=tags)
        card = ModelCard(f"---\n{data}\n---\n{ONNX_CARD.format(name=model_id.rpartition('/')[2])}")
        path.write_text(mark_generated(card), encoding="utf-8")
    _write_section(folder, _section(variants, queries, model_id))


def _write_section(folder: Path, section: str) -> None:
    """Put the section on ONNX files at the end of the card, or in the place of an earlier one."""
    path = folder / CARD_NAME
    card = path.read_text(encoding="utf-8")
    is_generated = is_untouched(card)
    text = unmarked(card) if is_generated else card
    before, _, after = text.partition(ONNX_HEAD)
    following = re.search(r"^## ", after, re.MULTILINE)
    rest = "" if following is None else after[following.start() :]
    text = "\n".join([before.rstrip(), "", ONNX_HEAD + section, rest]).rstrip() + "\n"
    path.write_text(mark_generated(text) if is_generated else text, encoding="utf-8")


def _section(variants: list[OnnxVariant], queries, model_id: str) -> str:
    head = ["files in `onnx/`", "text encoder", "vision encoder"]
    if queries is not None:
        head += ["same image for a text", "same text for an image"]
    rows = []
    for variant in variants:
        sizes = [f"{size / 1e6:.1f} MB" for size in (variant.text_bytes, variant.vision_bytes)]
        kept = [] if queries is None else [f"{share:.1f} %" for share in variant.kept]
        rows.append(f"| `*_model{DTYPES[variant.dtype]}.onnx` | " + " | ".join(sizes + kept) + " |")
    return ONNX_SECTION.format(
        head_of_files="| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|",
        rows="\n".join(rows),
        measured=NOT_MEASURED if queries is None else MEASURED.format(images=len(queries[0]), texts=len(queries[1])),
        model_id=model_id,
    )


__all__ = ["OnnxVariant", "export_onnx", "export_sentence_onnx"]
