"""A web page for searching images by text and texts by image, and for seeing where the model finds a word.

    python demo/app.py                                   # runs/quickstart and its images; nothing is downloaded
    python demo/app.py --model runs/mine --dataset PHOTOS/ --split validation

In a Space the variables COTS_MODEL, COTS_REVISION, COTS_DATASET and COTS_SPLIT set the options; demo/README.md says
how to make one. Nothing is sent to other servers: Gradio's analytics are off, and the page uses the machine's fonts.
"""

import argparse
import os
import sys
from dataclasses import dataclass

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import Subset

from modeling_cots import COTSModel, COTSProcessor, ScenesDataset
from modeling_cots.data.opening import open_dataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.evaluation.embedding import PairEmbeddings, embed_pairs
from modeling_cots.image_reading_cots import UnreadableImageError, read_image
from modeling_cots.processing_cots import TOKENIZER_LOCK
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.visualization.heat_maps import overlay
from modeling_cots.visualization.relevance import explain_pair, find_words

NUM_IMAGES, NUM_TEXTS = 8, 5
MAX_IMAGES = 5_000  # held in memory and embedded at the start
SHOWN_SIDE = 256
MAX_TEXT = 300
CSS = """
.gradio-container {max-width: 60rem !important; margin: auto}
label.float {position: static !important; display: inline-flex !important}
#found .grid-wrap {max-height: none !important; overflow: visible}
#found .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important}
#found .thumbnail-item {aspect-ratio: auto; height: auto; display: block}
#found .thumbnail-item img {aspect-ratio: 1; height: auto}
#found .caption-label {position: static; max-width: none; white-space: normal; overflow: visible; text-align: left}
#word label, #texts label {overflow-wrap: anywhere}
#heat, #image {height: auto !important}
@media (max-width: 600px) {
  #found .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important}
  .gradio-container main {padding: .75rem !important}
}
"""
# Gradio does not tell a screen reader the names of the groups of choices, nor that a new map has appeared.
NAMES = """() => {
  for (const [id, name] of [["word", "Words"], ["texts", "Texts that fit it, best first"]]) {
    const group = document.getElementById(id)
    group.setAttribute("role", "radiogroup")
    group.setAttribute("aria-label", name)
  }
  for (const id of ["found", "heat"]) document.getElementById(id).setAttribute("aria-live", "polite")
}"""


@dataclass
class Collection:
    """A model, the images that it searches, and the embeddings of all images and captions."""

    model: COTSModel
    processor: COTSProcessor
    items: torch.utils.data.Dataset
    embeds: PairEmbeddings
    captions: list[str]

    def image(self, image_id: int) -> Image.Image:
        """The image of the item with this `pair_id`, scaled for showing."""
        image = read_image(self.items[image_id]["image"])
        image.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
        return image


def open_collection(
    model_path: str,
    dataset: str,
    split: str,
    *,
    revision: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
) -> Collection:
    """Load a model and embed the images and captions. Raises `ValueError` if there is no model."""
    if not os.path.isdir(model_path) and (os.path.isabs(model_path) or model_path.startswith("runs/")):
        raise ValueError(
            f"There is no model in {model_path!r}. Train the quick start in a few minutes\n\n"
            f"    python examples/run_pretraining.py examples/configs/quickstart.yaml\n\n"
            f"or name another one: python demo/app.py --model FOLDER_OR_HUB_ID"
        )
    # The maps need attention weights, which only eager attention returns.
    check_revision("model", model_path, revision)
    version = {"revision": revision or "main"}
    model = COTSModel.from_pretrained(model_path, attn_implementation="eager", **version).eval()
    processor = COTSProcessor.from_pretrained(model_path, **version)
    of_data = {"dataset_config": dataset_config, "revision": dataset_revision}
    images = open_dataset(dataset, split, image_size=model.config.image_size[0], **of_data)
    images = Subset(images, range(min(MAX_IMAGES, len(images))))
    embeds = embed_pairs(model, images, processor, Accelerator(), batch_size=32, max_text_length=64)
    kept = set(embeds.image_ids.tolist())
    captions = [caption for item in images if item["pair_id"] in kept for caption in item["captions"]]
    # Scenes can be drawn at any size: they are shown larger than the model reads them.
    items = ScenesDataset(split, image_size=SHOWN_SIDE) if dataset == "scenes" else images.dataset
    return Collection(model, processor, items, embeds, captions)


