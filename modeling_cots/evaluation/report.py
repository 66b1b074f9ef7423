"""What a training script prints at its end: recall beside chance, and a few retrievals to look at."""

from .embedding import ExampleRetrievals
from .recall_table import recall_rows


def format_recall(metrics: dict[str, float], num_images: int, num_captions: int, modality: str = "image") -> str:
    """A table of the recalls in `metrics` (as `COTSTrainer.evaluate` returns them) beside those of a random order.

    Args:
        modality: What the captions describe, an "image" or a "video".
    """
    lines = [f"Retrieval among {num_images:,} {modality}s and {num_captions:,} captions, recall in percent (chance):"]
    for row in recall_rows(metrics, modality, num_images, num_captions):
        recalls = [f"R@{k} {recall:5.1f} ({row.chances[k]:.1f})" for k, recall in row.recalls.items()]
        lines.append(f"  {row.direction}:  " + "   ".join(recalls) + f"   median rank {row.median_rank:g}")
    return "\n".join(lines)


def format_report(
    metrics: dict[str, float], examples: ExampleRetrievals, dataset, *, modality: str = "image", num_folds: int = 1
) -> str:
    """The recalls on `dataset` and a few retrievals; with folds, chance is that among the candidates of one fold."""
    num_captions = sum(1 for _ in dataset.iter_captions())
    recall = format_recall(metrics, len(dataset) // num_folds, num_captions // num_folds, modality)
    return f"{recall}\n\n{format_example_retrievals(examples, dataset, modality)}"


def format_example_retrievals(examples: ExampleRetrievals, dataset, modality: str = "image") -> str:
    """A few captions of `dataset`, each with the images or videos found for it, which are shown by a caption."""
    lines = [f"What the model finds for a few captions among {examples.num_images:,} held-out {modality}s:"]
    for wanted, found in zip(examples.wanted, examples.found, strict=True):
        lines.append(f'  "{dataset[wanted]["captions"][0]}"')
        for place, pair_id in enumerate(found):
            item = dataset[pair_id]
            mark = f"  <- its own {modality}" if pair_id == wanted else ""
            lines.append(f'    {place + 1}. {item["name"]}: "{item["captions"][0]}"{mark}')
    return "\n".join(lines)
