"""A web page for searching images by text and by image, and for seeing where the model finds a word.

    python demo/app.py                                   # the toy of the quick start and its images; no download
    python demo/app.py --images FOLDER --model M         # your photographs; embedded at the first start
    python demo/app.py --index IDX                       # an index of `cots-search`, with its own model
    python demo/app.py --model M --dataset DATA --split train

What is embedded is kept for the next start, in a folder that is printed; new images are added then. In a Space the
variables COTS_MODEL, COTS_REVISION, COTS_DATASET and COTS_SPLIT set the options; demo/README.md says how to make one.
Nothing is sent to other servers: Gradio's analytics are off, and the page uses the machine's fonts.
"""

import argparse
import functools
import hashlib
import io
import json
import os
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from modeling_cots import COTSModel, COTSProcessor, ScenesDataset, SearchIndex
from modeling_cots.data.opening import open_dataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.evaluation.text_encoding import encode_texts
from modeling_cots.hub.identity import model_identity
from modeling_cots.image_reading_cots import IMAGE_SUFFIXES, read_image
from modeling_cots.processing_cots import TOKENIZER_LOCK
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.plain_parser import PlainParser
from modeling_cots.search.embedding import ImageFolder, as_image_folder, check_text, entry_names
from modeling_cots.search.stores import open_store, store_exists
from modeling_cots.visualization.heat_maps import overlay
from modeling_cots.visualization.relevance import explain_pair, find_words

NUM_IMAGES, NUM_TEXTS = 8, 5
MAX_SHOWN = 96  # results of one search
MAX_CAPTIONED = 5_000  # images whose captions are offered as texts
TEXTS_AT_A_TIME = 512
SHOWN_SIDE = 256
MAX_TEXT, MAX_CAPTION = 300, 80
MAX_UPLOAD = 20  # MiB
NOTHING = 0.005  # what a word adds at most, rounded to two digits, where it adds nothing
MODEL = os.environ.get("COTS_MODEL", "runs/quickstart")
CACHE = Path(constants.HF_HOME) / "modeling_cots_demo"
TOY = (
    "\n\n**This model is a toy.** It was trained on generated images of colored shapes, and finds shapes by color and "
    "place. Photographs need a model trained on photographs: see the README."
)
CSS = """
.gradio-container {max-width: 60rem !important; margin: auto}
label.float {position: static !important; display: inline-flex !important}
#found .grid-wrap {max-height: none !important; overflow: visible; min-height: 0}
#found .grid-container {grid-template: none / repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important;
  height: auto !important}
#found .thumbnail-item {aspect-ratio: auto; height: auto; display: block}
#found .thumbnail-item img {aspect-ratio: 1; height: auto; object-fit: contain}
#found .caption-label {position: static; max-width: none; white-space: pre-line; overflow: hidden; text-align: left;
  overflow-wrap: anywhere; opacity: 1 !important}
#word label, #texts label {overflow-wrap: anywhere}
#heat, #image {height: auto !important}
#heat img, #image img {max-height: min(24rem, 60vh); width: auto; margin: auto; object-fit: contain}
.block.note:has(p) {padding: .25rem .75rem; border-left: 4px solid var(--color-accent)}
.block.note:not(:has(p)) {display: none}
.toast-title {display: none !important}
@media (max-width: 600px) {
  #found .grid-container {grid-template: none / repeat(2, minmax(0, 1fr)) !important}
  .gradio-container main {padding: .75rem !important}
}
"""
# Gradio does not tell a screen reader the names of the groups of choices, nor that something new has appeared; parts
# that were hidden come into the page later.
NAMES = """() => {
  const tell = () => {
    for (const [id, name] of [["word", "Words"], ["texts", "Texts that fit it, best first"]]) {
      document.getElementById(id)?.setAttribute("role", "radiogroup")
      document.getElementById(id)?.setAttribute("aria-label", name)
    }
    for (const part of document.querySelectorAll("#found, #heat, .note")) part.setAttribute("aria-live", "polite")
  }
  new MutationObserver(tell).observe(document.body, {childList: true, subtree: true})
  tell()
}"""


def scroll_to(element: str) -> str:
    """JavaScript that shows an element once what was asked for has appeared in it."""
    return f"() => document.getElementById('{element}').scrollIntoView({{block: 'start'}})"