@torch.no_grad()
def find_images(collection: Collection, query: str) -> list[tuple[int, float]]:
    """The images that fit a text best, as pairs of `pair_id` and cosine."""
    inputs = collection.processor(text=[query], truncation=True, return_tensors="pt")
    embed = collection.model.encode_text(inputs["input_ids"], inputs["attention_mask"])[0]
    best = (collection.embeds.image_embeds @ embed).topk(min(NUM_IMAGES, len(collection.embeds.image_ids)))
    ids = collection.embeds.image_ids[best.indices].tolist()
    return list(zip(ids, best.values.tolist(), strict=True))


@torch.no_grad()
def find_texts(collection: Collection, image: Image.Image) -> list[tuple[str, float]]:
    """The captions that fit an image best, with their cosines."""
    pixels = collection.processor.image_processor([image], return_tensors="pt")["pixel_values"]
    scores = collection.embeds.text_embeds @ collection.model.encode_image(pixels)[0]
    found: dict[str, float] = {}
    for place in scores.argsort(descending=True).tolist():
        found.setdefault(collection.captions[place], scores[place].item())  # images may share a caption
        if len(found) == NUM_TEXTS:
            break
    return list(found.items())


def words_of(collection: Collection, caption: str) -> list[str]:
    """The words of a caption that the model reads, each once."""
    with TOKENIZER_LOCK:
        tokens = collection.processor.tokenizer(caption, truncation=True, return_offsets_mapping=True)
    return list(dict.fromkeys(word.text for word in find_words(caption, tokens["offset_mapping"])))


def open_upload(path: str) -> Image.Image:
    """An image that a visitor brought, as the model was trained to see it."""
    try:
        return read_image(path)
    except UnreadableImageError as error:
        raise gr.Error(f"This image cannot be read. {error}", print_exception=False) from error


class Page:
    """The actions of the page."""

    def __init__(self, collection: Collection):
        self.collection = collection

    def search(self, query: str):
        """The images for a text, their ids, the text as the caption of step 3, and the best image."""
        query = query.strip()[:MAX_TEXT]
        if not query:
            raise gr.Error("Type what the images should show.", print_exception=False)
        found = find_images(self.collection, query)
        shown = [
            (
                self.collection.image(image_id),
                f"{place}. ({score:.2f}) {self.collection.items[image_id]['captions'][0]}",
            )
            for place, (image_id, score) in enumerate(found, start=1)
        ]
        ids = [image_id for image_id, _ in found]
        return shown, ids, query, self.collection.image(ids[0])

    def choose(self, ids: list[int], event: gr.SelectData):
        """The found image that was clicked on."""
        return self.collection.image(ids[event.index])

    def describe(self, path: str | None):
        """The texts that fit the image in a file best, as choices; no text is chosen yet."""
        if path is None:
            return gr.update(choices=[], value=None), None
        texts = find_texts(self.collection, open_upload(path))
        return gr.update(choices=[(f"{text} ({score:.2f})", text) for text, score in texts], value=None), None

    def list_words(self, caption: str):
        """The words of the caption as choices; no word is chosen yet."""
        caption = (caption or "").strip()[:MAX_TEXT]
        return gr.update(choices=words_of(self.collection, caption) if caption else [], value=None), None

    def show_word(self, path: str | None, caption: str, word: str | None):
        """A heat map of where in the image in a file the model finds the word."""
        if path is None or not word:
            return None
        image = open_upload(path)
        relevance = explain_pair(
            self.collection.model, self.collection.processor, image, caption.strip()[:MAX_TEXT], [word]
        )
        image.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
        return gr.update(
            value=overlay(image, relevance.word_maps[0]),
            label=f"Where the model finds “{word}”",
            alt_text=f"Heat map over the image: bright where the model finds {word}",
        )


