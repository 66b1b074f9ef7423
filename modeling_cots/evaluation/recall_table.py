"""One table of what retrieval measured: recall of both directions beside that of a random order, and the ranks.

`report.py` renders it for the terminal and `hub/model_card.py` for a card. Metrics are named by modality: retrieval of
images has `i2t_...` and `t2i_...`, retrieval of videos `v2t_...` and `t2v_...`.
"""

from dataclasses import dataclass

from .retrieval_metrics import RECALL_AT, chance_recall

# For each modality the prefix of its metrics: first with the images or videos as queries, then with the captions.
PREFIXES = {"image": ("i2t", "t2i"), "video": ("v2t", "t2v")}


@dataclass(frozen=True)
class RecallRow:
    """
    What was measured in one direction.

    Args:
        direction: Such as "image to text".
        recalls: Recall in percent, by K.
        chances: Recall of a random order in percent, by K; empty where the numbers of candidates are not known.
        median_rank: Of the queries.
        mean_rank: Of the queries.
    """

    direction: str
    recalls: dict[int, float]
    chances: dict[int, float]
    median_rank: float
    mean_rank: float


def rename_metrics(metrics: dict[str, float], modality: str) -> dict[str, float]:
    """`metrics`, named for either modality, under the names that they have for `modality`; other names stay."""
    renamed = {}
    for name, value in metrics.items():
        for prefixes in PREFIXES.values():
            for prefix, wanted in zip(prefixes, PREFIXES[modality], strict=True):
                name = name.replace(prefix, wanted)
        renamed[name] = value
    return renamed


def recall_rows(
    metrics: dict[str, float], modality: str, num_items: int | None = None, num_captions: int | None = None
) -> list[RecallRow]:
    """
    The two rows of the table: images or videos to text, then text to them.

    Args:
        metrics: As `retrieval_metrics` returns them, named for either modality, with or without `eval_` before.
        modality: What the captions describe, an "image" or a "video".
        num_items: Number of images or videos; without it, or without `num_captions`, the rows have no chance.
        num_captions: Number of captions of all of them.
    """
    metrics = rename_metrics({name.removeprefix("eval_"): value for name, value in metrics.items()}, modality)
    num_items, num_captions = num_items or 0, num_captions or 0
    num_relevant = max(1, round(num_captions / num_items)) if num_items and num_captions else 0
    directions = (
        (f"{modality} to text", num_captions, num_relevant),
        (f"text to {modality}", num_items, 1),
    )
    return [
        RecallRow(
            direction,
            recalls={k: metrics[f"{prefix}_recall_at_{k}"] for k in RECALL_AT},
            chances={k: chance_recall(k, num_candidates, relevant) for k in RECALL_AT} if num_relevant else {},
            median_rank=metrics[f"{prefix}_median_rank"],
            mean_rank=metrics[f"{prefix}_mean_rank"],
        )
        for prefix, (direction, num_candidates, relevant) in zip(PREFIXES[modality], directions, strict=True)
    ]
