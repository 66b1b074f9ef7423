"""Embedding a whole data set of pairs, and measuring retrieval on it: every image once, with all of its captions.

The measures themselves are in `retrieval_metrics.py`. Processes share the images by position, so nothing is padded
or counted twice, and the result does not depend on how many there are.
"""

from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from .data_collator import COTSEvaluationCollator
from .pixel_normalization import PixelNormalizer
from .retrieval_metrics import retrieval_metrics
from .video_collator import COTSVideoEvaluationCollator, holds_videos


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
def embed_pairs(model, dataset, processor, accelerator, *, batch_size, max_text_length, num_workers=0, progress=True):
    """
    Embed all images or videos, and captions, of `dataset` (items as `open_pairs` or `open_videos` gives them) with a
    [`COTSModel`].

    Returns [`PairEmbeddings`] on the CPU, the same on every process. Raises `ValueError` if no image could be read.
    """
    collator_class = COTSVideoEvaluationCollator if holds_videos(dataset) else COTSEvaluationCollator
    share = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    loader = DataLoader(
        share,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collator_class(processor, max_text_length=max_text_length),
    )
    normalize_pixels = PixelNormalizer(processor).to(model.device)
    was_training = model.training
    model.eval()
    parts = []
    # A data loader draws a seed; evaluating must not shift the random numbers of the training around it.
    with torch.random.fork_rng(devices=[]), accelerator.autocast():
        for batch in tqdm(loader, desc="Embedding", disable=not (progress and accelerator.is_main_process)):
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            parts.append(_embed_batch(model, normalize_pixels(batch)))
    model.train(was_training)
    image_embeds, text_embeds, image_ids, text_ids = _collect(parts)
    if len(image_embeds) == 0:
        raise ValueError(f"None of the {len(dataset)} images or videos of the evaluation set could be read.")
    return PairEmbeddings(image_embeds, text_embeds, image_ids, text_ids, len(dataset) - len(image_embeds))


def _embed_batch(model, batch: dict) -> tuple[torch.Tensor, ...]:
    readable = batch["valid"]
    described = torch.isin(batch["caption_pair_ids"], batch["pair_ids"][readable])
    if not readable.any():
        empty = torch.empty(0, model.config.projection_dim)
        return empty, empty, batch["pair_ids"][readable].cpu(), batch["caption_pair_ids"][described].cpu()
    if "pixel_values_videos" in batch:
        image_embeds = model.encode_video(batch["pixel_values_videos"][readable])
    else:
        image_embeds = model.encode_image(batch["pixel_values"][readable])
    text_embeds = model.encode_text(batch["input_ids"][described], batch["attention_mask"][described])
    parts = image_embeds, text_embeds, batch["pair_ids"][readable], batch["caption_pair_ids"][described]
    return tuple(part.cpu() for part in parts)


def _collect(parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """The parts of all processes, joined in the order of the data set."""
    parts = gather_object(parts)
    image_embeds, text_embeds, image_ids, text_ids = (torch.cat(column) for column in zip(*parts, strict=True))
    images, texts = image_ids.argsort(stable=True), text_ids.argsort(stable=True)
    return image_embeds[images], text_embeds[texts], image_ids[images], text_ids[texts]


def evaluate_retrieval(
    model, dataset, processor, accelerator, *, batch_size, max_text_length, num_workers=0, progress=True, protocol=None
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, median and mean rank in both directions, of a [`COTSModel`] on `dataset`.

    `protocol`, one of `PROTOCOLS`, counts only where its whole test set could be read: see `skipped_images`.
    """
    embeds = embed_pairs(
        model,
        dataset,
        processor,
        accelerator,
        batch_size=batch_size,
        max_text_length=max_text_length,
        num_workers=num_workers,
        progress=progress,
    )
    metrics = retrieval_metrics(
        embeds.image_embeds,
        embeds.text_embeds,
        embeds.image_ids,
        embeds.text_ids,
        protocol=protocol if embeds.num_skipped_images == 0 else None,
    )
    if embeds.num_skipped_images > 0:
        metrics["skipped_images"] = embeds.num_skipped_images
    return metrics


__all__ = ["PairEmbeddings", "embed_pairs", "evaluate_retrieval"]
