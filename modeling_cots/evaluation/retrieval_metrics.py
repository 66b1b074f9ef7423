"""Metrics of retrieval in both directions: recall at K, median and mean rank, with ties counted against the model.

Equal ids belong together, so an image may have several captions and a caption several images. A query's rank is that
of its best-placed relevant candidate among the irrelevant ones, as is usual for Flickr30k and COCO; `COTSRetrieval`
is the same as an `evaluate.Metric`, loaded from this very file: `evaluate.load("path/to/retrieval_metrics.py")`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import evaluate
import numpy as np
import torch
from tqdm.auto import tqdm

RECALL_AT = (1, 5, 10)

# For each protocol the numbers of images or videos and of captions in its test set.
PROTOCOLS = {
    "flickr8k-1k": (1_000, 5_000),
    "flickr30k-1k": (1_000, 5_000),
    "coco-5k": (5_000, 25_010),
    "coco-1k": (5_000, 25_010),  # the mean over 5 folds of 1,000 images each
    "msrvtt-full": (2_990, 59_800),
    "msrvtt-1ka": (1_000, 1_000),
}
COCO_NUM_FOLDS = 5

# Scores that differ by less than this are ties. Equal embeddings may score differently in the last bits, depending on
# their place in a matrix product, and a collapsed model would win by rounding.
TIE_TOLERANCE = 1e-6


# Queries of a chunk, and candidates for each of them. A chunk of scores fits the cache of a CPU, and there are enough
# chunks to share: 5,000 queries make 10.
CHUNK_SIZE, CANDIDATES_PER_QUERY = 512, 8
BAR_DELAY = 5  # seconds after which a progress bar is worth a line


def best_positive_ranks(
    query_embeds: torch.Tensor,
    candidate_embeds: torch.Tensor,
    query_ids: torch.Tensor,
    candidate_ids: torch.Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = False,
) -> torch.Tensor:
    """
    Rank of the best relevant candidate of every query: 1 + the irrelevant candidates that score at least as high
    (to within `TIE_TOLERANCE`).

    Args:
        query_embeds: (Q, d), unit length, any floating type; scores are dot products in float32.
        candidate_embeds: (C, d), on the same device.
        query_ids: (Q,) int64.
        candidate_ids: (C,) int64; a candidate is relevant to the queries with its id.
        chunk_size: Scores of `chunk_size` queries and 8 times as many candidates are held at a time, so that the peak
            is 40 * `chunk_size`^2 bytes (10 MB by default) beside the embeddings, the ranks, float32 copies of the
            embeddings of two chunks, and 26 bytes a candidate to find the relevant ones. It grows with C by these
            alone, and not otherwise with Q.
        process_index, num_processes: Of several processes with the same embeddings each ranks whole chunks of queries,
            every `num_processes`-th; the ranks of the other queries are 0. So each product has the shape that it has
            in one process, and the sum over the processes is what one process returns.
        progress: Whether to show a progress bar, if it takes more than a few seconds.

    Returns (Q,) int64 ranks from 1, on that device. Raises `ValueError` for no queries, for embeddings without an id
    each, for embeddings that are not finite, which compare with nothing, and for a query without a relevant candidate.
    """
    _check_embeds("query", query_embeds, query_ids, chunk_size)
    _check_embeds("candidate", candidate_embeds, candidate_ids, chunk_size)
    if len(query_embeds) == 0:
        raise ValueError("There are no queries, so there is nothing to rank.")
    if not torch.isin(query_ids, candidate_ids).all():
        raise ValueError("A query has no relevant candidate: its id is not among the candidates' ids.")
    ranks = torch.zeros(len(query_embeds), dtype=torch.int64, device=query_embeds.device)
    chunks = list(_chunks(len(query_embeds), chunk_size))[process_index::num_processes]
    # Autocast would compute products with too few digits to tell ties from differences, and so would TF32.
    with torch.autocast(query_embeds.device.type, enabled=False), full_float32():
        for rows in tqdm(chunks, desc="Ranking", disable=not progress, delay=BAR_DELAY, leave=False):
            ranks[rows] = _ranks_of_chunk(
                query_embeds[rows].float(),
                candidate_embeds,
                query_ids[rows],
                candidate_ids,
                CANDIDATES_PER_QUERY * chunk_size,
            )
    return ranks


def _ranks_of_chunk(
    queries: torch.Tensor,
    candidate_embeds: torch.Tensor,
    query_ids: torch.Tensor,
    candidate_ids: torch.Tensor,
    num_candidates: int,
) -> torch.Tensor:
    """Ranks (q,) of a few queries, with the scores of `num_candidates` candidates at a time."""
    relevant = torch.isin(candidate_ids, query_ids).nonzero().squeeze(1)  # to any of these queries
    query_ids = query_ids.unsqueeze(1)
    best = torch.full((len(queries), 1), -torch.inf, device=queries.device)
    for columns in relevant.split(num_candidates):
        scores = _scores_without(query_ids != candidate_ids[columns], queries, candidate_embeds[columns])
        best = torch.maximum(best, scores.amax(dim=1, keepdim=True))
        del scores  # otherwise two chunks of scores would be in memory at once
    ranks = torch.ones(len(queries), dtype=torch.int64, device=queries.device)
    for columns in _chunks(len(candidate_embeds), num_candidates):
        scores = _scores_without(query_ids == candidate_ids[columns], queries, candidate_embeds[columns])
        # In place to zeros and ones: summing booleans would copy them to int64 first.
        ranks += scores.ge_(best - TIE_TOLERANCE).sum(dim=1).long()
        del scores
    return ranks


def _scores_without(left_out: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """(q, c) float32 dot products, -inf where `left_out` (q, c) says so."""
    return (queries @ candidates.float().t()).masked_fill_(left_out, -torch.inf)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in the block keep all digits, whatever the process has chosen for speed."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        chosen = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(chosen)
        return
    # torch makes the second attribute when it is imported, which no type checker sees.
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    settings = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting


def _check_embeds(name: str, embeds: torch.Tensor, ids: torch.Tensor, chunk_size: int) -> None:
    if len(embeds) != len(ids):
        raise ValueError(f"Every {name} needs an id: got {len(embeds)} {name} embeddings and {len(ids)} ids.")
    if not all(torch.isfinite(embeds[rows]).all() for rows in _chunks(len(embeds), chunk_size)):
        raise ValueError(f"The {name} embeddings are not finite: the model that made them has diverged.")


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def rank_statistics(ranks: torch.Tensor) -> dict[str, float]:
    """Recall at 1, 5, 10 in percent, median rank (of an even number the mean of the middle two) and mean rank."""
    ranks = ranks.cpu().numpy()
    statistics = {f"recall_at_{k}": 100.0 * float((ranks <= k).mean()) for k in RECALL_AT}
    return statistics | {"median_rank": float(np.median(ranks)), "mean_rank": float(ranks.mean())}


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_ids: torch.Tensor,
    text_ids: torch.Tensor,
    *,
    protocol: str | None = None,
    find_ranks: Callable[..., torch.Tensor] = best_positive_ranks,
) -> dict[str, float]:
    """
    Image-to-text (`i2t_...`) and text-to-image (`t2i_...`) retrieval; videos take the place of images unchanged.

    Args:
        image_embeds: (N, d).
        text_embeds: (C, d).
        image_ids: (N,) int64.
        text_ids: (C,) int64, the id of the image that a caption describes.
        protocol: One of `PROTOCOLS`, or None for a data set without a name.
        find_ranks: Gives the ranks of all queries as `best_positive_ranks` does, of the same four arguments: several
            processes may find them together.

    Returns `{i2t,t2i}_recall_at_{1,5,10}` in percent, `{i2t,t2i}_{median,mean}_rank`, and `recall_sum`, the sum of the
    six recalls. Raises `ValueError` where the counts are not those of the protocol.
    """
    if protocol is not None:
        check_protocol(protocol, len(image_embeds), len(text_embeds))
    if protocol == "coco-1k":
        folds = _coco_folds(image_ids, text_ids)
        results = [
            retrieval_metrics(image_embeds[i], text_embeds[t], image_ids[i], text_ids[t], find_ranks=find_ranks)
            for i, t in folds
        ]
        return {name: sum(result[name] for result in results) / len(results) for name in results[0]}
    i2t = find_ranks(image_embeds, text_embeds, image_ids, text_ids)
    t2i = find_ranks(text_embeds, image_embeds, text_ids, image_ids)
    metrics = {f"i2t_{name}": value for name, value in rank_statistics(i2t).items()}
    metrics |= {f"t2i_{name}": value for name, value in rank_statistics(t2i).items()}
    metrics["recall_sum"] = sum(metrics[f"{side}_recall_at_{k}"] for side in ("i2t", "t2i") for k in RECALL_AT)
    return metrics


def chance_recall(k: int, num_candidates: int, num_relevant: int = 1) -> float:
    """Recall at k, in percent, of a random order of candidates of which `num_relevant` are relevant."""
    miss = 1.0
    for drawn in range(min(k, num_candidates)):
        miss *= max(0, num_candidates - num_relevant - drawn) / (num_candidates - drawn)
    return 100.0 * (1 - miss)


def check_protocol(protocol: str, num_images: int, num_texts: int) -> None:
    """Raise `ValueError` for a name that is not in `PROTOCOLS`, and for other counts than those of the protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"No protocol is called {protocol!r}; there are {', '.join(PROTOCOLS)}.")
    if (num_images, num_texts) != PROTOCOLS[protocol]:
        expected = "{:,} images or videos and {:,} captions".format(*PROTOCOLS[protocol])
        raise ValueError(f"{protocol} has {expected}, got {num_images:,} and {num_texts:,}: this is another test set.")


