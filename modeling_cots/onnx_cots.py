"""`COTSOnnxModel`: the encoders of an ONNX export, run by onnxruntime or OpenVINO, without torch.

It needs numpy, one of these two, tokenizers and Pillow, and this file works on its own beside the export. It takes
numpy arrays, or torch tensors where torch is there already, as the search and the pipelines do.
"""

import importlib
import importlib.util
import json
import os
import sys
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from PIL import Image

ONNX_FOLDER = "onnx"
# Of each the ending of its files' names; transformers.js calls them "fp32", "fp16", "int8" and "q8".
DTYPES = {"float32": "", "float16": "_fp16", "int8": "_int8", "quantized": "_quantized"}
RUNTIMES = ("onnxruntime", "openvino")
METADATA = "cots"  # of each file: JSON of what both files share


def model_file(encoder: str, dtype: str) -> str:
    """The path in a repository of the "text" or "vision" encoder. Raises `ValueError` for an unknown `dtype`."""
    if dtype not in DTYPES:
        raise ValueError(f"An ONNX export has the dtypes {', '.join(DTYPES)}; got {dtype!r}.")
    return f"{ONNX_FOLDER}/{encoder}_model{DTYPES[dtype]}.onnx"


class COTSOnnxModel:
    """
    Two encoders that `export_onnx` has written. Each is loaded when it is first used.

    Args:
        folder: The folder or Hub id that holds `onnx/`.
        dtype: A key of `DTYPES`, by default "float32". OpenVINO takes the float32 files alone: it computes in bfloat16
            where the CPU does, and in float32 if that is asked for.
        revision: Branch, tag or commit of a Hub id.
        runtime: "onnxruntime" or "openvino".

    Raises `ValueError` where there is no export, without the runtime, and for two files of different exports.
    """

    # What pipelines of transformers ask of a model.
    device = "cpu"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        runtime: str = "onnxruntime",
    ):
        if runtime not in RUNTIMES:
            raise ValueError(f"`runtime` must be one of {', '.join(RUNTIMES)}, got {runtime!r}.")
        if runtime == "openvino" and dtype not in (None, "float32"):
            raise ValueError(f"OpenVINO runs the float32 files: leave `dtype` out, or take 'float32'; got {dtype!r}.")
        self.runtime, self._is_exact = runtime, dtype == "float32"
        dtype = dtype or "float32"
        names = [model_file(encoder, dtype) for encoder in ("text", "vision")]
        self.name_or_path, self.file_dtype = os.fspath(folder), dtype
        if not os.path.isdir(folder):
            folder = snapshot_download(os.fspath(folder), revision=revision, allow_patterns=[*names, "*.json"])
        self.folder = Path(folder)
        self._paths = {encoder: self.folder / name for encoder, name in zip(("text", "vision"), names, strict=True)}
        missing = [str(path) for path in self._paths.values() if not path.is_file()]
        if missing:
            raise ValueError(
                f"There is no ONNX export of {dtype} in {self.name_or_path}, which lacks {' and '.join(missing)}: "
                "write one with `examples/push_to_hub.py --onnx true`."
            )

    @cached_property
    def _text_session(self):
        return self._load("text", "_vision_session")

    @cached_property
    def _vision_session(self):
        return self._load("vision", "_text_session")

    def _load(self, encoder: str, other: str):
        """A session, if the other encoder, where it is loaded, is of the same export."""
        num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)  # 0: as many as there are cores
        if self.runtime == "openvino":
            session = _OpenVinoSession(self._paths[encoder], num_threads, self._is_exact)
        else:
            session = _onnxruntime_session(self._paths[encoder], num_threads)
        loaded = self.__dict__.get(other)
        if loaded is not None and _metadata(loaded) != _metadata(session):
            raise ValueError(f"The ONNX files in {self.folder / ONNX_FOLDER} are of two exports: write both anew.")
        return session

    @cached_property
    def config(self) -> SimpleNamespace:
        """What the export says of its model: `projection_dim`, `temperature`, `max_text_length`, `image_size`, ..."""
        sessions = [self.__dict__[name] for name in ("_text_session", "_vision_session") if name in self.__dict__]
        return SimpleNamespace(model_type="cots", **_metadata(sessions[0] if sessions else self._text_session))

    @property
    def max_text_length(self) -> int | None:
        return self.config.max_text_length

    @property
    def dtype(self):
        """Of the inputs and outputs, for whoever has torch."""
        return sys.modules["torch"].float32

    def encode_text(self, input_ids, attention_mask=None, **unused):
        """Unit-length text embeddings (B, projection_dim), float32, of token ids (B, L)."""
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        (embeds,) = self._text_session.run(None, {"input_ids": ids, "attention_mask": mask})
        return _like(input_ids, embeds)

    def encode_image(self, pixel_values, **unused):
        """Unit-length image embeddings (B, projection_dim), float32, of pixels (B, 3, H, W)."""
        pixels = np.asarray(pixel_values, dtype=np.float32)
        (embeds,) = self._vision_session.run(None, {"pixel_values": pixels})
        return _like(pixel_values, embeds)

    def encode_video(self, pixel_values_videos, **unused):
        """Unit-length video embeddings (B, projection_dim), float32, of frames (B, T, 3, H, W)."""
        frames = np.asarray(pixel_values_videos, dtype=np.float32)
        embeds = self.encode_image(frames.reshape(-1, *frames.shape[2:]))
        means = embeds.reshape(*frames.shape[:2], -1).mean(axis=1)
        return _like(pixel_values_videos, means / np.linalg.norm(means, axis=-1, keepdims=True))

    def __call__(self, input_ids=None, pixel_values=None, attention_mask=None, **unused) -> "COTSOnnxOutput":
        """`text_embeds`, `image_embeds` and, with both, `logits_per_image` and `logits_per_text`, as COTSModel."""
        output = COTSOnnxOutput()
        if input_ids is not None:
            output.text_embeds = self.encode_text(input_ids, attention_mask)
        if pixel_values is not None:
            output.image_embeds = self.encode_image(pixel_values)
        if input_ids is not None and pixel_values is not None:
            output.logits_per_image = output.image_embeds @ output.text_embeds.T / self.config.temperature
            output.logits_per_text = output.logits_per_image.T
        return output

    # ------------------------------------------------------------------------------------- from strings and images

    def tokenize(self, texts: list[str]) -> dict[str, np.ndarray]:
        """`input_ids` and `attention_mask` (B, L) of texts, cut where the model cuts them."""
        encodings = self._tokenizer.encode_batch(list(texts))
        return {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64),
        }

    @cached_property
    def _tokenizer(self):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        settings = self._read("tokenizer_config.json")
        pad = settings.get("pad_token") or "[PAD]"
        pad = pad["content"] if isinstance(pad, dict) else pad
        lengths = [length for length in (settings.get("model_max_length"), self.max_text_length) if length]
        if lengths:
            tokenizer.enable_truncation(int(min(lengths)))
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
        return tokenizer

    def prepare_images(self, images: list[Image.Image]) -> np.ndarray:
        """`pixel_values` (B, 3, H, W), as the image processor of the model makes them but for rounding.

        Raises `ValueError` for an image that cannot be turned into RGB, and for settings that are not known here.
        """
        settings = self._image_settings
        size = settings["size"]["width"], settings["size"]["height"]
        arrays = [np.asarray(_read(image).resize(size, settings["resample"]), dtype=np.float32) for image in images]
        pixels = np.stack(arrays) * np.float32(settings["rescale_factor"])
        pixels = (pixels - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)

    @cached_property
    def _image_settings(self) -> dict:
        settings = self._read("preprocessor_config.json")
        if settings.get("do_center_crop") or not {"width", "height"} <= (settings.get("size") or {}).keys():
            raise ValueError(
                f"{self.folder / 'preprocessor_config.json'} does not resize to one width and height: prepare the "
                "pixels with the model's own processor."
            )
        if not settings["do_normalize"]:
            settings.update(image_mean=[0.0] * 3, image_std=[1.0] * 3)
        return settings if settings["do_rescale"] else {**settings, "rescale_factor": 1.0}

    def _read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    # ----------------------------------------------------------------------- what callers do to every model of torch

    def eval(self) -> "COTSOnnxModel":
        return self

    def to(self, *args, **kwargs) -> "COTSOnnxModel":
        """Stays on the CPU."""
        return self

    def can_generate(self) -> bool:
        return False


