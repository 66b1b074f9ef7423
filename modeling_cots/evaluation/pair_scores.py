"""Scoring the pairs of a data set as the adaptive momentum filter does in training, to clean the data set with.

The score of a pair is the similarity of its two momentum embeddings; the threshold is mean - k * std, here of all the
scores of the data set where training has those of its queue (`filtering.py`). Drawing is in `score_images.py`.
"""

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

from ..configuration_cots import COTSConfig
from ..method.filtering import adaptive_momentum_filter
from ..method.momentum import MOMENTUM_STATE_NAME
from ..modeling_cots import COTSModel
from .embedding import embed_pairs

MOMENTUM_PREFIX = "encoder.model."  # of the momentum encoders in MomentumState


@dataclass
class PairScores:
    """
    Scores of the C pairs of a data set: each of its readable images with each of that image's captions.

    Args:
        pair_ids: (C,) int64, which item of the data set.
        caption_numbers: (C,) int64, which of its captions, from 0.
        scores: (C,) float32, cosine similarities.
        keep: (C,) bool, what the filter keeps.
        threshold: Below it the filter drops a pair.
        num_skipped_images: Images that could not be read; they are left out.
    """

    pair_ids: torch.Tensor
    caption_numbers: torch.Tensor
    scores: torch.Tensor
    keep: torch.Tensor
    threshold: float
    num_skipped_images: int


def load_scoring_model(name_or_path: str) -> tuple[COTSModel, str]:
    """
    The model that scores pairs, in evaluation mode, and which one it is, in words.

    Of a training checkpoint (`checkpoint-*`) it is the momentum copy, as in training; of anything else, which has
    none, the model itself. Raises `ValueError` for a momentum copy that does not fit the configuration beside it.
    """
    path = os.path.join(name_or_path, MOMENTUM_STATE_NAME)
    if not os.path.isfile(path):
        return COTSModel.from_pretrained(name_or_path).eval(), f"the model {name_or_path}, which has no momentum copy"
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
    model, dataset, processor, accelerator, *, batch_size: int = 64, max_text_length: int, num_std: float = 2.0
) -> PairScores:
    """
    Score every pair of `dataset` (items as `open_pairs` gives them), and filter at k = `num_std`.

    All embeddings are held at once: 2 KB for an image with one caption at d = 256. Raises `ValueError` if no image can
    be read.
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
    keep, threshold = adaptive_momentum_filter(scores, scores, num_std)
    first_captions = torch.searchsorted(embeds.text_ids, embeds.text_ids)
    return PairScores(
        pair_ids=embeds.text_ids,
        caption_numbers=torch.arange(len(scores)) - first_captions,
        scores=scores,
        keep=keep,
        threshold=threshold.item(),
        num_skipped_images=embeds.num_skipped_images,
    )


def write_scores(path: str, dataset, pairs: PairScores, description: dict[str, str]) -> None:
    """
    A parquet file with one row a pair, lowest score first: pair_id, image, caption_number, caption, score, kept.

    `pair_id` is the item's number in the data set and `image` its path, or its row where it has none. `description`
    and the threshold stand in the file's metadata.
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
