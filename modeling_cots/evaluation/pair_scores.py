"""Scoring the pairs of a data set as the adaptive momentum filter does in training, to find mismatched pairs.

The score of a pair is the similarity of its two momentum embeddings. The threshold is mean - k * std (`filtering.py`):
here over all scores of the data set, in training over the queue of scores. Drawing is in
`visualization/score_figures.py`.
"""

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from ..configuration_cots import COTSConfig
from ..data.revisions import check_revision
from ..method.filtering import filter_threshold, keep_above, mixture_threshold
from ..method.momentum import MOMENTUM_STATE_NAME
from ..modeling_cots import COTSModel
from .embedding import embed_pairs

MOMENTUM_PREFIX = "encoder.model."  # of the momentum encoders in MomentumState


@dataclass
class PairScores:
    """
    Scores of the C pairs of a data set: each of its readable images with each of that image's captions.

    Args:
        pair_ids: (C,) int64, the number of the item in the data set.
        caption_numbers: (C,) int64, the number of the caption in the item, from 0.
        scores: (C,) float32, cosine similarities.
        keep: (C,) bool, whether the filter keeps the pair.
        threshold: The filter drops pairs that score lower.
        num_skipped_images: Number of images that could not be read; they are left out.
    """

    pair_ids: torch.Tensor
    caption_numbers: torch.Tensor
    scores: torch.Tensor
    keep: torch.Tensor
    threshold: float
    num_skipped_images: int


def load_scoring_model(name_or_path: str, revision: str | None = None) -> tuple[COTSModel, str]:
    """
    Load the model that scores pairs: the momentum copy in a training checkpoint, otherwise the model itself.

    Args:
        name_or_path: A training checkpoint (`checkpoint-*`), or a folder or Hub id of a model, which has no momentum
            copy.
        revision: Branch, tag or commit of a Hub id.

    Returns the model in evaluation mode, and a description such as "the momentum copy of runs/mine/checkpoint-500".

    Raises `ValueError` for a momentum copy that does not fit the configuration in the same folder.
    """
    check_revision("model", name_or_path, revision)
    path = os.path.join(name_or_path, MOMENTUM_STATE_NAME)
    if not os.path.isfile(path):
        model = COTSModel.from_pretrained(name_or_path, revision=revision or "main")
        return model.eval(), f"the model {name_or_path}, which has no momentum copy"
    weights = {
        name.removeprefix(MOMENTUM_PREFIX): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
        if name.startswith(MOMENTUM_PREFIX) and not name.endswith("mask_token")
    }
    model = COTSModel(COTSConfig.from_pretrained(name_or_path))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the configuration in {name_or_path}. {error}") from error
    return model.eval(), f"the momentum copy of {name_or_path}"


def score_pairs(
    model, dataset, processor, accelerator, *, batch_size: int = 64, max_text_length: int, num_std: float | None = 2.0
) -> PairScores:
    """
    Score every pair of `dataset` (items as `open_pairs` gives them), and filter at k = `num_std`; with `None` at the
    threshold of the mixture.

    All embeddings are held in memory: 2 KB for an image with one caption at d = 256. Raises `ValueError` if no image
    can be read.
    """
    embeds = embed_pairs(
        model, dataset, processor, accelerator, batch_size=batch_size, max_text_length=max_text_length
    )
    image_rows = torch.searchsorted(embeds.image_ids, embeds.text_ids)
    scores = torch.cat(
        [
            (embeds.image_embeds[rows] * texts).sum(dim=-1)
            for rows, texts in zip(image_rows.split(65_536), embeds.text_embeds.split(65_536), strict=True)
        ]
    )
    if num_std is None:
        other_images = embeds.image_embeds[(image_rows + 1) % len(embeds.image_ids)]
        threshold = mixture_threshold(scores, (other_images * embeds.text_embeds).sum(dim=-1))
    else:
        threshold = filter_threshold(scores, num_std)
    first_captions = torch.searchsorted(embeds.text_ids, embeds.text_ids)
    return PairScores(
        pair_ids=embeds.text_ids,
        caption_numbers=torch.arange(len(scores)) - first_captions,
        scores=scores,
        keep=keep_above(scores, threshold),
        threshold=threshold.item(),
        num_skipped_images=embeds.num_skipped_images,
    )


def write_scores(path: str, dataset, pairs: PairScores, description: dict[str, str]) -> None:
    """
    Write a parquet file with one row a pair, lowest score first: pair_id, image, caption_number, caption, score, kept.

    Args:
        path: The file.
        dataset: The data set that was scored. `pair_id` is the number of an item; `image` is its path, or its row
            where it has no path.
        pairs: The scores.
        description: Written to the metadata of the file, together with the threshold.
    """
    items = {}
    for pair_id in pairs.pair_ids.unique().tolist():
        item = dataset[pair_id]
        items[pair_id] = (item["name"], item["captions"])
    order = pairs.scores.argsort(stable=True)
    ids, numbers = pairs.pair_ids[order].tolist(), pairs.caption_numbers[order].tolist()
    table = pa.table(
        {
            "pair_id": pa.array(ids, pa.int64()),
            "image": pa.array([items[pair_id][0] for pair_id in ids], pa.string()),
            "caption_number": pa.array(numbers, pa.int32()),
            "caption": pa.array([items[i][1][number] for i, number in zip(ids, numbers, strict=True)], pa.string()),
            "score": pa.array(pairs.scores[order].numpy().astype(np.float32)),
            "kept": pa.array(pairs.keep[order].numpy()),
        }
    )
    metadata = {**description, "threshold": repr(pairs.threshold)}
    pq.write_table(table.replace_schema_metadata(metadata), path)
