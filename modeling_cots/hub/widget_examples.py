"""Examples for the widget of a model card: images in the repository, with the model's recorded answers.

No provider runs custom code for a widget. So the widget shows answers that are recorded here, with the pipeline that
anyone can run on the same files.
"""

import os
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin, ZeroShotImageClassificationPipeline

from ..data.scenes.still import ScenesDataset
from ..image_reading_cots import read_image

FOLDER = "widget"
NUM_EXAMPLES = 3
SIDE = 256  # pixels, at most: small files that are still easy to look at


def record_widget_examples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset,
    folder: str | os.PathLike,
    num_examples: int = NUM_EXAMPLES,
) -> list[dict]:
    """
    Save evenly spaced images of a data set as JPEG, and classify each, with one caption of every image as the labels.

    A repository shows its images to everyone: pass only what may be published.

    Args:
        model: A [`COTSModel`].
        processor: Its [`COTSProcessor`].
        dataset: Items as `open_pairs` and `ScenesDataset` give them.
        folder: Of the repository; the images go into its sub-folder `widget`.
        num_examples: How many, at most.

    Returns the `widget` entries of the card: `src`, `example_title`, `candidate_labels` and `output`, the labels with
    their scores, best first, as the `zero-shot-image-classification` pipeline gives them on the saved files.
    """
    rows = sorted({round(number * (len(dataset) - 1) / max(1, num_examples - 1)) for number in range(num_examples)})
    items = [dataset[row] for row in rows]
    labels = list(dict.fromkeys(_label(item["captions"]) for item in items))
    (Path(folder) / FOLDER).mkdir(parents=True, exist_ok=True)
    was_training = model.training
    model.eval()
    classify = ZeroShotImageClassificationPipeline(
        model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor, device=model.device
    )
    examples = []
    for number, item in enumerate(items, start=1):
        source = f"{FOLDER}/example-{number}.jpg"
        image = read_image(item["image"])
        image.thumbnail((SIDE, SIDE))
        image.save(Path(folder) / source, quality=90)
        output = classify(str(Path(folder) / source), candidate_labels=labels)
        examples.append(_widget_entry(number, source, labels, output))
    model.train(was_training)
    return examples


def _widget_entry(number: int, source: str, labels: list[str], output: list[dict]) -> dict:
    """One example in the form that a card's `widget` has; `output` is the pipeline's."""
    return {
        "src": source,
        "example_title": f"Image {number}",
        "candidate_labels": ", ".join(labels),
        "output": [{"label": found["label"], "score": round(found["score"], 4)} for found in output],
    }


def publishable_images(dataset):
    """The images of a `scenes` data set, drawn larger, as nobody has rights in them; `None` for all other data."""
    if not isinstance(dataset, ScenesDataset):
        return None
    return ScenesDataset(dataset.split, dataset.num_scenes, SIDE, dataset.seed)


def _label(captions: list[str]) -> str:
    """The shortest caption without a comma, as a widget separates labels by commas."""
    whole = [caption for caption in captions if "," not in caption]
    return min(whole, key=len) if whole else captions[0].partition(",")[0]
