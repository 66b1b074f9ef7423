"""Embedding a data set of pairs, every image once with all of its captions, and measuring retrieval among them.

The metrics are computed in `retrieval_metrics.py`. Images, captions and ranks are computed in batches that do not
depend on the number of processes, and each process takes whole ones of them. So no image is padded or counted twice,
and embeddings and metrics are those of one process, bit for bit on devices of one kind.
"""

import functools
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.feature_cache import FeatureSource
from ..data.image_collators import COTSEvaluationCollator
from ..data.items import modality_of
from ..data.pixel_normalization import PixelNormalizer
from ..data.video_collators import COTSVideoEvaluationCollator
from .retrieval_metrics import best_positive_ranks, retrieval_metrics
from .text_encoding import encode_texts


@dataclass
class PairEmbeddings:
    """Unit-length embeddings of a data set of N readable images or videos with C captions; equal ids belong together.

    Args:
        image_embeds: (N, d) float32.
        text_embeds: (C, d) float32.
        image_ids: (N,) int64, the `pair_id` of every image.
        text_ids: (C,) int64, the `pair_id` of the image that a caption describes.
        num_skipped_images: Images that could not be read; they and their captions are left out.
    """

    image_embeds: torch.Tensor
    text_embeds: torch.Tensor
    image_ids: torch.Tensor
    text_ids: torch.Tensor
    num_skipped_images: int


