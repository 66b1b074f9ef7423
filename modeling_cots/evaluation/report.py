"""What a training script prints at its end: recall beside chance, and a few retrievals to look at."""

from .embedding import ExampleRetrievals
from .retrieval_metrics import RECALL_AT, chance_recall


def format_recall(metrics: dict[str, float], num_images: int, num_captions: int, unit: str = "image") -> str:
    """A table of the recalls in `metrics` (as `COTSTrainer.evaluate` returns them) beside those of a random order.

    Args:
        unit: What the captions tell of, an "image" or a "video".
    """
    num_relevant = min(num_captions, max(1, round(num_captions / num_images)))
    lines = [f"Retrieval among {num_images:,} {unit}s and {num_captions:,} captions, recall in percent (chance):"]
    directions = (
        (f"{unit} to text", "i2t", num_captions, num_relevant),
        (f"text to {unit}", "t2i", num_images, 1),
    )
    for title, name, num_candidates, relevant in directions:
        recalls = [
            f"R@{k} {metrics[f'eval_{name}_recall_at_{k}']:5.1f} ({chance_recall(k, num_candidates, relevant):.1f})"
            for k in RECALL_AT
        ]
        lines.append(f"  {title}:  " + "   ".join(recalls) + f"   median rank {metrics[f'eval_{name}_median_rank']:g}")
    return "\n".join(lines)


def format_report(
    metrics: dict[str, float], examples: ExampleRetrievals, dataset, *, unit: str = "image", num_folds: int = 1
) -> str:
    """The recalls on `dataset` and a few retrievals; of folds, chance is that among the candidates of one fold."""
    num_captions = sum(1 for _ in dataset.iter_captions())
    recall = format_recall(metrics, len(dataset) // num_folds, num_captions // num_folds, unit)
    return f"{recall}\n\n{format_example_retrievals(examples, dataset, unit)}"


def format_example_retrievals(examples: ExampleRetrievals, dataset, unit: str = "image") -> str:
    """A few captions of `dataset` with the images or videos found for them, each told by a caption of its own."""
    word = "image" if unit == "image" else unit
    lines = [f"What the model finds for a few captions among {examples.num_images:,} held-out {word}s:"]
    for wanted, found in zip(examples.wanted, examples.found, strict=True):
        lines.append(f'  "{dataset[wanted]["captions"][0]}"')
        for place, pair_id in enumerate(found):
            item = dataset[pair_id]
            mark = f"  <- its own {word}" if pair_id == wanted else ""
            lines.append(f'    {place + 1}. {item["name"]}: "{item["captions"][0]}"{mark}')
    return "\n".join(lines)
