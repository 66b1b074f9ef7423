"""Flickr8k, Flickr30k and COCO in Karpathy's JSON form, whose splits are the usual ones: one file beside the images.

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR 2015. The file lists
each image once, with its split, its file name and all of its sentences. Images are not read here.
"""

import json
from pathlib import Path

import datasets

KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json")
# COCO's file calls the 30,504 images of val2014 that are neither validation nor test "restval"; the field trains on
# them too, so "train" means both. "train_only" is for the rest alone.
JOINED_SPLITS = {"train": ("train", "restval"), "train_only": ("train",), "validation": ("val",)}
NUM_LOOKED_FOR = 20


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
    Open one split: rows of an image path and its list of captions, and the folder that the paths are relative to.

    Args:
        dataset: dataset_flickr8k.json, dataset_flickr30k.json or dataset_coco.json, or the folder that it lies in.
        split: "train" (with COCO's "restval", as in the field), "train_only" (without), "restval", "validation" (or
            "val", the file's own word) or "test"; with a slice of images if wanted ("test[:100]").
        image_folder: Where the images are; for COCO the folder that holds `train2014` and `val2014`. By default the
            folder of the JSON file, or the first of its sub-folders that holds one of the split's first images.

    Raises `ValueError` for a file of another form, and for a split or an image folder that is not there.
    """
    file = _only_file(Path(dataset).expanduser())
    images = _read_images(file)
    instruction = _parse_split(split)
    names = {"file_name": [], "caption": []}
    for part, bounds in instruction:
        chosen = [image for image in images if image["split"] in JOINED_SPLITS.get(part, (part,))]
        if not chosen:
            there = ", ".join(sorted({image["split"] for image in images}))
            raise ValueError(f"{file} has no split {part!r}; it has {there}.")
        for image in _slice(chosen, part, bounds):
            names["file_name"].append(str(Path(image.get("filepath") or "", image["filename"])))
            names["caption"].append([sentence["raw"].strip() for sentence in image["sentences"]])
    return datasets.Dataset.from_dict(names), _find_images(file, names["file_name"], image_folder)


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in KARPATHY_FILES if (folder / name).is_file()]


def _only_file(path: Path) -> Path:
    files = _files_in(path) if path.is_dir() else [path]
    if len(files) > 1:
        raise ValueError(f"{str(path)!r} holds {', '.join(file.name for file in files)}: name the one that you mean.")
    return files[0]


def _read_images(file: Path) -> list[dict]:
    try:
        images = json.loads(file.read_text(encoding="utf-8"))["images"]
        for image in images:
            image["split"], image["filename"], [sentence["raw"] for sentence in image["sentences"]]  # noqa: B018
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not in Karpathy's form: {type(error).__name__}: {error}") from error
    return images


def _parse_split(split: str) -> list[tuple[str, str]]:
    """`train[:100]+val` as [("train", "[:100]"), ("val", "")]."""
    parts = []
    for part in split.split("+"):
        name, bracket, bounds = part.strip().partition("[")
        parts.append((name, bracket + bounds))
    return parts


def _slice(images: list[dict], name: str, bounds: str) -> list[dict]:
    """The slice as `datasets` understands it, per cent included."""
    if not bounds:
        return images
    try:
        (absolute,) = datasets.ReadInstruction.from_spec(name + bounds).to_absolute({name: len(images)})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{name + bounds!r} is no slice of a split, such as '{name}[:100]': {error}") from error
    return images[absolute.from_ : absolute.to]


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
