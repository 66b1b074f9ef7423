"""`image-text-retrieval`: which candidates fit an image or a text, by the dot product of their embeddings.

The package registers the task; a model repository carries this file and names it in `custom_pipelines` of its
`config.json`. Candidates are embedded once (`build_index`). A query then costs one encoder pass and one product. Not
here: indexes on disk and indexes larger than the memory of one machine (the package's `search`).

Two pipelines of transformers are here as well, which read the images of a COTS model as its training did.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ImageFeatureExtractionPipeline, Pipeline, ZeroShotImageClassificationPipeline
from transformers.image_utils import is_pil_image
from transformers.utils import logging

from .encoders_cots import BFLOAT16_NOTE, computes_bfloat16, use_bfloat16_
from .image_reading_cots import UnreadableImageError, fetch_image, read_image
from .processing_cots import TOKENIZER_LOCK

logger = logging.get_logger(__name__)

TASK = "image-text-retrieval"
# The entry `custom_pipelines` in `config.json` of a model repository.
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_cots.ImageTextRetrievalPipeline", "pt": ["AutoModel"]}}
IMAGE_URLS = ("http://", "https://", "data:image/")
IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TIMEOUT = 10.0  # seconds; without a timeout, transformers would wait for a silent server forever
BATCH_SIZE = 32  # of candidates
QUIET_SECONDS = 2.0  # shorter work shows no progress bar


@dataclass(frozen=True)
class RetrievalIndex:
    """
    Embedded candidates.

    Args:
        embeds (`torch.Tensor` of shape `(N, projection_dim)`, float32, unit length): Their embeddings.
        items: N objects to return in answers: the candidates themselves, or titles, paths, rows of a table.

    Raises `ValueError` if the two differ in length or are empty.
    """

    embeds: torch.Tensor
    items: Sequence[Any]

    def __post_init__(self):
        if self.embeds.dim() != 2 or len(self.embeds) == 0 or len(self.embeds) != len(self.items):
            raise ValueError(
                f"An index needs one row of embeddings for each item and at least one; got embeddings of shape "
                f"{tuple(self.embeds.shape)} and {len(self.items)} items."
            )

    def __len__(self) -> int:
        return len(self.items)

    def search(self, query_embed: torch.Tensor, top_k: int) -> list[dict[str, Any]]:
        """The `top_k` items (all, if there are fewer) nearest to `query_embed` (projection_dim,), best first."""
        scores, rows = (self.embeds @ query_embed).topk(min(top_k, len(self)))
        found = zip(scores.tolist(), rows.tolist(), strict=True)
        return [{"score": score, "index": row, "item": self.items[row]} for score, row in found]


class ImageTextRetrievalPipeline(Pipeline):
    """
    Finds the candidates, images or texts, that fit a query, an image or a text.

    An image is a PIL image, a URL, a `data:image/` URL or a path; every other string is a text. `{"image": ...}` or
    `{"text": ...}` says which one a string is; strings from strangers should not be left to the guess. Texts that are
    too long for the model are cut, with a warning.

    ```python
    >>> finder = pipeline("image-text-retrieval", model="runs/quickstart")
    >>> finder("image.png", ["a red circle", "two green stars"], top_k=1)
    [{'score': 0.71, 'index': 0, 'item': 'a red circle'}]
    >>> index = finder.build_index(["a.png", "b.png", "c.png"])
    >>> finder(["a red circle", "two green stars"], index=index, top_k=2)
    ```"""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.tokenizer is None or self.image_processor is None:
            raise ValueError(f"The task {TASK!r} needs a processor: pass `processor=` with the model.")
        if not hasattr(self.model, "encode_image"):
            raise ValueError(f"The task {TASK!r} needs a COTSModel, got {type(self.model).__name__}.")
        self.model.eval()
        choose_dtype_(self)

    def __call__(self, inputs: Any, candidates: Sequence[Any] | None = None, **kwargs) -> list:
        """
        Rank candidates for each query.

        Args:
            inputs: A query, a list of queries, or a data set or generator of them.
            candidates (*optional*): Images and texts to choose from, embedded anew in every call.
            index ([`RetrievalIndex`], *optional*): What `build_index` returned, instead of `candidates`.
            top_k (`int`, defaults to 5): How many to return for each query.
            timeout (`float`, defaults to 10): Seconds to wait for a URL.
            batch_size (`int`, *optional*): How many images or texts enter the model together.

        Returns for each query a list of `{"score", "index", "item"}`, best first: cosine similarity, position among
        the candidates, candidate. A data set or generator gives an iterator. Raises `ValueError` for an image that
        cannot be read, and if not exactly one of `candidates` and `index` is given.
        """
        if candidates is not None:
            if kwargs.get("index") is not None:
                raise ValueError("Give `candidates` or an `index` of them, not both.")
            kwargs["index"] = self.build_index(
                candidates, batch_size=kwargs.get("batch_size"), timeout=kwargs.get("timeout")
            )
        if kwargs.get("index") is None and self._postprocess_params.get("index") is None:
            raise ValueError("Retrieval needs `candidates` to choose from, or an `index` of them.")
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, **kwargs)

    def build_index(
        self,
        candidates: Sequence[Any],
        *,
        items: Sequence[Any] | None = None,
        batch_size: int | None = None,
        timeout: float | None = None,
    ) -> RetrievalIndex:
        """
        Embed candidates once, for many queries.

        Args:
            candidates: Images and texts, as in a call.
            items (*optional*): Objects to return in answers instead of the candidates, one for each.
            batch_size (`int`, defaults to that of the pipeline, or 32): How many enter the model together.
            timeout (`float`, defaults to that of the pipeline): Seconds to wait for a URL.
        """
        if isinstance(candidates, (str, dict, os.PathLike)) or is_pil_image(candidates):
            raise ValueError(f"`candidates` must be a list of images and texts, got a {type(candidates).__name__}.")
        candidates = list(candidates)
        items = candidates if items is None else items
        if not candidates or len(items) != len(candidates):
            raise ValueError(f"Got {len(candidates)} candidates and {len(items)} items; need as many, at least one.")
        batch_size = batch_size or self._batch_size or BATCH_SIZE
        params = self._preprocess_params if timeout is None else {**self._preprocess_params, "timeout": timeout}
        # Texts of similar length together: a batch is padded to its longest text.
        order = sorted(range(len(candidates)), key=lambda row: _num_characters(candidates[row]))
        parts = []
        starts = range(0, len(candidates), batch_size)
        for start in logging.tqdm(starts, desc="Embedding candidates", delay=QUIET_SECONDS):
            batch = [self.preprocess(candidates[row], **params) for row in order[start : start + batch_size]]
            parts.append(self.forward({"query": [item["query"] for item in batch]})["embeds"])
        embeds = torch.cat(parts)
        return RetrievalIndex(embeds[torch.tensor(order, device=embeds.device).argsort()], items)

    def _sanitize_parameters(self, index=None, top_k=None, timeout=None):
        if index is not None and not isinstance(index, RetrievalIndex):
            raise ValueError(f"`index` must be what `build_index` returns, got {type(index).__name__}.")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k` must be a whole number of at least 1, got {top_k!r}.")
        given = {name: value for name, value in (("index", index), ("top_k", top_k)) if value is not None}
        return {} if timeout is None else {"timeout": timeout}, {}, given

    def preprocess(self, query: Any, timeout: float = TIMEOUT) -> dict[str, dict]:
        # One key for images and texts, as transformers batches only inputs with the same keys.
        kind, content = _image_or_text(query)
        return {"query": self._read_image(content, timeout) if kind == "image" else self._tokenize(content)}

    def _read_image(self, source: Any, timeout: float) -> dict[str, torch.Tensor]:
        if isinstance(source, str) and source.lower().endswith(IMAGE_ENDINGS) and _is_missing(source):
            raise ValueError(f"There is no image {source!r}.")
        image = _load(source, timeout)
        return {"pixel_values": self.image_processor(images=[image], return_tensors="pt")["pixel_values"]}

    def _tokenize(self, text: str) -> dict[str, list[int]]:
        limit = min(self.tokenizer.model_max_length, self.model.max_text_length or self.tokenizer.model_max_length)
        with TOKENIZER_LOCK:
            tokens = self.tokenizer(text, verbose=False)
            if len(tokens["input_ids"]) > limit:
                logger.warning_once(f"A text of {len(tokens['input_ids'])} tokens is cut to the first {limit}.")
                tokens = self.tokenizer(text, truncation=True, max_length=limit)
        return {name: list(values) for name, values in tokens.items()}

    def _forward(self, model_inputs: dict) -> dict[str, torch.Tensor]:
        queries = model_inputs["query"]
        queries = queries if isinstance(queries, list) else [queries]  # a single query has no list
        embeds = torch.empty(len(queries), self.model.config.projection_dim, device=self.device)
        images = [row for row, query in enumerate(queries) if "pixel_values" in query]
        texts = [row for row, query in enumerate(queries) if "pixel_values" not in query]
        if images:
            pixel_values = torch.cat([queries[row]["pixel_values"] for row in images])
            embeds[images] = self.model.encode_image(pixel_values.to(self.dtype))
        if texts:
            padded = self.tokenizer.pad([queries[row] for row in texts], return_tensors="pt")
            embeds[texts] = self.model.encode_text(**padded.to(self.device))
        return {"embeds": embeds}

    def postprocess(self, model_outputs: dict, index: RetrievalIndex, top_k: int = 5) -> list[dict[str, Any]]:
        return index.search(model_outputs["embeds"][0], top_k)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the model, its processor (which transformers' own method leaves out) and this file."""
        super().save_pretrained(save_directory, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(save_directory)


class COTSZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """transformers' `zero-shot-image-classification`; images of a COTS model are read as its training did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        choose_dtype_(self)

    def check_model_type(self, supported_models) -> None:
        """As transformers does, but without its warning for the ONNX files of a COTS model."""
        if not _is_cots(self.model):
            super().check_model_type(supported_models)

    def preprocess(self, image, *args, timeout: float | None = None, **kwargs):
        if not _is_cots(self.model):
            return super().preprocess(image, *args, timeout=timeout, **kwargs)
        image = _load(image, timeout)
        with TOKENIZER_LOCK:
            return super().preprocess(image, *args, **kwargs)


class COTSImageFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """transformers' `image-feature-extraction`; images of a COTS model are read as its training did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        choose_dtype_(self)

    def preprocess(self, image, timeout: float | None = None, **kwargs):
        image = _load(image, timeout) if _is_cots(self.model) else image
        return super().preprocess(image, timeout=timeout, **kwargs)


# What these replace would clip 16 bits a pixel before the image processor sees them (tests/test_image_doors.py).
STOCK_PIPELINES = {
    "zero-shot-image-classification": COTSZeroShotImageClassificationPipeline,
    "image-feature-extraction": COTSImageFeatureExtractionPipeline,
}


def choose_dtype_(pipe: Pipeline) -> None:
    """Run a COTS model that `pipeline` has loaded, with no `dtype` given, in bfloat16 where the CPU computes it."""
    model = pipe.model
    is_free = _is_cots(model) and getattr(model, "may_choose_dtype", False) and not model.has_rounded_weights
    if is_free and model.dtype == torch.float32 and pipe.device.type == "cpu" and computes_bfloat16():
        use_bfloat16_(model)
        logger.warning_once(BFLOAT16_NOTE.format('dtype="float32"'))


def _is_cots(model) -> bool:
    return model.config.model_type == "cots"


def _load(source: Any, timeout: float | None):
    """The image of a query. Raises `ValueError` where it cannot be read."""
    try:
        return fetch_image(source, timeout) if isinstance(source, str) else read_image(source)
    except UnreadableImageError as error:
        name = source[:200] if isinstance(source, str) else type(source).__name__
        raise ValueError(f"The image {name!r} cannot be read: {error}"[:500]) from error


def _image_or_text(query: Any) -> tuple[str, Any]:
    """`("image", source)` or `("text", text)`. Raises `ValueError` for anything else."""
    if isinstance(query, dict) and len(query) == 1 and next(iter(query)) in ("image", "text"):
        ((kind, content),) = query.items()
        content = str(content) if isinstance(content, os.PathLike) else content
        if isinstance(content, str) or (kind == "image" and is_pil_image(content)):
            return kind, content
    elif is_pil_image(query):
        return "image", query
    elif isinstance(query, os.PathLike):
        return "image", str(query)
    elif isinstance(query, str):
        return ("image" if _names_an_image(query) else "text"), query
    raise ValueError(
        f"A query or candidate is an image (PIL image, URL or path) or a text, or {{'image': ...}} or "
        f"{{'text': ...}}; got {str(query)[:100]!r} of type {type(query).__name__}."
    )


def _num_characters(candidate: Any) -> int:
    text = candidate.get("text") if isinstance(candidate, dict) else candidate
    return len(text) if isinstance(text, str) else 0


def _is_missing(source: str) -> bool:
    return not source.lower().startswith(IMAGE_URLS) and not os.path.isfile(source)


def _names_an_image(text: str) -> bool:
    """Whether a string is the URL or path of an image. A missing file is then an error, not a text."""
    if text.lower().startswith(IMAGE_URLS):
        return True
    is_one_word = not any(character.isspace() for character in text)
    return (is_one_word and text.lower().endswith(IMAGE_ENDINGS)) or (len(text) < 1000 and os.path.isfile(text))


__all__ = [
    "STOCK_PIPELINES",
    "COTSImageFeatureExtractionPipeline",
    "COTSZeroShotImageClassificationPipeline",
    "ImageTextRetrievalPipeline",
    "RetrievalIndex",
]