def build(collection: Collection, examples: list[str]) -> gr.Blocks:
    """The page: its three steps from top to bottom, and which action runs at which event."""
    page = Page(collection)
    with gr.Blocks(title="COTS: search images with words") as blocks:
        gr.Markdown(
            f"# Search images with words\nA COTS model and {len(collection.embeds.image_ids):,} images. "
            "Search with a text, pick an image, then click on a word."
        )
        query, search, found = build_search(examples)
        ids = gr.State([])
        image, texts = build_image()
        caption, word, heat = build_words()
        gr.on([search.click, query.submit], page.search, query, [found, ids, caption, image], api_name="find_images")
        found.select(page.choose, ids, image, api_visibility="private")
        image.change(page.describe, image, [texts, heat], api_name="find_texts")
        texts.input(lambda text: text, texts, caption, api_visibility="private")
        caption.change(page.list_words, caption, [word, heat], api_visibility="private")
        # A new image resets the chosen word, whose map shows the old image.
        image.change(lambda: None, None, word, api_visibility="private")
        word.input(page.show_word, [image, caption, word], heat, api_name="show_word")
        blocks.load(None, js=NAMES)
    return blocks


def build_search(examples: list[str]) -> tuple[gr.Textbox, gr.Button, gr.Gallery]:
    """Step 1: a box for the query, a button, and a gallery of the images found."""
    gr.Markdown("## 1. From a text to images")
    query = gr.Textbox(label="What should the images show?", max_length=MAX_TEXT, submit_btn=False, elem_id="query")
    search = gr.Button("Find images", variant="primary", elem_id="search")
    gr.Examples(examples, query, label="For example")
    found = gr.Gallery(
        label="Images found, best first",
        columns=4,
        height="auto",
        allow_preview=False,
        buttons=[],
        elem_id="found",
    )
    return query, search, found


def build_image() -> tuple[gr.Image, gr.Radio]:
    """Step 2: the chosen image, and the texts that fit it."""
    gr.Markdown("## 2. From an image to texts\nClick on an image above, or bring your own.")
    image = gr.Image(
        label="Image",
        type="filepath",
        image_mode=None,  # the file as it is: Gradio would clip 16 bits a pixel
        format="png",  # without loss, so that the model is given exactly this image
        sources=["upload", "clipboard"],
        height=SHOWN_SIDE + 40,
        buttons=[],
        alt_text="The chosen image",
        elem_id="image",
    )
    return image, gr.Radio(label="Texts that fit it, best first", elem_id="texts")


def build_words() -> tuple[gr.Textbox, gr.Radio, gr.Image]:
    """Step 3: a caption, its words, and the heat map of the chosen word."""
    gr.Markdown("## 3. From a word to its place\nWrite a caption or pick a text above, then click on a word of it.")
    caption = gr.Textbox(label="Caption", max_length=MAX_TEXT, elem_id="caption")
    word = gr.Radio(label="Words", elem_id="word")
    heat = gr.Image(
        label="Where the model finds the word",
        format="png",
        interactive=False,
        buttons=[],
        height=SHOWN_SIDE + 40,
        elem_id="heat",
    )
    return caption, word, heat


def launch(collection: Collection, examples: list[str], **options):
    """Serve the page; `options` are passed to Gradio's `launch`."""
    fonts = ["system-ui", "sans-serif"]  # Gradio's default fonts would be downloaded
    theme = gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])
    return build(collection, examples).launch(
        theme=theme, css=CSS, max_file_size="20mb", footer_links=[], ssr_mode=False, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("COTS_MODEL", "runs/quickstart"), help="folder or Hub id")
    parser.add_argument(
        "--revision",
        "--model_revision",
        default=os.environ.get("COTS_REVISION"),
        help="branch, tag or commit of a Hub id",
    )
    parser.add_argument("--dataset", default=os.environ.get("COTS_DATASET", "scenes"), help="the data set to search")
    parser.add_argument("--dataset_config", help="configuration of a Hub id, if it has several")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--split", default=os.environ.get("COTS_SPLIT", "validation"), help="the split to search")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    args = parser.parse_args()
    try:
        collection = open_collection(
            args.model,
            args.dataset,
            args.split,
            revision=args.revision,
            dataset_config=args.dataset_config,
            dataset_revision=args.dataset_revision,
        )
    except ValueError as error:
        sys.exit(str(error))
    examples = collection.captions[3 : 15 * NUM_TEXTS : 3 * NUM_TEXTS]
    if args.dataset == "scenes":
        examples = [
            "a large purple square",
            "a small red star above a blue circle",
            "a yellow heart on a striped wall",
        ]
    launch(collection, examples, server_port=args.port)


if __name__ == "__main__":
    run_script(main)
