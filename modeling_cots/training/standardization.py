"""Fits the standardization of the encoders' features to the data that training is about to begin with."""

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from ..data.image_collators import COTSEvaluationCollator
from ..data.items import modality_of
from ..data.pixel_normalization import PixelNormalizer
from ..data.video_collators import COTSVideoEvaluationCollator
from ..modeling_cots import FRAMES_AT_A_TIME, COTSModel, Standardization, frames_of

NUM_ITEMS = 1000  # images, of which all captions count


def standardizations_of(model: COTSModel) -> list[Standardization]:
    """Those of images and texts, in this order; none for a model without."""
    found = [getattr(model, f"{kind}_projection") for kind in ("vision", "text")]
    return [each.standardization for each in found if hasattr(each, "standardization")]


def needs_fitting(model: COTSModel) -> bool:
    """Whether a model standardizes features by numbers that nothing has been fitted to yet."""
    return any(not each.is_fitted for each in standardizations_of(model))


def fit_standardization_(
    model: COTSModel, dataset, processor, *, batch_size: int, max_text_length: int, num_workers=0, progress=True
) -> None:
    """
    Set the standardization of images and texts by up to `NUM_ITEMS` items, spread evenly over `dataset`.

    Raises `ValueError` for a stream, which cannot be read twice, and where no image can be read.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "standardize_features is fitted to data before training, and a stream is read only once: open the data "
            "whole, or set standardize_features to false."
        )
    rows = torch.linspace(0, len(dataset) - 1, min(NUM_ITEMS, len(dataset))).long().unique().tolist()
    collator_class = COTSVideoEvaluationCollator if modality_of(dataset) == "video" else COTSEvaluationCollator
    loader = DataLoader(
        Subset(dataset, rows),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collator_class(processor, max_text_length=max_text_length),
    )
    normalize_pixels = PixelNormalizer(processor).to(model.device)
    was_training = model.training
    model.eval()
    features: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
        for batch in tqdm(loader, desc="Standardizing features", disable=not progress):
            features.append(_features_of(model, batch, normalize_pixels))
    model.train(was_training)
    images, texts = (torch.cat(each) for each in zip(*features, strict=True))
    if len(images) == 0:
        raise ValueError(f"None of {len(rows)} images or videos of the training set could be read.")
    for standardization, fitted_to in zip(standardizations_of(model), (images, texts), strict=True):
        standardization.fit_(fitted_to)


@torch.no_grad()
def _features_of(model: COTSModel, batch: dict, normalize_pixels) -> tuple[torch.Tensor, torch.Tensor]:
    """Global features of the readable images, or frames of videos, and of the captions of a batch."""
    name = "pixel_values_videos" if "pixel_values_videos" in batch else "pixel_values"
    pixels = normalize_pixels({name: batch[name][batch["valid"]].to(model.device)})[name]
    frames = frames_of(pixels) if name == "pixel_values_videos" else pixels
    parts = [model.run_vision_model(part).pooler_output for part in frames.split(FRAMES_AT_A_TIME) if len(part) > 0]
    images = torch.cat(parts) if parts else torch.empty(0, model.config.vision_config.hidden_size)
    tokens = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
    return images.float().cpu(), model.run_text_model(*tokens).pooler_output.float().cpu()
