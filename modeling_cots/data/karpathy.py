"""Flickr8k, Flickr30k and COCO in Karpathy's JSON form, whose splits are the usual ones: one file beside the images.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR 2015. The file lists
each image once, with its split, its file name and all of its sentences. Images are not read here.
"""

from pathlib import Path

import datasets
from transformers.utils import logging

from .formats import read_annotations
from .messages import printable, shown
from .rows import list_captions
from .skip_report import and_more
from .splits import MissingSplitError
from .tables import slice_bounds, table_of_paths

logger = logging.get_logger(__name__)

KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
# COCO's file calls the 30,504 images of val2014 that are neither validation nor test "restval"; the field trains on
# them too, so "train" means both. "train_only" is for the rest alone.
JOINED_SPLITS = {"train": ("train", "restval"), "train_only": ("train",), "validation": ("val",)}
NUM_LOOKED_FOR = 20
MAX_NAMES = 5  # in a warning


def is_karpathy(dataset: str) -> bool:
    """Whether this is one of the three files, by its name, or a folder that holds one of them."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return bool(_files_in(path))
    return path.is_file() and path.name in KARPATHY_FILES


def karpathy_name(dataset: str) -> str:
    """The usual name of the data set: flickr8k, flickr30k or coco."""
    return _only_file(Path(dataset).expanduser()).stem.removeprefix("dataset_")


def load_karpathy(dataset: str, split: str, image_folder: str | None = None) -> tuple[datasets.Dataset, Path]:
    """
    Open one split: a table of paths and their captions (tables.py), and the folder that the paths are relative to.

    Args:
        dataset: dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json, or the folder that it lies in.
        split: "train" (with COCO's "restval", as in the field), "train_only" (without), "restval", "validation" (or
            "val", the file's own word) or "test"; with a slice of images if wanted ("test[:100]").
        image_folder: Where the images are; for COCO the folder that holds `train2014` and `val2014`. By default the
            folder of the JSON file, or the first of its sub-folders that holds one of the split's first images.

    A caption that is no text is left out, counted and named. An image that is listed twice has all of its captions,
    and a warning names images in two splits.

    Raises `ValueError` for a file of another form, and for a split or an image folder that is not there.
    """
    file = _only_file(Path(dataset).expanduser())
    images = _read_images(file)
    paths, captions, odd = [], [], []
    for part, bounds in _parse_split(split):
        chosen = [image for image in images if image["split"] in JOINED_SPLITS.get(part, (part,))]
        if not chosen:
            there = sorted({image["split"] for image in images})
            raise MissingSplitError(f"{file} has no split {part!r}; it has {', '.join(there)}.", there)
        start, stop = slice_bounds(part + bounds, len(chosen))
        for image in chosen[start:stop]:
            paths.append(_path_of(image))
            raw, odd_ones = list_captions([sentence.get("raw") for sentence in image["sentences"]])
            captions.append([caption.strip() for caption in raw])
            odd += [f"{shown(each)} of {paths[-1]}" for each in odd_ones]
    if odd:
        logger.warning(f"Left out {len(odd)} captions of {file}, which are no texts: {and_more(odd, MAX_NAMES)}.")
    return table_of_paths(paths, captions), _find_images(file, paths, image_folder)


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in KARPATHY_FILES if (folder / name).is_file()]


def _only_file(path: Path) -> Path:
    files = _files_in(path) if path.is_dir() else [path]
    if len(files) > 1:
        raise ValueError(f"{str(path)!r} holds {', '.join(file.name for file in files)}: name the one that you mean.")
    return files[0]


def _read_images(file: Path) -> list[dict]:
    content = read_annotations(file, "Karpathy's")
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(f"{file} is not in Karpathy's form: it has no list of images.")
    split_of: dict[str, str] = {}
    shared = []
    for number, image in enumerate(images):
        if not _is_image(image):
            raise ValueError(
                f"{file} is not in Karpathy's form: image {number} is no object with texts for split and filename "
                "and a list of objects for sentences."
            )
        path = _path_of(image)
        if split_of.setdefault(path, image["split"]) != image["split"]:
            shared.append(f"{path} in {split_of[path]} and {image['split']}")
    if shared:
        logger.warning(f"{file} lists {len(shared)} images in two splits: {and_more(shared, MAX_NAMES)}.")
    return images


def _is_image(image) -> bool:
    return (
        isinstance(image, dict)
        and all(isinstance(image.get(name), str) and image[name] for name in ("split", "filename"))
        and isinstance(image.get("filepath"), str | None)
        and isinstance(image.get("sentences"), list)
        and all(isinstance(sentence, dict) for sentence in image["sentences"])
    )


def _path_of(image: dict) -> str:
    return printable(str(Path(image.get("filepath") or "", image["filename"])))


def _parse_split(split: str) -> list[tuple[str, str]]:
    """`train[:100]+val` as [("train", "[:100]"), ("val", "")]."""
    parts = []
    for part in split.split("+"):
        name, bracket, bounds = part.strip().partition("[")
        parts.append((name, bracket + bounds))
    return parts


def _find_images(file: Path, names: list[str], image_folder: str | None) -> Path:
    if image_folder is not None:
        folder = Path(image_folder).expanduser()
        if not folder.is_dir():
            raise ValueError(f"The image folder {str(folder)!r} does not exist.")
        return folder
    places = [file.parent, *sorted(child for child in file.parent.iterdir() if child.is_dir())]
    found = [place for place in places if any((place / name).is_file() for name in names[:NUM_LOOKED_FOR])]
    if not found:
        raise ValueError(
            f"The images of {file} are neither beside it nor in a folder beside it (looked for {names[:1]}): "
            "give image_folder."
        )
    return found[0]
