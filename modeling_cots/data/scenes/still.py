"""`scenes`: a built-in generator of captioned images, which are drawn when they are read; nothing is downloaded.

A scene has one to three objects on a background, each with a shape, a color, a size and a place, and five differently
worded captions. Every validation scene has a (color, shape) combination that no training scene has, so that its recall
measures composition and not memory. This toy problem is not from the paper.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from PIL import Image
from torch.utils.data import Dataset

from ..items import EpochSeeds
from ..splits import MissingSplitError
from .drawing import BACKGROUND_COLORS, COLORS, SHAPES, Scene, SceneObject, draw_scene

SPLIT_SIZES = {"train": 4000, "validation": 200}
GRID = 3  # objects stand in different cells of a 3 x 3 grid
MAX_KEPT_BYTES = 64 * 2**20  # a split whose images take no more is drawn once
MIN_IMAGE_SIZE = 32  # below this a small object has fewer than five pixels a side
# Share of a cell's side that an object takes.
SIZES = {"small": (0.50, 0.62), "large": (0.85, 1.00)}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_WORDS = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "beneath"),
}
# By row and column of the grid.
PLACE_WORDS = {
    (0, 0): ("in the top left corner", "at the upper left"),
    (0, 1): ("at the top",),
    (0, 2): ("in the top right corner", "at the upper right"),
    (1, 0): ("at the left edge",),
    (1, 1): ("in the centre", "in the middle"),
    (1, 2): ("at the right edge",),
    (2, 0): ("in the bottom left corner", "at the lower left"),
    (2, 1): ("at the bottom",),
    (2, 2): ("in the bottom right corner", "at the lower right"),
}
BACKGROUND_WORDS = {
    "plain": ("plain", "solid"),
    "gradient": ("shaded", "fading"),
    "stripes": ("striped",),
    "checks": ("checkered", "checked"),
    "noise": ("speckled", "noisy"),
}
OPENINGS = ("", "a picture of ", "an image with ", "there is ", "we see ", "a drawing that shows ")


def is_held_out(color: str, shape: str) -> bool:
    """Whether only the validation split has this combination: 2 of the 8 shapes of each color, and the reverse."""
    return (list(COLORS).index(color) - list(SHAPES).index(shape)) % len(SHAPES) in (0, 3)


def relations(first: SceneObject, second: SceneObject) -> list[str]:
    """The relations of `first` to `second`, by their different cells: one or two of left, right, above and below."""
    (row, column), (other_row, other_column) = first.cell, second.cell
    holds = {
        "left": column < other_column,
        "right": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }
    return [name for name, is_true in holds.items() if is_true]


class ScenesDataset(Dataset):
    """
    Map-style data set of drawn scenes. Scene i of a split depends on (seed, split, i) alone.

    Scenes of up to 64 MiB in all are drawn once and kept, larger ones are drawn whenever they are read.

    An item is {"image": PIL image, "captions": five different strings, "pair_id": int, "name": str, "seed": int}.

    Args:
        split: "train" or "validation".
        num_scenes: 4,000 and 200 by default.
        image_size: Height and width in pixels. The scenes are the same at every size.
        seed: Seed of the scenes, and of the random draws for each item in training.

    Raises `ValueError` for an unknown split, fewer than one scene, and images of fewer than 32 pixels a side.
    """

    modality = "image"

    def __init__(self, split: str, num_scenes: int | None = None, image_size: int = 64, seed: int = 0):
        if split not in SPLIT_SIZES:
            message = f"`scenes` has the splits {', '.join(SPLIT_SIZES)}; got {split!r}."
            raise MissingSplitError(message, SPLIT_SIZES, can_be_cut=False)
        if num_scenes is not None and num_scenes < 1:
            raise ValueError(f"`num_scenes` must be at least 1, got {num_scenes}.")
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"`image_size` must be at least {MIN_IMAGE_SIZE} for `scenes`, got {image_size}.")
        self.split = split
        self.num_scenes = SPLIT_SIZES[split] if num_scenes is None else num_scenes
        self.image_size = image_size
        self.seed = seed
        self._seeds = EpochSeeds(seed)
        self._keeps = 3 * image_size**2 * self.num_scenes <= MAX_KEPT_BYTES
        self._drawn: dict[int, tuple[Image.Image, tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict:
        index = self._check(index)
        image, captions = self._drawn.get(index) or self._draw(index)
        return {
            "image": image.copy(),
            "captions": list(captions),
            "pair_id": index,
            "name": f"{self.split}-{index:05d}",
            "seed": self._seeds(index),
        }

    def _draw(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        scene = self.scene(index)
        drawn = draw_scene(scene, self.image_size), scene.captions
        if self._keeps:
            self._drawn[index] = drawn
        return drawn

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_drawn": {}}  # a worker draws its own scenes faster than it would be sent them

    def iter_captions(self) -> Iterator[str]:
        """All captions, without drawing an image."""
        for index in range(len(self)):
            yield from self.scene(index).captions

    def set_epoch(self, epoch: int) -> None:
        """Give every item a fresh seed; the scenes stay the same."""
        self._seeds.set_epoch(epoch)

    def scene(self, index: int) -> Scene:
        """The scene that image `index` shows, with boxes in pixels and captions."""
        rng = random.Random(f"{self.seed}/{self.split}/{self._check(index)}")
        return sample_scene(rng, self.image_size, held_out=self.split == "validation")

    def _check(self, index: int) -> int:
        if not -self.num_scenes <= index < self.num_scenes:
            raise IndexError(f"Scene {index} of {self.num_scenes}.")
        return index % self.num_scenes


def sample_scene(rng: random.Random, image_size: int, *, held_out: bool) -> Scene:
    """Draw a scene at random: with `held_out` it has at least one held-out combination, otherwise none."""
    combinations = [(color, shape) for color in COLORS for shape in SHAPES]
    seen = [combination for combination in combinations if not is_held_out(*combination)]
    num_objects = rng.choices((1, 2, 3), weights=(1, 2, 2))[0]
    if held_out:
        first = rng.choice([combination for combination in combinations if is_held_out(*combination)])
        others = [combination for combination in combinations if combination != first]
        chosen = [first, *rng.sample(others, num_objects - 1)]
    else:
        chosen = rng.sample(seen, num_objects)
    cells = [divmod(cell, GRID) for cell in rng.sample(range(GRID**2), num_objects)]
    scene = Scene(
        objects=tuple(
            _sample_object(rng, *combination, cell, image_size)
            for combination, cell in zip(chosen, cells, strict=True)
        ),
        pattern=rng.choice(list(BACKGROUND_WORDS)),
        background_color=rng.choice(list(BACKGROUND_COLORS)),
        texture_seed=rng.getrandbits(32),
    )
    return replace(scene, captions=write_captions(scene, rng))


def _sample_object(rng: random.Random, color: str, shape: str, cell: tuple[int, int], image_size: int) -> SceneObject:
    size = rng.choice(list(SIZES))
    red, green, blue = (min(255, max(0, channel + rng.randint(-15, 15))) for channel in COLORS[color])
    share, from_top, from_left = rng.uniform(*SIZES[size]), rng.random(), rng.random()
    side = int(share * (image_size // GRID))
    row, column = cell
    # Whole pixels inside the cell, so that boxes of different cells never overlap.
    top = row * image_size // GRID + int(from_top * (image_size // GRID - side + 1))
    left = column * image_size // GRID + int(from_left * (image_size // GRID - side + 1))
    return SceneObject(color, shape, size, (red, green, blue), cell, (left, top, left + side, top + side))


# Captions


def write_captions(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """
    Five captions of different wording, in random order. Each names all objects.

    Two of them mention the background, two a relation and one the places. The name of a single object would fit many
    images, so that its captions also mention the place or the background, or that nothing else is there.
    """
    writers = [_tell_objects, _tell_relation, _tell_places, _tell_background, _tell_background_first]
    rng.shuffle(writers)
    return tuple(writer(scene, rng) for writer in writers)


def _tell_objects(scene: Scene, rng: random.Random) -> str:
    names = [_name(item, rng) for item in _shuffled(scene.objects, rng)]
    caption = rng.choice(OPENINGS) + _list(names, rng.choice((" and ", " together with ")))
    if len(names) > 1:
        return caption
    return f"{caption} {_place(scene.objects[0], rng)} {_background(scene, rng)}"


def _tell_relation(scene: Scene, rng: random.Random) -> str:
    if len(scene.objects) == 1:
        return f"only {_name(scene.objects[0], rng)} {rng.choice(('is', 'stands'))} {_place(scene.objects[0], rng)}"
    first, second, *others = _shuffled(scene.objects, rng)
    relation = rng.choice(RELATION_WORDS[rng.choice(relations(first, second))])
    verb = rng.choice(("", "is ", "stands "))
    caption = f"{_name(first, rng)} {verb}{relation} {_name(second, rng)}"
    return caption + "".join(rng.choice((", and also ", " with ")) + _name(item, rng) for item in others)


def _tell_places(scene: Scene, rng: random.Random) -> str:
    place_first = rng.random() < 0.5
    parts = []
    for item in _shuffled(scene.objects, rng):
        name, place = _name(item, rng), _place(item, rng)
        parts.append(f"{place} {name}" if place_first else f"{name} {place}")
    return _list(parts) if len(parts) > 1 else f"{parts[0]} and nothing else"


def _tell_background(scene: Scene, rng: random.Random) -> str:
    names = [_name(item, rng, sized=len(scene.objects) == 1) for item in _shuffled(scene.objects, rng)]
    return f"{rng.choice(OPENINGS)}{_list(names)} {_background(scene, rng)}"


def _tell_background_first(scene: Scene, rng: random.Random) -> str:
    return f"{_background(scene, rng)} {_tell_relation(scene, rng)}"


def _name(item: SceneObject, rng: random.Random, *, sized: bool = True) -> str:
    words = [item.color, rng.choice(SHAPES[item.shape].words)]
    if sized:
        words.insert(0, rng.choice(SIZE_WORDS[item.size]))
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _place(item: SceneObject, rng: random.Random) -> str:
    return rng.choice(PLACE_WORDS[item.cell])


def _background(scene: Scene, rng: random.Random) -> str:
    start, end = rng.choice((("on", "background"), ("against", "backdrop"), ("in front of", "wall")))
    return f"{start} a {rng.choice(BACKGROUND_WORDS[scene.pattern])} {scene.background_color} {end}"


def _list(parts: list[str], last: str = " and ") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + last + parts[-1]


def _shuffled(objects: tuple[SceneObject, ...], rng: random.Random) -> list[SceneObject]:
    return rng.sample(objects, len(objects))