@dataclass
class Collection:
    """An index with its model, the captions that its images have, and where the images themselves are."""

    index: SearchIndex
    captions: list[str]
    caption_embeds: torch.Tensor
    dataset: Dataset | None = None  # that was indexed; without one images are read from their paths
    positions: dict[str, int] | None = None  # of the entries in it

    def image(self, hit: dict) -> Image.Image:
        """The image of an entry: from the data set, from its file, or else its thumbnail."""
        position = (self.positions or {}).get(hit["name"])
        if position is not None and "image" in (item := self.dataset[position]):  # of a video the thumbnail is shown
            return read_image(item["image"])
        if os.path.isfile(hit["name"]) and hit["name"].lower().endswith(IMAGE_SUFFIXES):
            return read_image(hit["name"])
        if not hit["thumbnail"]:
            raise ValueError(f"The image {hit['name']} is no longer there, and the index has no thumbnail of it.")
        return Image.open(io.BytesIO(hit["thumbnail"]["bytes"])).convert("RGB")

    def small_image(self, hit: dict) -> Image.Image:
        """The thumbnail of an entry, or else its image; gray where neither is there any more."""
        if hit["thumbnail"]:
            image = Image.open(io.BytesIO(hit["thumbnail"]["bytes"])).convert("RGB")
            if max(image.size) >= SHOWN_SIDE / 2:
                return image
        try:
            return for_showing(self.image(hit))
        except ValueError:
            return Image.new("RGB", (SHOWN_SIDE, SHOWN_SIDE), "lightgray")


def for_showing(image: Image.Image) -> Image.Image:
    """A copy that is small enough for a page."""
    shown = image.copy()
    shown.thumbnail((2 * SHOWN_SIDE, 2 * SHOWN_SIDE))
    return shown


def load_model(name: str, revision: str | None) -> tuple[COTSModel, COTSProcessor]:
    """Model and processor. Raises `ValueError` with what to do if there is no model."""
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(("runs/", "."))):
        raise ValueError(
            f"There is no model in {name!r}. Train the toy of the quick start in a few minutes\n\n"
            f"    python examples/run_pretraining.py examples/configs/quickstart.yaml\n\n"
            f"or name another one: python demo/app.py --model FOLDER_OR_HUB_ID"
        )
    check_revision("model", name, revision)
    version = {"revision": revision or "main"}
    try:
        # The maps need attention weights, which only eager attention returns.
        model = COTSModel.from_pretrained(name, attn_implementation="eager", **version).eval()
        return model, COTSProcessor.from_pretrained(name, **version)
    except OSError as error:
        raise ValueError(f"There is no COTS model in {name!r}; name one with --model. ({error})") from error


def open_index(path: str, model: str | None = None, revision: str | None = None) -> Collection:
    """An index of `cots-search`, with the model that it names or with `model`."""
    store = open_store(path)
    info = store.info
    store.close()
    commit = info.get("model_commit") if model is None else None
    return with_captions(SearchIndex(path, *load_model(model or info["model"], revision or commit)))


def open_collection(
    model_path: str,
    data: str,
    split: str = "validation",
    *,
    revision: str | None = None,
    index: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
) -> Collection:
    """
    Embed a folder of images or a data set, as far as this was not done at an earlier start.

    Args:
        model_path, revision: The model.
        data: A folder, or whatever `open_dataset` takes.
        split: Of a data set.
        index: Where to keep the embeddings, by default in a folder of the cache.
        dataset_config, dataset_revision: Of a data set on the Hub.
    """
    model, processor = load_model(model_path, revision)
    is_folder = as_image_folder(data) is not None
    if is_folder:
        dataset = ImageFolder(data)
    else:
        version = {"dataset_config": dataset_config, "revision": dataset_revision}
        size = model.config.image_size[0]
        dataset = open_dataset(data, split, image_size=size, keep_uncaptioned=True, **version)
    source = os.path.realpath(data) if os.path.exists(data) else data
    if not is_folder:
        source += f"[{split}]"
    if index is None:
        CACHE.mkdir(parents=True, exist_ok=True)
        version = f"{dataset_config}@{dataset_revision}"
        index = str(CACHE / digest_of(source, version, model_identity(model, processor)))
    open_or_create = SearchIndex if store_exists(index) else SearchIndex.create
    opened = open_or_create(index, model, processor)
    print(f"The embeddings of {source} are kept in {index}.", flush=True)
    opened.add(dataset, source=source, thumbnail_side=SHOWN_SIDE)
    if is_folder:
        return with_captions(opened)
    positions = {name: position for position, name in enumerate(entry_names(dataset, source))}
    # Scenes can be drawn at any size: they are shown larger than the model reads them.
    shown = ScenesDataset(split, image_size=SHOWN_SIDE) if data == "scenes" else dataset
    return with_captions(opened, shown, positions)


