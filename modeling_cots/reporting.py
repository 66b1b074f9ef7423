"""What a training script prints at its end: recall beside chance, and a few retrievals to look at."""

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from .evaluation import embed_pairs
from .retrieval_metrics import RECALL_AT, chance_recall

NUM_QUERIES, NUM_FOUND, GALLERY_SIZE = 3, 3, 500


def format_recall(metrics: dict[str, float], num_images: int, num_captions: int) -> str:
    """A table of the recalls in `metrics` (as `COTSTrainer.evaluate` returns them) beside those of a random order."""
    num_relevant = min(num_captions, max(1, round(num_captions / num_images)))
    lines = [f"Retrieval among {num_images:,} images and {num_captions:,} captions, recall in percent (chance):"]
    directions = (
        ("image to text", "i2t", num_captions, num_relevant),
        ("text to image", "t2i", num_images, 1),
    )
    for title, name, num_candidates, relevant in directions:
        recalls = [
            f"R@{k} {metrics[f'eval_{name}_recall_at_{k}']:5.1f} ({chance_recall(k, num_candidates, relevant):.1f})"
            for k in RECALL_AT
        ]
        lines.append(f"  {title}:  " + "   ".join(recalls) + f"   median rank {metrics[f'eval_{name}_median_rank']:g}")
    return "\n".join(lines)


def format_example_retrievals(model, dataset, processor, max_text_length: int) -> str:
    """Three captions with the pictures that a [`COTSModel`] finds for them, each told by a caption of its own."""
    gallery = Subset(dataset, range(min(GALLERY_SIZE, len(dataset))))
    embeds = embed_pairs(
        model, gallery, processor, Accelerator(), batch_size=64, max_text_length=max_text_length, progress=False
    )
    items = {item["pair_id"]: item for item in gallery}
    lines = [f"What the model finds for three captions among {len(embeds.image_ids)} held-out pictures:"]
    for row in torch.linspace(0, len(embeds.image_ids) - 1, NUM_QUERIES).long().tolist():
        wanted = int(embeds.image_ids[row])
        position = int((embeds.text_ids == wanted).nonzero()[0])
        lines.append(f'  "{items[wanted]["captions"][0]}"')
        for place, column in enumerate((embeds.image_embeds @ embeds.text_embeds[position]).topk(NUM_FOUND).indices):
            found = int(embeds.image_ids[column])
            mark = "  <- the pictured one" if found == wanted else ""
            lines.append(f'    {place + 1}. {items[found]["name"]}: "{items[found]["captions"][0]}"{mark}')
    return "\n".join(lines)


__all__ = ["format_example_retrievals", "format_recall"]
