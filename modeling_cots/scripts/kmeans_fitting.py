"""Fits a [`KMeansImageTokenizer`] to the first images of a data set, once, and finds it again."""

import json
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from ..configuration_cots import COTSConfig
from ..data.image_augmentation import AS_TENSORS, resize_for
from ..data.image_collators import RAW_PIXELS
from ..data.sources import KMEANS
from ..image_processing_cots import COTSImageProcessor
from ..image_reading_cots import UnreadableImageError, read_pixels
from ..method.image_tokenizer import digest_weights
from ..method.kmeans_tokenizer import KMeansImageTokenizer

VOCAB_SIZE = 1_024  # unless a configuration says otherwise; the dVAE's 8,192 would need far more patches
FOLDER_NAME, FITTED_NAME = "image_tokenizer", "fitted.json"
NUM_IMAGES, PATCHES_PER_IMAGE, NUM_ITERATIONS = 2_000, 64, 20
BATCH_SIZE = 25


def find_or_fit(
    name: str,
    dataset: Dataset,
    config: COTSConfig,
    vocab_size: int,
    image_mean: list[float],
    image_std: list[float],
    output_dir: str,
    *,
    revision: str = "main",
    device: str | torch.device = "cpu",
) -> KMeansImageTokenizer:
    """
    The tokenizer in `output_dir`'s folder `image_tokenizer`, if it is this one; or a new one, which is saved there.

    Args:
        name: `kmeans:` and a vision encoder.
        dataset: Pairs, of which the first 2,000 images that can be read are used, 64 patches of each.
        config: Of the model, with `image_size` and `patch_size`: an image has as many tokens as the model patches.
        vocab_size: Number of tokens.
        image_mean, image_std: What the processor subtracts from pixels, and divides them by.

    Raises `ValueError` for a stream and for data with too few patches.
    """
    folder = Path(output_dir) / FOLDER_NAME
    encoder, normalization = name.removeprefix(KMEANS), (image_mean, image_std)
    tokenizer = KMeansImageTokenizer.from_encoder(encoder, vocab_size, *normalization, revision=revision)
    wanted = {
        "encoder": encoder,
        "revision": revision,
        "weights": digest_weights(tokenizer.encoder.state_dict()),  # a folder may hold others by now
        "vocab_size": vocab_size,
        "image_size": list(config.image_size),
        "patch_size": list(config.patch_size),
        "data": getattr(dataset, "name", type(dataset).__name__),
    }
    if (folder / FITTED_NAME).is_file() and json.loads((folder / FITTED_NAME).read_text()) == wanted:
        return KMeansImageTokenizer.from_pretrained(str(folder), *normalization)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is fitted to the first images of the data, and a stream is read only once: make the tokens "
            "before with examples/tokenize_images.py."
        )
    features = patch_features(tokenizer.to(device), dataset, config)
    tokenizer.centers.copy_(cluster(features, vocab_size))
    tokenizer.save_pretrained(str(folder))
    (folder / FITTED_NAME).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")  # last: it is whole now
    return tokenizer


def cluster(features: torch.Tensor, num_centers: int) -> torch.Tensor:
    """
    The centers (K, H) of features (N, H) by faiss' k-means, the same ones in every run.

    Raises `ValueError` for fewer features than centers, and without faiss.
    """
    if len(features) < num_centers:
        raise ValueError(
            f"{num_centers:,} tokens cannot be fitted to {len(features):,} patches: give more images, or a smaller "
            "image_vocab_size in the model_config."
        )
    try:
        import faiss
    except ImportError as error:
        raise ValueError("k-means is that of faiss, which is not installed: pip install faiss-cpu.") from error
    settings = {"niter": NUM_ITERATIONS, "seed": 0, "min_points_per_centroid": 1}
    kmeans = faiss.Kmeans(features.shape[1], num_centers, max_points_per_centroid=len(features), **settings)
    kmeans.train(features.numpy())
    return torch.from_numpy(kmeans.centroids)


@torch.no_grad()
def patch_features(tokenizer: KMeansImageTokenizer, dataset: Dataset, config: COTSConfig) -> torch.Tensor:
    """Features of patches of the first images, (N, features) in float32; the same ones in every run."""
    height, width = config.image_size
    image_processor = COTSImageProcessor(size={"height": height, "width": width})
    generator, found, device = torch.Generator().manual_seed(0), [], tokenizer.centers.device
    rows = range(min(NUM_IMAGES, len(dataset)))
    for first in tqdm(rows[::BATCH_SIZE], desc="Features for k-means", unit="batch"):
        images = _readable(dataset, rows[first : first + BATCH_SIZE], image_processor)
        if not images:
            continue
        pixels = image_processor(images, **AS_TENSORS, **RAW_PIXELS)["pixel_values"].to(device)
        for features in tokenizer.features(pixels, config.patch_size).cpu():
            found.append(features[torch.randperm(len(features), generator=generator)[:PATCHES_PER_IMAGE]])
    if not found:
        raise ValueError(f"None of the first {len(rows):,} images could be read, so that no tokens can be fitted.")
    return torch.cat(found)


def _readable(dataset: Dataset, rows: range, image_processor: COTSImageProcessor) -> list[torch.Tensor]:
    images = []
    for row in rows:
        try:
            images.append(resize_for(read_pixels(dataset[row]["image"]), image_processor))
        except UnreadableImageError:  # training names it, when it comes to it
            continue
    return images