@torch.no_grad()
def embed_pairs(
    model,
    dataset,
    processor,
    accelerator,
    *,
    batch_size: int,
    max_text_length: int,
    num_workers: int = 0,
    progress: bool = True,
    features: dict[str, FeatureSource] | None = None,
) -> PairEmbeddings:
    """
    Embed all images or videos, and captions, of `dataset` (items as `open_pairs` or `open_videos` gives them) with a
    [`COTSModel`].

    Args:
        features: Cached features of the items that are to be used, by kind.

    Returns [`PairEmbeddings`] on the CPU, the same on every process. Raises `ValueError` if no image could be read.
    """
    if modality_of(dataset) == "video":
        collator = COTSVideoEvaluationCollator(processor, max_text_length=max_text_length)
    else:
        collator = COTSEvaluationCollator(processor, max_text_length=max_text_length, features=features or {})
    starts = range(0, len(dataset), batch_size)[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(
        dataset,
        batch_sampler=[list(range(start, min(start + batch_size, len(dataset)))) for start in starts],
        num_workers=num_workers,
        collate_fn=collator,
    )
    normalize_pixels = PixelNormalizer(processor).to(model.device)
    was_training = model.training
    model.eval()
    progress = progress and accelerator.is_main_process
    # A data loader draws a seed, and evaluation must not shift the random numbers of training.
    with torch.random.fork_rng(devices=[]), accelerator.autocast():
        parts = [
            _embed_batch(model, batch, normalize_pixels)
            for batch in tqdm(loader, desc="Embedding", disable=not progress)
        ]
        image_embeds, image_ids = _gather_images(parts, model, accelerator)
        # Captions last, when all of them can be batched by length.
        has_text_features = features is not None and "text" in features
        text_embeds, text_ids = _gather_texts(parts, model, accelerator, has_text_features, progress)
    model.train(was_training)
    if len(image_embeds) == 0:
        raise ValueError(f"None of the {len(dataset)} images or videos of the evaluation set could be read.")
    return PairEmbeddings(image_embeds, text_embeds, image_ids, text_ids, len(dataset) - len(image_embeds))


@dataclass
class _EmbeddedBatch:
    """
    The readable images of a batch, embedded, and their captions.

    Args:
        image_embeds: (B, d) float32.
        image_ids: (B,) int64.
        texts: Token ids (L,) of each caption; its embedding (d,) where it came with cached features.
        text_ids: (C,) int64.
    """

    image_embeds: torch.Tensor
    image_ids: torch.Tensor
    texts: list[torch.Tensor]
    text_ids: torch.Tensor


def _embed_batch(model, batch: dict, normalize_pixels: PixelNormalizer) -> _EmbeddedBatch:
    readable = batch["valid"]
    described = torch.isin(batch["caption_pair_ids"], batch["pair_ids"][readable])
    if not readable.any():
        image_embeds = torch.empty(0, model.config.projection_dim)
    else:
        encode = {
            "pixel_values": model.encode_image,
            "pixel_values_videos": model.encode_video,
            "image_features": model.embed_image_features,
        }
        name = next(name for name in encode if name in batch)
        pixels = normalize_pixels({name: batch[name][readable].to(model.device)})[name]
        image_embeds = encode[name](pixels)
    if "text_features" in batch:
        texts = list(model.embed_text_features(batch["text_features"][described].to(model.device)).cpu())
    else:
        captions = zip(batch["input_ids"][described], batch["attention_mask"][described].bool(), strict=True)
        texts = [input_ids[real] for input_ids, real in captions]
    return _EmbeddedBatch(image_embeds.cpu(), batch["pair_ids"][readable], texts, batch["caption_pair_ids"][described])


def _gather_images(parts: list[_EmbeddedBatch], model, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (N, d) and ids (N,) of the images of all processes, in the order of the ids."""
    none = torch.empty(0, model.config.projection_dim)  # a process may have no batch
    embeds = _gather_rows(torch.cat([none, *(part.image_embeds for part in parts)]), accelerator)
    ids = _gather_rows(_joined([part.image_ids for part in parts]), accelerator)
    order = ids.argsort(stable=True)
    return embeds[order], ids[order]


def _gather_texts(
    parts: list[_EmbeddedBatch], model, accelerator: Accelerator, has_features: bool, progress: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (C, d) and ids (C,) of the captions of all processes, in the order of the ids."""
    ids = _gather_rows(_joined([part.text_ids for part in parts]), accelerator)
    order = ids.argsort(stable=True)
    texts = [text for part in parts for text in part.texts]
    if has_features:
        embeds = torch.stack(texts) if texts else torch.empty(0, model.config.projection_dim)
        return _gather_rows(embeds, accelerator)[order], ids[order]
    lengths = _gather_rows(torch.tensor([len(text) for text in texts], dtype=torch.int64), accelerator)
    texts = _gather_rows(_joined(texts), accelerator).split(lengths.tolist())
    shares = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    embeds = encode_texts(model, [texts[row] for row in order.tolist()], **shares, progress=progress)
    return accelerator.reduce(embeds.to(accelerator.device)).cpu(), ids[order]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _gather_rows(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Rows (n, ...) on the CPU, of which each process has its own number n -> those of all, in their order."""
    if accelerator.num_processes == 1:
        return rows
    counts = accelerator.gather(torch.tensor([len(rows)], device=accelerator.device)).tolist()
    padded = rows.new_zeros(max(1, *counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = accelerator.gather(padded.to(accelerator.device)).cpu().split(len(padded))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def measure_retrieval(
    embeds: PairEmbeddings,
    protocol: str | None = None,
    accelerator: Accelerator | None = None,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, median and mean rank in both directions.

    Args:
        embeds: Of the whole test set.
        protocol: One of `PROTOCOLS` or `None`. It is ignored if some images could not be read, whose number is then
            the metric `skipped_images`.
        accelerator: Its processes, which all have `embeds`, share the queries, each on its device; without it this
            process ranks all of them, on the CPU. The metrics are the same.
        progress: Whether the first process shows a progress bar, if it takes more than a few seconds.
    """
    tensors = embeds.image_embeds, embeds.text_embeds, embeds.image_ids, embeds.text_ids
    find_ranks = functools.partial(best_positive_ranks, progress=progress)
    if accelerator is not None:
        tensors = tuple(tensor.to(accelerator.device) for tensor in tensors)
        find_ranks = functools.partial(_find_ranks_together, accelerator, progress)
    metrics = retrieval_metrics(
        *tensors, protocol=protocol if embeds.num_skipped_images == 0 else None, find_ranks=find_ranks
    )
    if embeds.num_skipped_images > 0:
        metrics["skipped_images"] = embeds.num_skipped_images
    return metrics


def _find_ranks_together(accelerator: Accelerator, progress: bool, *tensors: torch.Tensor) -> torch.Tensor:
    ranks = best_positive_ranks(
        *tensors,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        progress=progress and accelerator.is_main_process,
    )
    return accelerator.reduce(ranks)


@dataclass
class ExampleRetrievals:
    """
    The images or videos nearest to a few captions, as `pair_id`s.

    Args:
        num_images: Number of images that were searched.
        wanted: For each caption, the image that it describes.
        found: For each caption, the images nearest to it, nearest first.
    """

    num_images: int
    wanted: list[int]
    found: list[list[int]]


def find_examples(embeds: PairEmbeddings, num_captions: int = 3, num_found: int = 3) -> ExampleRetrievals:
    """Search with the first captions of `num_captions` images that are spread evenly over the data set."""
    num_images = len(embeds.image_ids)
    rows = torch.linspace(0, num_images - 1, num_captions).long().unique()
    wanted = embeds.image_ids[rows].tolist()
    captions = [int((embeds.text_ids == pair_id).nonzero()[0]) for pair_id in wanted]
    scores = embeds.text_embeds[captions] @ embeds.image_embeds.t()
    nearest = scores.topk(min(num_found, num_images), dim=1).indices
    return ExampleRetrievals(num_images, wanted, embeds.image_ids[nearest].tolist())