def digest_of(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=10).hexdigest()


def with_captions(index: SearchIndex, dataset=None, positions: dict[str, int] | None = None) -> Collection:
    """The captions of the first images, embedded or read from the cache. Raises `ValueError` for an empty index."""
    if len(index) == 0:
        raise ValueError("The index is empty: no image of it could be read. Add images with cots-search add.")
    hits = index.search("image", top=min(MAX_CAPTIONED, len(index)))
    captions = sorted({caption for hit in hits for caption in hit["captions"] if caption.strip()})
    kept = CACHE / f"captions-{digest_of(index.store.info['model_identity'], *captions)}.safetensors"
    if kept.is_file():
        return Collection(index, captions, load_file(kept)["embeds"], dataset, positions)
    embeds = torch.cat([torch.empty(0, index.model.config.projection_dim), *embed_texts(index, captions)])
    if captions:
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({"embeds": embeds}, kept.with_suffix(f".{os.getpid()}"))
        os.replace(kept.with_suffix(f".{os.getpid()}"), kept)
    return Collection(index, captions, embeds, dataset, positions)


def embed_texts(index: SearchIndex, captions: list[str]):
    """The embeddings of all captions, in parts."""
    with tqdm(total=len(captions), desc="Embedding", unit="text", disable=not captions) as bar:
        for start in range(0, len(captions), TEXTS_AT_A_TIME):
            part = captions[start : start + TEXTS_AT_A_TIME]
            with TOKENIZER_LOCK:
                tokens = index.processor.tokenizer(part, truncation=True)["input_ids"]
            yield encode_texts(index.model, [torch.tensor(row) for row in tokens])
            bar.update(len(part))


