"""Draw what a model trained on `scenes` finds: four captions of held-out images, and five images for each.

    python docs/draw_retrieval.py runs/quickstart retrieval.png

The image that a caption was written for has a green frame. draw_pages.py draws photographs in the same way.
"""

import sys

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont, ImageOps
from transformers import AutoProcessor

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.evaluation.embedding import embed_pairs
from modeling_cots.image_reading_cots import read_image
from modeling_cots.scripts.error_boundary import run_script

NUM_FOUND, SIDE, GAP = 5, 128, 12
CAPTION_HEIGHT = 26


def draw_found(model_path: str, pairs, wanted: list[int], image_path, shown=None) -> None:
    """
    A sheet with the shortest caption of each wanted item, and the images that the model finds for it.

    Args:
        pairs: The data set, whose images are searched.
        wanted: The items.
        shown: The same data set at the size to be drawn.
    """
    model, processor = COTSModel.from_pretrained(model_path), AutoProcessor.from_pretrained(model_path)
    embeds = embed_pairs(model, pairs, processor, Accelerator(), batch_size=100, max_text_length=48)
    row_height = CAPTION_HEIGHT + SIDE + GAP
    sheet = Image.new("RGB", (NUM_FOUND * (SIDE + GAP) + GAP, len(wanted) * row_height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    shown = pairs if shown is None else shown
    for row, item in enumerate(wanted):
        captions = shown[item]["captions"]
        shortest = min(range(len(captions)), key=lambda number, captions=captions: len(captions[number]))
        position = int((embeds.text_ids == item).nonzero()[shortest])
        top = row * row_height + GAP
        draw.text((GAP, top), captions[shortest], "black", font)
        found = (embeds.image_embeds @ embeds.text_embeds[position]).topk(NUM_FOUND).indices.tolist()
        for column, image_row in enumerate(found):
            left, upper = GAP + column * (SIDE + GAP), top + CAPTION_HEIGHT
            image_id = int(embeds.image_ids[image_row])
            sheet.paste(ImageOps.fit(read_image(shown[image_id]["image"]), (SIDE, SIDE)), (left, upper))
            if image_id == item:
                draw.rectangle((left - 4, upper - 4, left + SIDE + 3, upper + SIDE + 3), outline="limegreen", width=4)
    sheet.save(image_path)


def main(model_path: str, image_path: str) -> None:
    size = COTSModel.config_class.from_pretrained(model_path).image_size[0]
    scenes, shown = ScenesDataset("validation", image_size=size), ScenesDataset("validation", image_size=SIDE)
    draw_found(model_path, scenes, [50 * row + 7 for row in range(4)], image_path, shown)


if __name__ == "__main__":
    torch.manual_seed(0)
    run_script(lambda: main(*sys.argv[1:]))
