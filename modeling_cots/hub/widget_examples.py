"""The examples of a model card's widget: images that lie in the repository, and what the model said of them.

No provider runs custom code for a widget, so that what is shown is what was recorded here, with the pipeline that
anyone can run on the same files.
"""

import os
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin, ZeroShotImageClassificationPipeline

from ..data.image_reading import read_image
from ..data.scenes.still import ScenesDataset

FOLDER = "widget"
NUM_EXAMPLES = 3
SIDE = 256  # pixels, at most: small files, and large enough to be looked at


def record_widget_examples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset,
    folder: str | os.PathLike,
    num_examples: int = NUM_EXAMPLES,
) -> list[dict]:
    """
    Save evenly spaced images of a data set as JPEG, and classify each among one caption of every one of them.

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
        examples.append(
            {
                "src": source,
                "example_title": f"Image {number}",
                "candidate_labels": ", ".join(labels),
                "output": [{"label": found["label"], "score": round(found["score"], 4)} for found in output],
            }
        )
    model.train(was_training)
    return examples


def publishable_images(dataset):
    """Images that nobody has rights in: those of `scenes`, drawn larger; `None` for all other data."""
    if not isinstance(dataset, ScenesDataset):
        return None
    return ScenesDataset(dataset.split, dataset.num_scenes, SIDE, dataset.seed)


def _label(captions: list[str]) -> str:
    """The shortest caption without a comma, which is what separates labels in a widget."""
    whole = [caption for caption in captions if "," not in caption]
    return min(whole, key=len) if whole else captions[0].partition(",")[0]
