"""Generated images in Karpathy's form, as the files of Flickr30k and COCO are laid out; shared by several tests."""

import json
from pathlib import Path

from modeling_cots import ScenesDataset


def write_karpathy(folder: Path, splits: list[str], *, name: str = "flickr30k", image_size: int = 32) -> Path:
    """`dataset_NAME.json` and its images: one image of two captions for every entry of `splits`, in that order.

    Those of "flickr30k" lie in a sub-folder `images`; those of "coco" in `train2014` and `val2014`, as COCO has them.
    """
    scenes = ScenesDataset("train", len(splits), image_size)
    images = []
    for number, split in enumerate(splits):
        scene = scenes[number]
        place = "images" if name != "coco" else "train2014" if split == "train" else "val2014"
        (folder / place).mkdir(parents=True, exist_ok=True)
        scene["image"].save(folder / place / f"{number}.png")
        entry = {"filename": f"{number}.png", "split": split, "imgid": number}
        entry["sentences"] = [{"raw": f" {caption} ", "tokens": caption.split()} for caption in scene["captions"][:2]]
        images.append({**entry, "filepath": place} if name == "coco" else entry)
    file = folder / f"dataset_{name}.json"
    file.write_text(json.dumps({"images": images, "dataset": name}))
    return file
