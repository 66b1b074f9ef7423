"""What a two-stream model saves over a cross-encoder, ratio 7: every pair through one joint transformer.

    python benchmarks/cross_encoder.py                  # one pair at a time, base size
    python benchmarks/cross_encoder.py --device cuda

The cross-encoder is transformers' `ViltModel` at BERT-base's size, over 577 patches and the caption's tokens.
Candidates of the two-stream model are encoded beforehand, so a query is one text encoding and 5,000 dot products; the
cross-encoder has nothing to keep but embedded patches, and runs all 5,000 pairs. Embedding patches is 1 % of its
operations and not in its time, as transformers' ViLT then chooses among them image by image, in Python. The whole
evaluation is COCO's, 5,000 images by 25,010 captions: every image and caption encoded once and one matrix product,
against 125 million joint passes. Totals follow from timed batches: the time of a batch times their number.
"""

from dataclasses import dataclass

import torch
from side_by_side import medians, row, run_alone
from transformers import ViltConfig, ViltModel

from modeling_cots import COTSConfig, COTSModel

QUICK_ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NUM_IMAGES, NUM_TEXTS, TEXT_LENGTH = 5000, 25_010, 16  # 14.4 tokens a caption, rounded up to a bucket


@dataclass
class Sizes:
    """Pairs, images and captions in a timed batch."""

    encoder: dict
    image_size: int
    pairs: int
    images: int
    texts: int
    dtype: torch.dtype
    rounds: int


def choose_sizes(device: str, quick: bool) -> Sizes:
    """Full batches on a GPU, one pair on a CPU, or next to nothing."""
    if quick:
        return Sizes(QUICK_ENCODER, 32, 2, 2, 4, torch.float32, 2)
    if device == "cpu":
        return Sizes({}, 384, 1, 1, 16, torch.float32, 5)
    return Sizes({}, 384, 128, 256, 2048, torch.bfloat16, 7)


def build_sides(device: str, sizes: Sizes) -> dict:
    """The timed calls; each takes a batch of the sizes, the query one caption."""
    vision = {**sizes.encoder, "image_size": sizes.image_size, "patch_size": 16}
    model = COTSModel(COTSConfig(text_config=sizes.encoder, vision_config=vision)).eval().to(device, sizes.dtype)
    # ViLT draws its patches up to a maximum unless told not to; all of them count here.
    vilt = ViltModel(ViltConfig(**vision, max_image_length=-1), add_pooling_layer=False)
    vilt = vilt.eval().to(device, sizes.dtype)
    pixels = torch.randn(
        max(sizes.pairs, sizes.images), 3, sizes.image_size, sizes.image_size, device=device, dtype=sizes.dtype
    )
    ids = torch.randint(1000, 30_000, (max(sizes.pairs, sizes.texts), TEXT_LENGTH), device=device)
    mask = torch.ones_like(ids)
    candidates = torch.nn.functional.normalize(torch.randn(NUM_IMAGES, model.config.projection_dim, device=device))
    captions = torch.nn.functional.normalize(torch.randn(NUM_TEXTS, model.config.projection_dim, device=device))
    joint = {"input_ids": ids[: sizes.pairs], "attention_mask": mask[: sizes.pairs]}
    joint.update(embed_patches(vilt, pixels[: sizes.pairs]))
    return {
        "joint": lambda: vilt(**joint),
        "query": lambda: model.encode_text(ids[:1], mask[:1]) @ candidates.T,
        "images": lambda: model.encode_image(pixels[: sizes.images]),
        "texts": lambda: model.encode_text(ids[: sizes.texts], mask[: sizes.texts]),
        "product": lambda: captions @ candidates.T,
    }


def embed_patches(vilt: ViltModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """[CLS] and all patches of pixels (B, 3, H, W) with their places, as `ViltModel` takes them in place of pixels."""
    is_image = torch.ones(len(pixels), *pixels.shape[-2:], device=pixels.device)
    patches = vilt.embeddings.visual_embed(pixels, is_image, max_image_length=vilt.config.max_image_length)[0]
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device)
    return {"image_embeds": patches, "pixel_mask": mask}


@torch.inference_mode()
def measure(device: str, quick: bool) -> list[dict]:
    """Rows 7: one query, and a whole evaluation."""
    torch.manual_seed(0)
    sizes = choose_sizes(device, quick)
    times = medians(build_sides(device, sizes), device, sizes.rounds)
    pair = times["joint"] / sizes.pairs
    two_streams = (
        times["images"] / sizes.images * NUM_IMAGES + times["texts"] / sizes.texts * NUM_TEXTS + times["product"]
    )
    patches = (sizes.image_size // 16) ** 2
    note = (
        f"ViltModel over 1 + {patches} + {TEXT_LENGTH} tokens, extrapolated from batches of {sizes.pairs}; patches "
        "embedded beforehand, as its choice among them loops over images in Python; its attention is not fused"
    )
    query_note = f"{note}; the query is one caption"
    if device != "cpu":
        query_note += ", whose time on a GPU is that of launching its kernels"
    title = "time of a cross-encoder / two streams"
    return [
        row("7", f"{title}: one query over 5,000", pair * NUM_IMAGES / times["query"], ">= 10,800", query_note),
        row("7", f"{title}: 5k x 25k", pair * NUM_IMAGES * NUM_TEXTS / two_streams, ">= 2,000", note),
    ]


if __name__ == "__main__":
    run_alone(measure, __doc__)
