"""Embedding a data set of pairs, every image once with all of its captions, and measuring retrieval among them.

The metrics are computed in `retrieval_metrics.py`. Each process embeds the images at its own positions. So no image is
padded or counted twice, and the result does not depend on the number of processes.
"""

from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..data.feature_cache import FeatureSource
from ..data.image_collators import COTSEvaluationCollator
from ..data.items import modality_of
from ..data.pixel_normalization import PixelNormalizer
from ..data.video_collators import COTSVideoEvaluationCollator
from .retrieval_metrics import retrieval_metrics
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
    share = Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    loader = DataLoader(
        share,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collator,
    )
    normalize_pixels = PixelNormalizer(processor).to(model.device)
    was_training = model.training
    model.eval()
    parts = []
    # A data loader draws a seed, and evaluation must not shift the random numbers of training.
    with torch.random.fork_rng(devices=[]), accelerator.autocast():
        for batch in tqdm(loader, desc="Embedding", disable=not (progress and accelerator.is_main_process)):
            parts.append(_embed_images(model, batch, normalize_pixels))
        # Captions last, when all of them can be batched by length.
        texts = [text for _, _, texts, _ in parts for text in texts]
        if features is not None and "text" in features:
            rows = torch.stack(texts) if texts else torch.empty(0, features["text"].size)
            text_embeds = model.embed_text_features(rows.to(model.device)).cpu()
        else:
            text_embeds = encode_texts(model, texts)
    model.train(was_training)
    image_embeds, text_embeds, image_ids, text_ids = _collect(parts, text_embeds)
    if len(image_embeds) == 0:
        raise ValueError(f"None of the {len(dataset)} images or videos of the evaluation set could be read.")
    return PairEmbeddings(image_embeds, text_embeds, image_ids, text_ids, len(dataset) - len(image_embeds))


def _embed_images(model, batch: dict, normalize_pixels: PixelNormalizer) -> tuple:
    """Embeddings and ids of the readable images of a batch; token ids or features of their captions, and pair ids."""
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
        texts = list(batch["text_features"][described])
    else:
        captions = zip(batch["input_ids"][described], batch["attention_mask"][described].bool(), strict=True)
        texts = [input_ids[real] for input_ids, real in captions]
    return image_embeds.cpu(), batch["pair_ids"][readable], texts, batch["caption_pair_ids"][described]


def _collect(parts: list[tuple], text_embeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Embeddings and ids from all processes, in the order of the data set."""
    columns = zip(*((images, image_ids, text_ids) for images, image_ids, _, text_ids in parts), strict=True)
    local = [torch.cat(column) for column in columns]
    gathered = gather_object([(*local, text_embeds)])
    image_embeds, image_ids, text_ids, text_embeds = (torch.cat(column) for column in zip(*gathered, strict=True))
    images, texts = image_ids.argsort(stable=True), text_ids.argsort(stable=True)
    return image_embeds[images], text_embeds[texts], image_ids[images], text_ids[texts]


def measure_retrieval(embeds: PairEmbeddings, protocol: str | None = None) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, median and mean rank in both directions.

    Args:
        embeds: Of the whole test set.
        protocol: One of `PROTOCOLS` or `None`. It is ignored if some images could not be read, whose number is then
            the metric `skipped_images`.
    """
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
