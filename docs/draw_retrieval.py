"""Draw what a model trained on `scenes` finds: four captions of held-out images, and five images for each.

    python docs/draw_retrieval.py runs/quickstart docs/retrieval.png

The image that a caption was written for has a green frame.
"""

import sys

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoProcessor

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.evaluation.embedding import embed_pairs
from modeling_cots.scripts.error_boundary import run_script

NUM_QUERIES, NUM_FOUND, SIDE, GAP = 4, 5, 128, 12
CAPTION_HEIGHT = 26


def main(model_path: str, image_path: str) -> None:
    model, processor = COTSModel.from_pretrained(model_path), AutoProcessor.from_pretrained(model_path)
    scenes = ScenesDataset("validation", image_size=model.config.image_size[0])
    embeds = embed_pairs(model, scenes, processor, Accelerator(), batch_size=100, max_text_length=48)
    row_height = CAPTION_HEIGHT + SIDE + GAP
    sheet = Image.new("RGB", (NUM_FOUND * (SIDE + GAP) + GAP, NUM_QUERIES * row_height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    large = ScenesDataset("validation", image_size=SIDE)
    for row in range(NUM_QUERIES):
        wanted = 50 * row + 7
        captions = large[wanted]["captions"]
        shortest = min(range(len(captions)), key=lambda number, captions=captions: len(captions[number]))
        position = int((embeds.text_ids == wanted).nonzero()[shortest])
        top = row * row_height + GAP
        draw.text((GAP, top), captions[shortest], "black", font)
        found = (embeds.image_embeds @ embeds.text_embeds[position]).topk(NUM_FOUND).indices.tolist()
        for column, image_row in enumerate(found):
            left, upper = GAP + column * (SIDE + GAP), top + CAPTION_HEIGHT
            image_id = int(embeds.image_ids[image_row])
            sheet.paste(large[image_id]["image"], (left, upper))
            if image_id == wanted:
                draw.rectangle((left - 4, upper - 4, left + SIDE + 3, upper + SIDE + 3), outline="limegreen", width=4)
    sheet.save(image_path)


if __name__ == "__main__":
    torch.manual_seed(0)
    run_script(lambda: main(*sys.argv[1:]))