class COTSOnnxOutput(SimpleNamespace):
    """What was asked for, by name, and in the order of COTSOutput by number, as pipelines of transformers read it."""

    def __getitem__(self, number: int):
        names = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")
        return [getattr(self, name) for name in names if hasattr(self, name)][number]


def _onnxruntime_session(path: Path, num_threads: int):
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("An ONNX export needs onnxruntime: pip install onnxruntime.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _OpenVinoSession:
    """One file in OpenVINO, with the two methods of an onnxruntime session that are used here."""

    def __init__(self, path: Path, num_threads: int, is_exact: bool):
        try:
            import openvino
        except ImportError as error:
            raise ValueError("OpenVINO is not installed: pip install openvino.") from error
        model = openvino.Core().read_model(path)
        place = ["framework", METADATA]  # where OpenVINO keeps what an ONNX file says of itself
        self._said = {METADATA: model.get_rt_info(place).astype(str)} if model.has_rt_info(place) else {}
        options: dict[str, str | int] = {"INFERENCE_NUM_THREADS": num_threads} if num_threads else {}
        if is_exact:
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self._compiled = openvino.compile_model(model, "CPU", options)

    def run(self, output_names: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        # A request of its own for each call, as one request cannot serve two threads.
        return [self._compiled.create_infer_request().infer(inputs)[0]]

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map=self._said)


def _metadata(session) -> dict[str, Any]:
    found = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if found is None:
        raise ValueError("This ONNX file was not written by `export_onnx`, which says in it what model it is of.")
    return json.loads(found)


def _like(given, embeds: np.ndarray):
    """The embeddings as an array or, to tensors, a tensor."""
    return embeds if isinstance(given, np.ndarray) else sys.modules["torch"].from_numpy(embeds)


def _read(image: Image.Image) -> Image.Image:
    if __package__:
        return importlib.import_module(".image_reading_cots", __package__).read_image(image)
    # Beside a downloaded export this file is loaded by its path, and so is the one with `read_image`.
    spec = importlib.util.spec_from_file_location(
        "image_reading_cots", Path(__file__).with_name("image_reading_cots.py")
    )
    reading = sys.modules.get("image_reading_cots") or importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    if "image_reading_cots" not in sys.modules:
        spec.loader.exec_module(reading)
        sys.modules["image_reading_cots"] = reading
    return reading.read_image(image)


__all__ = ["COTSOnnxModel"]
