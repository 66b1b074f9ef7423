"""The encoders that a search runs: a COTSModel, in the precision that suits the machine, or its ONNX files."""

import torch
from transformers import AutoTokenizer, ViTImageProcessor
from transformers.utils import logging

from ..encoders_cots import BFLOAT16_NOTE, computes_bfloat16, use_bfloat16_
from ..modeling_cots import COTSModel
from ..onnx_cots import COTSOnnxModel
from ..processing_cots import COTSProcessor
from ..video_processing_cots import COTSVideoProcessor

logger = logging.get_logger(__name__)

TORCH_DTYPES = ("float32", "bfloat16")
ONNX_DTYPES = ("float32", "float16", "int8")
OPENVINO_DTYPES = ("float32",)
OPENVINO_NOTE = "OpenVINO computes in bfloat16, which is faster on this CPU than float32; --dtype float32 overrides."


def check_backend(backend: str, dtype: str | None) -> None:
    """Raise `ValueError` for a `dtype` that the backend, "torch", "onnx" or "openvino", does not have."""
    dtypes = {"torch": TORCH_DTYPES, "onnx": ONNX_DTYPES, "openvino": OPENVINO_DTYPES}[backend]
    if dtype is not None and dtype not in dtypes:
        other = " --backend onnx has int8." if dtype == "int8" else ""
        raise ValueError(f"--backend {backend} has --dtype {' or '.join(dtypes)}, got {dtype!r}.{other}")


def load_encoders(name: str, revision: str | None, device: torch.device, backend: str, dtype: str | None) -> tuple:
    """
    Load model and processor of one revision.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        device: Where a COTSModel goes; ONNX files run on the CPU.
        backend: "torch", or what runs the ONNX files: "onnx" for onnxruntime, or "openvino".
        dtype: See `check_backend`; by default float32 or, for a COTSModel and OpenVINO on a CPU that computes it,
            bfloat16.

    Raises `ValueError` and `OSError` as `from_pretrained` does.
    """
    check_backend(backend, dtype)
    if backend != "torch":
        runtime = "openvino" if backend == "openvino" else "onnxruntime"
        model = COTSOnnxModel(name, dtype=dtype, revision=revision, runtime=runtime)
        if backend == "openvino" and dtype is None and computes_bfloat16():
            logger.warning_once(OPENVINO_NOTE)
        return model, _processor_of_export(model)
    model = COTSModel.from_pretrained(name, revision=revision or "main")
    commit = getattr(model.config, "_commit_hash", None)  # another one may have been pushed in between
    processor = COTSProcessor.from_pretrained(name, revision=commit or "main")
    model = model.to(device)
    is_chosen = dtype is None and device.type == "cpu" and computes_bfloat16()
    if dtype == "bfloat16" or is_chosen:
        use_bfloat16_(model)
    if is_chosen:
        logger.warning_once(BFLOAT16_NOTE.format("--dtype float32"))
    return model, processor


def _processor_of_export(model: COTSOnnxModel) -> COTSProcessor:
    """The processor beside ONNX files; a repository of these alone has the files of its parts."""
    if (model.folder / "processor_config.json").is_file():
        return COTSProcessor.from_pretrained(model.folder)
    image_processor = ViTImageProcessor.from_pretrained(model.folder)
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    return COTSProcessor(image_processor, tokenizer, COTSVideoProcessor(size=image_processor.size))