@torch.no_grad()
def find_texts(collection: Collection, image: Image.Image) -> list[tuple[str, float]]:
    """The captions that fit an image best, with their cosines."""
    embed = torch.from_numpy(collection.index.embed_query(image=image))
    scores = collection.caption_embeds @ embed
    best = scores.topk(min(NUM_TEXTS, len(scores)))
    return [
        (collection.captions[place], score)
        for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def words_of(collection: Collection, caption: str) -> list[str]:
    """The words of a caption that the model reads, each once."""
    with TOKENIZER_LOCK:
        tokens = collection.index.processor.tokenizer(caption, truncation=True, return_offsets_mapping=True)
    return list(dict.fromkeys(word.text for word in find_words(caption, tokens["offset_mapping"])))


def is_toy(model: COTSModel) -> bool:
    """Whether the model was trained on generated scenes, by the record that training leaves."""
    record = Path(model.name_or_path, "training_record.json")
    if not record.is_file():
        return False
    return (json.loads(record.read_text(encoding="utf-8")).get("training_data") or {}).get("name") == "scenes"


def describe_map(word: str, added: float, score: float) -> str:
    """One sentence on what a word is worth, without which its map cannot be read."""
    if added < NOTHING:
        return f"“{word}” adds nothing to the similarity ({added:+.2f} of {score:.2f}): **its map means nothing.**"
    return f"“{word}” adds {added:+.2f} to the similarity of image and caption, which is {score:.2f}."


def open_upload(path: str) -> Image.Image:
    """An image that a visitor brought, as the model was trained to see it."""
    name = os.path.basename(path)
    if os.path.getsize(path) > MAX_UPLOAD * 2**20:
        raise ValueError(f"{name} has more than {MAX_UPLOAD} MB: bring a smaller image.")
    try:
        return read_image(path)
    except ValueError as error:
        if name.lower().endswith((".heic", ".heif")):
            raise ValueError(f"{name} is in HEIC, which cannot be read here: bring it as JPEG.") from error
        reason = "it is damaged, or no image" if "identify" in str(error) else str(error).replace(path, name)
        raise ValueError(f"{name} cannot be read: {reason}.".replace("..", ".")) from error


def as_sentence(note: str):
    """A decorator of an action: what goes wrong becomes a sentence in this note, and nothing else changes."""

    def decorate(action):
        @functools.wraps(action)
        def act(page, *arguments):
            try:
                return {getattr(page, note): "", **action(page, *arguments)}
            except ValueError as error:
                return {getattr(page, note): str(error)}
            except Exception:
                traceback.print_exc()
                return {getattr(page, note): "That did not work. The terminal of the demo says why."}

        return act

    return decorate


class Page:
    """The page: its parts, and what happens in them. An action returns the parts that change."""

    def __init__(self, collection: Collection, examples: list[str]):
        self.collection = collection
        gr.Markdown(
            f"# Search images with words\nA COTS model and {len(collection.index):,} images. Search with a text, pick "
            f"an image, then click on a word.{TOY if is_toy(collection.index.model) else ''}"
        )
        self.hits, self.query, self.chosen = gr.State([]), gr.State({}), gr.State(None)
        self.build_search()
        self.examples = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text in examples],
            label="For example",
            type="values",
            visible=bool(examples),
            elem_id="examples",
        )
        self.build_results()
        self.build_image()
        self.build_words()
        self.connect()

    def build_search(self) -> None:
        gr.Markdown("## 1. From a text to images")
        self.text = gr.Textbox(label="What should the images show?", max_length=MAX_TEXT, elem_id="query")
        self.button = gr.Button("Find images", variant="primary", elem_id="search")
        self.search_note = gr.Markdown(elem_id="search-note", elem_classes="note")

    def build_results(self) -> None:
        self.found = gr.Gallery(
            label="Images found, best first",
            columns=4,
            height="auto",
            allow_preview=False,
            buttons=[],
            visible=False,
            elem_id="found",
        )
        self.more = gr.Button("More images", visible=False, elem_id="more")

    def build_image(self) -> None:
        gr.Markdown("## 2. From an image to texts and images\nClick on an image above, or bring your own.")
        self.upload = gr.UploadButton("Bring an image", elem_id="upload", size="md")
        self.image_note = gr.Markdown(elem_id="image-note", elem_classes="note")
        self.image = gr.Image(
            label="Image", format="png", interactive=False, buttons=[], visible=False, elem_id="image"
        )
        self.similar = gr.Button("Find similar images", visible=False, elem_id="similar")
        self.texts = gr.Radio(label="Texts that fit it, best first", visible=False, elem_id="texts")

    def build_words(self) -> None:
        gr.Markdown(
            "## 3. From a word to its place\nWrite a caption, or pick a text above, then click on a word of it.",
            elem_id="words",
        )
        self.caption = gr.Textbox(label="Caption", max_length=MAX_TEXT, elem_id="caption")
        self.word = gr.Radio(label="Words", visible=False, elem_id="word")
        self.word_note = gr.Markdown(elem_id="word-note", elem_classes="note")
        self.heat = gr.Image(
            label="Where the model finds the word",
            format="png",
            interactive=False,
            buttons=[],
            visible=False,
            elem_id="heat",
        )

    def connect(self) -> None:
        """Which action runs at which event, and where the page scrolls to."""
        results = [self.search_note, self.found, self.more, self.hits, self.query]
        picture = [self.image_note, self.image, self.similar, self.texts, self.chosen]
        words = [self.word_note, self.caption, self.word, self.heat]
        private = {"api_visibility": "private"}
        everything = [*results, *picture, *words]
        gr.on([self.button.click, self.text.submit], self.search, self.text, everything, api_name="find_images")
        self.examples.click(self.search_example, self.examples, [*everything, self.text], **private)
        self.more.click(self.show_more, [self.hits, self.query], results, **private)
        pick = self.found.select(self.choose, [self.hits, self.caption], [*picture, *words], **private)
        pick.then(None, None, None, js=scroll_to("image"), **private)
        bring = self.upload.upload(self.bring, [self.upload, self.caption], [*picture, *words], **private)
        bring.then(None, None, None, js=scroll_to("upload"), **private)
        alike = self.similar.click(self.search_similar, self.chosen, results, **private)
        alike.then(None, None, None, js=scroll_to("search-note"), **private)
        take = self.texts.input(self.take_text, self.texts, words, **private)
        take.then(None, None, None, js=scroll_to("words"), **private)
        typed = {"trigger_mode": "always_last", "show_progress": "hidden"}
        self.caption.input(self.list_words, self.caption, words, **typed, **private)
        self.word.input(self.show_word, [self.chosen, self.caption, self.word], [self.word_note, self.heat], **private)

    @as_sentence("search_note")
    def search(self, text: str) -> dict:
        """The images for a text; the best one goes to step 2, and the text to step 3."""
        text = text.strip()[:MAX_TEXT]
        if not text:
            raise ValueError("Type what the images should show.")
        try:
            check_text(text)
        except ValueError as error:
            raise ValueError("That names a file: to find images like an image, bring it in step 2.") from error
        query = {"text": text}
        found = self.results(query, NUM_IMAGES)
        best = found[self.hits][0]
        try:
            shown = self.show_image(best, self.collection.image(best))
        except ValueError as error:  # a file that has gone hides no result
            shown = {self.image_note: str(error)}
        return {**found, **shown, self.caption: text, **self.words(text)}

    def search_example(self, example: list[str]) -> dict:
        """An example searches at once."""
        return {self.text: example[0], **self.search(example[0])}

    @as_sentence("search_note")
    def search_similar(self, chosen) -> dict:
        """The images that are most like the chosen one."""
        return {
            **self.results({"image": chosen}, NUM_IMAGES),
            self.search_note: "Images like the one below, most similar first.",
        }

    @as_sentence("search_note")
    def show_more(self, hits: list[dict], query: dict) -> dict:
        """As many images again."""
        return self.results(query, min(MAX_SHOWN, len(hits) + NUM_IMAGES))

    def results(self, query: dict, number: int) -> dict:
        """The first `number` images for a text or an image, with score, file name and caption."""
        image = self.read(query["image"]) if "image" in query else None
        hits = self.collection.index.search(query.get("text"), image, top=number + (image is not None))
        hits = [hit for hit in hits if not is_same(hit, query.get("image"))][:number]
        pictures = [(self.collection.small_image(hit), label(place, hit)) for place, hit in enumerate(hits, start=1)]
        has_more = len(hits) == number < min(MAX_SHOWN, len(self.collection.index) - 1)
        return {
            self.found: gr.update(value=pictures, visible=True),
            self.more: gr.update(visible=has_more),
            self.hits: hits,
            self.query: query,
        }

    def read(self, chosen) -> Image.Image:
        """The chosen image: an entry of the index, or the path of an upload."""
        if chosen is None:
            raise ValueError("Choose an image first: click on one that was found, or bring your own.")
        return open_upload(chosen) if isinstance(chosen, str) else self.collection.image(chosen)

    def show_image(self, chosen, image: Image.Image) -> dict:
        """Step 2 with an image and its texts; the map of another image goes."""
        texts = find_texts(self.collection, image)
        name = os.path.basename(chosen) if isinstance(chosen, str) else name_of(chosen)
        return {
            self.image_note: "",
            self.image: gr.update(value=for_showing(image), label=name, alt_text=f"The image {name}", visible=True),
            self.similar: gr.update(visible=True),
            self.texts: gr.update(
                choices=[(f"{text} ({score:.2f})", text) for text, score in texts], value=None, visible=bool(texts)
            ),
            self.chosen: chosen,
        }

    @as_sentence("image_note")
    def choose(self, hits: list[dict], caption: str, event: gr.SelectData) -> dict:
        """The found image that was clicked on."""
        hit = hits[event.index]
        return {**self.show_image(hit, self.collection.image(hit)), **self.words(caption)}

    @as_sentence("image_note")
    def bring(self, path: str, caption: str) -> dict:
        """An image from the visitor's machine."""
        return {**self.show_image(path, open_upload(path)), **self.words(caption)}

    def words(self, caption: str | None) -> dict:
        """Step 3 with the words of a caption; no word is chosen yet."""
        caption = (caption or "").strip()[:MAX_TEXT]
        words = words_of(self.collection, caption) if caption else []
        return {
            self.word: gr.update(choices=words, value=None, visible=bool(words)),
            self.word_note: "",
            self.heat: gr.update(value=None, visible=False),
        }

    @as_sentence("word_note")
    def take_text(self, text: str) -> dict:
        """A text that fits the image becomes the caption."""
        return {self.caption: text, **self.words(text)}

    @as_sentence("word_note")
    def list_words(self, caption: str) -> dict:
        """The words of the caption as it is written."""
        return self.words(caption)

    @as_sentence("word_note")
    def show_word(self, chosen, caption: str, word: str | None) -> dict:
        """Where in the chosen image the model finds the word, and how much the word adds."""
        if not word:
            return {self.heat: gr.update(value=None, visible=False)}
        index, image = self.collection.index, self.read(chosen)
        relevance = explain_pair(index.model, index.processor, image, caption.strip()[:MAX_TEXT], [word])
        added = relevance.word_scores[0].item()
        return {
            self.word_note: describe_map(word, added, relevance.score),
            self.heat: gr.update(
                value=overlay(for_showing(image), relevance.word_maps[0]),
                label=f"Where the model finds “{word}” ({added:+.2f})",
                alt_text=f"Heat map over the image: bright where the model finds {word}, which adds {added:+.2f}",
                visible=True,
            ),
        }