def _coco_folds(image_ids: torch.Tensor, text_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positions of the images and captions of each fold: consecutive runs of 1,000 images, as the field does."""
    folds = []
    for positions in torch.arange(len(image_ids), device=image_ids.device).chunk(COCO_NUM_FOLDS):
        folds.append((positions, torch.isin(text_ids, image_ids[positions]).nonzero().squeeze(1)))
    return folds


class COTSRetrieval(evaluate.Metric):
    """
    The same metrics for `evaluate`. A batch has an image embedding and the embeddings of all its captions in each row.

    ```python
    >>> metric = evaluate.load("modeling_cots/evaluation/retrieval_metrics.py")
    >>> metric.add_batch(predictions=image_embeds, references=caption_embeds)  # (B, d), and per image (captions, d)
    >>> metric.compute()
    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Recall at K, median and mean rank of image-text retrieval in both directions.",
            citation="Lu et al., COTS: Collaborative Two-Stream Vision-Language Pre-Training, CVPR 2022.",
            inputs_description="predictions: image embeddings; references: the embeddings of each image's captions.",
            features=datasets.Features({"predictions": vector, "references": datasets.Sequence(vector)}),
        )

    def _compute(self, predictions, references, protocol: str | None = None) -> dict[str, float]:
        image_ids = torch.arange(len(predictions))
        text_ids = image_ids.repeat_interleave(torch.tensor([len(captions) for captions in references]))
        texts = torch.tensor(np.array([embed for captions in references for embed in captions]), dtype=torch.float32)
        images = torch.tensor(np.array(predictions), dtype=torch.float32)
        return retrieval_metrics(images, texts, image_ids, text_ids, protocol=protocol)
