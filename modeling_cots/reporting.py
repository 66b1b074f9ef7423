"""What a training script prints at its end: recall beside chance, and a few retrievals to look at."""

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from .evaluation import embed_pairs
from .retrieval_metrics import RECALL_AT, chance_recall

NUM_QUERIES, NUM_FOUND, GALLERY_SIZE, BATCH_SIZE = 3, 3, 500, 32


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


def format_example_retrievals(model, dataset, processor, max_text_length: int, unit: str = "picture") -> str:
    """Three captions with the pictures (or what `unit` calls them) that a [`COTSModel`] finds for them, each told by a
    caption of its own."""
    gallery = Subset(dataset, range(min(GALLERY_SIZE, len(dataset))))
    embeds = embed_pairs(
        model,
        gallery,
        processor,
        Accelerator(),
        batch_size=BATCH_SIZE,
        max_text_length=max_text_length,
        progress=False,
    )
    items = {item["pair_id"]: item for item in gallery}
    lines = [f"What the model finds for three captions among {len(embeds.image_ids)} held-out {unit}s:"]
    for row in torch.linspace(0, len(embeds.image_ids) - 1, NUM_QUERIES).long().unique().tolist():
        wanted = int(embeds.image_ids[row])
        position = int((embeds.text_ids == wanted).nonzero()[0])
        lines.append(f'  "{items[wanted]["captions"][0]}"')
        scores = embeds.image_embeds @ embeds.text_embeds[position]
        for place, column in enumerate(scores.topk(min(NUM_FOUND, len(scores))).indices):
            found = int(embeds.image_ids[column])
            mark = f"  <- its own {unit}" if found == wanted else ""
            lines.append(f'    {place + 1}. {items[found]["name"]}: "{items[found]["captions"][0]}"{mark}')
    return "\n".join(lines)


__all__ = ["format_example_retrievals", "format_recall"]