def is_same(hit: dict, chosen) -> bool:
    """Whether an entry is the chosen one, to which nothing is more similar."""
    return isinstance(chosen, dict) and hit["name"] == chosen["name"]


def label(place: int, hit: dict) -> str:
    """Place, score and file name of a result, and its caption below."""
    captions = [textwrap.shorten(caption, MAX_CAPTION, placeholder="…") for caption in hit["captions"][:1]]
    return "\n".join([f"{place}. ({hit['score']:.2f}) {name_of(hit)}", *captions])


def name_of(hit: dict) -> str:
    """The file name of an entry, or its place in the data set."""
    return os.path.basename(hit["name"].rpartition(": ")[2])


def build(collection: Collection, examples: list[str]) -> gr.Blocks:
    """The page: its three steps from top to bottom."""
    with gr.Blocks(title="COTS: search images with words") as blocks:
        Page(collection, examples)
        blocks.load(None, None, None, js=NAMES, api_visibility="private")
    return blocks


def launch(collection: Collection, examples: list[str], **options):
    """Serve the page; `options` are passed to Gradio's `launch`."""
    fonts = ["system-ui", "sans-serif"]  # Gradio's default fonts would be downloaded
    theme = gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "monospace"])
    return build(collection, examples).launch(
        theme=theme, css=CSS, max_file_size=f"{10 * MAX_UPLOAD}mb", footer_links=[], ssr_mode=False, **options
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = PlainParser(__doc__)
    parser.add_argument("--model", help=f"folder or Hub id ({MODEL}, or the index's own)")
    parser.add_argument(
        "--revision",
        "--model_revision",
        default=os.environ.get("COTS_REVISION"),
        help="branch, tag or commit of a Hub id",
    )
    parser.add_argument("--images", help="a folder of images to search")
    parser.add_argument("--index", help="an index to search; with --images, where to keep their embeddings")
    parser.add_argument("--dataset", default=os.environ.get("COTS_DATASET"), help="a data set to search (scenes)")
    parser.add_argument("--dataset_config", help="configuration of a Hub id, if it has several")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--split", default=os.environ.get("COTS_SPLIT"), help="the split to search (validation)")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860")
    args = parser.parse_args(argv)
    if args.images and args.dataset:
        parser.error("--images and --dataset both say what to search: give one of them.")
    return args


