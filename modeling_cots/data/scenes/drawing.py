"""Describes a scene of the built-in `scenes` and draws its image. Scenes are sampled and captioned elsewhere."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

OVERSAMPLING = 2  # images are drawn at twice their size, for smooth edges

COLORS = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (35, 160, 60),
    "blue": (45, 95, 235),
    "purple": (130, 45, 170),
    "pink": (250, 130, 190),
    "white": (245, 245, 245),
}
# Names that no object's color has, so that a color word in a caption says what it belongs to.
BACKGROUND_COLORS = {
    "beige": (215, 195, 155),
    "mint": (165, 215, 190),
    "lavender": (190, 175, 225),
    "grey": (140, 140, 145),
    "navy": (25, 35, 80),
    "brown": (100, 65, 40),
}
OUTLINE_COLOR = (20, 20, 20)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SceneObject:
    """
    One object of a scene.

    Args:
        color, shape, size: Their names.
        rgb: The exact color.
        cell: Row and column in the grid.
        box: Left, top, right and bottom in pixels, right and bottom exclusive.
    """

    color: str
    shape: str
    size: str
    rgb: tuple[int, int, int]
    cell: tuple[int, int]
    box: Box


@dataclass(frozen=True)
class Scene:
    """What an image shows: its objects, the names of the background's pattern and color, and five captions."""

    objects: tuple[SceneObject, ...]
    pattern: str
    background_color: str
    texture_seed: int
    captions: tuple[str, ...] = ()


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """Draw the RGB image of a scene that was sampled for this image size."""
    image = _draw_background(scene, OVERSAMPLING * image_size)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        left, top, right, bottom = (OVERSAMPLING * edge for edge in item.box)
        _draw_shape(draw, item.shape, (left, top, right - 1, bottom - 1), item.rgb)
    return image.reduce(OVERSAMPLING)


def _draw_background(scene: Scene, side: int) -> Image.Image:
    """Two tones of one color, mixed by a small tile that is stretched over the image."""
    rng = random.Random(scene.texture_seed)
    color = BACKGROUND_COLORS[scene.background_color]
    lighter = tuple(min(255, channel + 30) for channel in color)
    tile = _tile(scene.pattern, rng)
    if rng.random() < 0.5:
        tile = tile.transpose(Image.Transpose.TRANSPOSE)
    filtering = Image.Resampling.BILINEAR if scene.pattern == "gradient" else Image.Resampling.NEAREST
    tones = [Image.new("RGB", (side, side), tone) for tone in (lighter, color)]
    return Image.composite(*tones, tile.resize((side, side), filtering))


def _tile(pattern: str, rng: random.Random) -> Image.Image:
    count = rng.randint(5, 9)
    if pattern == "plain":
        return Image.new("L", (1, 1), rng.randrange(256))
    if pattern == "gradient":
        return Image.frombytes("L", (1, 4), bytes((0, 85, 170, 255)))
    if pattern == "stripes":
        return Image.frombytes("L", (1, count), bytes(255 * (row % 2) for row in range(count)))
    if pattern == "checks":
        cells = bytes(255 * ((row + column) % 2) for row in range(count) for column in range(count))
        return Image.frombytes("L", (count, count), cells)
    return Image.frombytes("L", (48, 48), rng.randbytes(48 * 48))


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, rgb: tuple[int, int, int]) -> None:
    """Fill the box (right and bottom inclusive) with a shape that touches all four sides, outlined in black."""
    left, top, right, bottom = box
    outline = SHAPES[shape].outline
    if outline is not None:
        points = [(left + x * (right - left), top + y * (bottom - top)) for x, y in outline]
        draw.polygon(points, fill=rgb, outline=OUTLINE_COLOR, width=OVERSAMPLING)
    elif shape == "circle":
        draw.ellipse(box, fill=rgb, outline=OUTLINE_COLOR, width=OVERSAMPLING)
    else:  # a ring, open in the middle
        draw.ellipse(box, outline=OUTLINE_COLOR, width=(right - left) // 3)
        inner = (left + OVERSAMPLING, top + OVERSAMPLING, right - OVERSAMPLING, bottom - OVERSAMPLING)
        draw.ellipse(inner, outline=rgb, width=(right - left) // 3 - OVERSAMPLING)


def _fill_unit_square(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    (low_x, high_x), (low_y, high_y) = ((min(values), max(values)) for values in zip(*points, strict=True))
    return [((x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)) for x, y in points]


def _around(count: int, radius: Callable[[int], float]) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radius(i) * math.sin(angle), -radius(i) * math.cos(angle)) for i, angle in enumerate(angles)]


def _heart(count: int = 32) -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / count for i in range(count)]
    return [
        (16 * math.sin(a) ** 3, -13 * math.cos(a) + 5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a))
        for a in angles
    ]


@dataclass(frozen=True)
class Shape:
    """
    The words and the outline of a shape.

    Args:
        words: The words for it in captions; the first is its name.
        outline: Its corners (x, y), x to the right and y downwards, which fill the unit square. `None` for a circle
            and a ring.
    """

    words: tuple[str, ...]
    outline: list[tuple[float, float]] | None = None


_CROSS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]

# By name. Scenes are drawn at random by this order, so that another order would be other data.
SHAPES = {
    shape.words[0]: shape
    for shape in (
        Shape(("circle", "disc")),
        Shape(("square",), [(0, 0), (1, 0), (1, 1), (0, 1)]),
        Shape(("triangle",), _fill_unit_square(_around(3, lambda i: 1))),
        Shape(("star",), _fill_unit_square(_around(10, lambda i: (1, 0.42)[i % 2]))),
        Shape(("heart",), _fill_unit_square(_heart())),
        Shape(("cross", "plus sign"), _fill_unit_square(_CROSS)),
        Shape(("diamond", "rhombus"), _fill_unit_square(_around(4, lambda i: 1))),
        Shape(("ring", "hoop")),
    )
}
