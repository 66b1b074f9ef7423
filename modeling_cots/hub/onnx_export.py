"""The two encoders as ONNX files, in the layout that transformers.js and onnxruntime's users expect on the Hub.

`onnx/text_model.onnx` takes `input_ids` and `attention_mask` and gives `text_embeds`; `onnx/vision_model.onnx` takes
`pixel_values` and gives `image_embeds`. Both outputs have unit length. `VARIANTS` stand beside them, made by
onnxruntime's own tools. What runs the files is `onnx_cots.py`.
"""

import copy
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..hub_export import ONNX_FOLDER, check_processor, cots_model_of, write_json
from .standard_exports import save_tokenizer, standard_image_processor

OPSET = 17  # the first with LayerNormalization; onnxruntime has had it since 1.13
MAX_BYTES = 2**31 - 2**20  # one ONNX file is one protobuf message
# Suffixes, as transformers.js names them: its `dtype` "fp16" loads `_fp16`, "int8" `_int8`, and "q8" `_quantized`.
VARIANTS = ("", "_fp16", "_int8", "_quantized")


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


def export_onnx(model: PreTrainedModel, processor: ProcessorMixin, folder: str | os.PathLike) -> None:
    """
    Write both encoders as ONNX files, with the tokenizer and `preprocessor_config.json` that their runtimes read.

    Float32 files equal `encode_text` and `encode_image` to 1e-4. Batch, length and, where the encoder interpolates its
    positions, image size are dynamic. The files of an earlier export are replaced all together, at the end.

    Args:
        model: A [`COTSModel`] or [`COTSForPreTraining`].
        processor: Its [`COTSProcessor`].
        folder: A repository of the same model, or a new folder. Its `config.json` stays; where there is none, one of
            type `clip` is written, which runtimes without custom code know.

    Raises `ValueError` for an encoder that cannot be exported, with the reason, and without the packages of the extra
    `onnx`.
    """
    _check_packages()
    model, folder = _plain_model(model), Path(folder)
    check_processor(model, processor)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as temporary:
        written = Path(temporary) / ONNX_FOLDER
        written.mkdir()
        for name in ("text_model", "vision_model"):
            export = _export_text if name == "text_model" else _export_vision
            export(model, written / f"{name}.onnx")
            _write_variants(written, name)
        shutil.rmtree(folder / ONNX_FOLDER, ignore_errors=True)
        written.rename(folder / ONNX_FOLDER)
    _write_preprocessor(processor, folder)
    if not (folder / "config.json").exists():
        save_tokenizer(model, processor.tokenizer, folder)
        write_json(folder / "config.json", clip_config(model))


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
    model.set_attn_implementation("sdpa")
    return model


def _export_text(model: PreTrainedModel, path: Path) -> None:
    input_ids = torch.ones(2, 8, dtype=torch.long)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0  # a mask of ones alone could be left out of what is recorded
    axes = {0: "batch", 1: "length"}
    inputs = {"input_ids": (input_ids, axes), "attention_mask": (attention_mask, axes)}
    _export(TextEncoder(model), inputs, "text_embeds", path, model.config.text_config.model_type)


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


def _write_variants(folder: Path, name: str) -> None:
    """The smaller files beside `name`.onnx: half precision, and two of 8-bit weights."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    plain = folder / f"{name}.onnx"
    onnx.save(convert_float_to_float16(onnx.load(plain), keep_io_types=True), folder / f"{name}_fp16.onnx")
    for suffix, reduce_range in (("_int8", False), ("_quantized", True)):
        quantize_dynamic(
            plain,
            folder / f"{name}{suffix}.onnx",
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


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


__all__ = ["VARIANTS", "export_onnx"]
