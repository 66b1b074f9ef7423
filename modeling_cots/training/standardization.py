"""Fits the standardization of the encoders' features to the data that training is about to begin with."""

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from ..data.feature_cache import KINDS, TRAINING, FeatureSource
from ..data.feature_writing import FeatureComputer
from ..data.items import modality_of
from ..data.pixel_normalization import PixelNormalizer
from ..data.video_collators import COTSVideoEvaluationCollator
from ..image_reading_cots import UnreadableImageError
from ..modeling_cots import FRAMES_AT_A_TIME, COTSModel, Standardization, frames_of
from .cached_features import features_of

NUM_ITEMS = 1000  # images, of which all captions count


def standardizations_of(model: COTSModel) -> dict[str, Standardization]:
    """Those of images and texts, by kind; none for a model without."""
    projections = {"image": model.vision_projection, "text": model.text_projection}
    return {kind: each.standardization for kind, each in projections.items() if hasattr(each, "standardization")}


def needs_fitting(model: COTSModel) -> bool:
    """Whether a model standardizes features by numbers that nothing has been fitted to yet."""
    return any(not each.is_fitted for each in standardizations_of(model).values())


def fit_standardization_(
    model: COTSModel,
    dataset,
    processor,
    *,
    batch_size: int,
    max_text_length: int,
    num_workers: int = 0,
    progress: bool = True,
    features: Mapping[str, FeatureSource],
) -> None:
    """
    Set the standardization of images and texts by up to `NUM_ITEMS` items, spread evenly over `dataset`.

    Args:
        features: Cached features of the items, by kind; others are computed, of whole images.

    Raises `ValueError` for a stream, which cannot be read twice, and where no image can be read.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "standardize_features is fitted to data before training, and a stream is read only once: open the data "
            "whole, or set standardize_features to false."
        )
    rows = torch.linspace(0, len(dataset) - 1, min(NUM_ITEMS, len(dataset))).long().unique().tolist()
    items = Subset(dataset, rows)
    for kind in KINDS:
        with tqdm(total=len(items), desc=f"Standardizing {kind} features", disable=not progress) as bar:
            loading = {"batch_size": batch_size, "num_workers": num_workers, "bar": bar}
            if kind in features:
                found = _cached(features[kind], items, bar)
            elif kind == "image" and modality_of(dataset) == "video":
                found = _frame_features(model, items, processor, max_text_length, **loading)
            else:
                source = features_of(kind, model, processor, max_text_length, TRAINING)
                computed = FeatureComputer(model, processor, source).compute(items, **loading)
                found = [each for each in computed if each is not None]
        if not found:
            raise ValueError(f"None of {len(rows)} images or videos of the training set could be read.")
        standardizations_of(model)[kind].fit_(torch.from_numpy(np.concatenate(found)))


def _cached(source: FeatureSource, items: Subset, bar) -> list[np.ndarray]:
    """The features of the images, unflipped, or of all captions."""
    found = []
    for index in range(len(items)):
        try:
            rows = source.read_all(items[index])
            found.append(rows[:1] if source.kind == "image" else rows)
        except UnreadableImageError:
            pass
        bar.update()
    return found


@torch.no_grad()
def _frame_features(
    model: COTSModel, items: Subset, processor, max_text_length: int, *, batch_size: int, num_workers: int, bar
) -> list[np.ndarray]:
    """The features of all frames of the videos that can be read."""
    collator = COTSVideoEvaluationCollator(processor, max_text_length=max_text_length)
    normalize_pixels = PixelNormalizer(processor).to(model.device)
    was_training = model.training
    model.eval()
    found = []
    with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
        for batch in DataLoader(items, batch_size, num_workers=num_workers, collate_fn=collator):
            videos = batch["pixel_values_videos"][batch["valid"]].to(model.device)
            if len(videos):
                frames = frames_of(normalize_pixels({"pixel_values_videos": videos})["pixel_values_videos"])
                parts = frames.split(FRAMES_AT_A_TIME)
                found += [model.run_vision_model(part).pooler_output.float().cpu().numpy() for part in parts]
            bar.update(len(batch["valid"]))
    model.train(was_training)
    return found