def open_asked(args: argparse.Namespace) -> Collection:
    """The collection that the options ask for."""
    if args.index and not args.images and not args.dataset:
        return open_index(args.index, args.model, args.revision)
    if args.images and not os.path.isdir(args.images):
        raise ValueError(f"There is no folder {args.images!r} for --images.")
    return open_collection(
        args.model or MODEL,
        args.images or args.dataset or "scenes",
        args.split or ("train" if args.images else "validation"),
        revision=args.revision,
        index=args.index,
        dataset_config=args.dataset_config,
        dataset_revision=args.dataset_revision,
    )


def examples_of(collection: Collection, is_scenes: bool) -> list[str]:
    """Three texts to begin with."""
    if is_scenes:
        return ["a large purple square", "a small red star above a blue circle", "a yellow heart on a striped wall"]
    step = max(1, len(collection.captions) // 3)
    return collection.captions[step // 2 :: step][:3] or ["a person outdoors", "an animal", "a view of a city"]


def main() -> None:
    args = parse_arguments()
    try:
        collection = open_asked(args)
    except ValueError as error:
        sys.exit(str(error))
    is_scenes = not (args.images or args.index) and args.dataset in (None, "scenes")
    launch(collection, examples_of(collection, is_scenes), server_port=args.port)


if __name__ == "__main__":
    run_script(main)
