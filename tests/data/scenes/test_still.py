"""`scenes`: true and telling captions, tight boxes, held-out combinations, and independence of order and process."""

import pickle
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageChops
from torch.utils.data import DataLoader

from modeling_cots.data.items import EpochSeeds
from modeling_cots.data.scenes import still
from modeling_cots.data.scenes.drawing import BACKGROUND_COLORS, COLORS, Scene, SceneObject, draw_scene
from modeling_cots.data.scenes.still import (
    BACKGROUND_WORDS,
    PLACE_WORDS,
    RELATION_WORDS,
    SHAPES,
    SIZE_WORDS,
    ScenesDataset,
    is_held_out,
)


def alternatives(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


def meanings(table) -> dict:
    return {word: meaning for meaning, words in table.items() for word in words}


SHAPE_OF = meanings({name: shape.words for name, shape in SHAPES.items()})
SIZES, PLACES = meanings(SIZE_WORDS), meanings(PLACE_WORDS)
PATTERNS, RELATIONS = meanings(BACKGROUND_WORDS), meanings(RELATION_WORDS)
OBJECT = re.compile(rf"\ban? (?:({alternatives(SIZES)}) )?({alternatives(COLORS)}) ({alternatives(SHAPE_OF)})\b")
BACKGROUND = re.compile(
    rf"\ba ({alternatives(PATTERNS)}) ({alternatives(BACKGROUND_COLORS)}) (?:background|backdrop|wall)"
)
PLACE = re.compile(alternatives(PLACES))
RELATION = re.compile(rf"^ (?:is |stands )?({alternatives(RELATIONS)}) $")
APART = {  # by the boxes, where the generator goes by cells
    "left": lambda box, other: box[2] <= other[0],
    "right": lambda box, other: other[2] <= box[0],
    "above": lambda box, other: box[3] <= other[1],
    "below": lambda box, other: other[3] <= box[1],
}


def read_caption(caption: str) -> dict:
    """What a caption says, from its words alone: objects, places, a relation, a background, whether that is all."""
    found = list(OBJECT.finditer(caption))
    between = [caption[a.end() : b.start()] for a, b in zip(found, found[1:], strict=False)]
    relation = next((RELATIONS[match[1]] for text in between[:1] if (match := RELATION.match(text))), None)
    background = BACKGROUND.search(caption)
    places = [PLACES[match[0]] for match in PLACE.finditer(caption)]
    return {
        "objects": [(SIZES.get(match[1]), match[2], SHAPE_OF[match[3]]) for match in found],
        "alone": re.search(r"\bonly\b|\bnothing else$", caption) is not None,
        "relation": relation,
        "background": background and (PATTERNS[background[1]], background[2]),
        "places": places or [None] * len(found),
    }


def fits(claim: dict, scene: Scene) -> bool:
    """Whether everything that a caption says is true of a scene, which may show more than it names."""
    named = []
    for (size, color, shape), place in zip(claim["objects"], claim["places"], strict=True):
        match = [item for item in scene.objects if (item.color, item.shape) == (color, shape)]
        if not match or size not in (None, match[0].size) or place not in (None, match[0].cell):
            return False
        named.append(match[0])
    if claim["relation"] is not None and not APART[claim["relation"]](named[0].box, named[1].box):
        return False
    if claim["alone"] and len(scene.objects) > 1:
        return False
    return claim["background"] in (None, (scene.pattern, scene.background_color))


def test_an_item_has_the_agreed_format():
    dataset = ScenesDataset("validation", num_scenes=10, image_size=48)
    item = dataset[3]
    assert (item["image"].size, item["image"].mode) == ((48, 48), "RGB")
    assert [type(caption) for caption in item["captions"]] == [str] * 5
    assert (item["pair_id"], item["name"]) == (3, "validation-00003")
    assert 0 <= item["seed"] < 2**63
    assert len(dataset) == 10 and len(list(dataset)) == 10


@pytest.mark.parametrize("limit", [0, 2**20])
def test_a_scene_is_drawn_once_where_there_is_room_and_is_the_same(monkeypatch, limit):
    drawn = []

    def draw(scene, image_size):
        drawn.append(scene)
        return draw_scene(scene, image_size)

    monkeypatch.setattr(still, "MAX_KEPT_BYTES", limit)
    monkeypatch.setattr(still, "draw_scene", draw)
    dataset = ScenesDataset("train", 3, 48)
    first, again = dataset[1], dataset[1]
    assert len(drawn) == (2 if limit == 0 else 1)
    assert first["image"].tobytes() == again["image"].tobytes() and first["captions"] == again["captions"]
    first["image"].paste((0, 0, 0), (0, 0, 48, 48))  # a caller's own copy
    first["captions"].clear()
    assert dataset[1]["image"].tobytes() == again["image"].tobytes() and dataset[1]["captions"] == again["captions"]
    assert len(pickle.dumps(dataset)) < 2_000  # workers draw their own


def test_sizes_of_the_splits_by_default():
    assert (len(ScenesDataset("train")), len(ScenesDataset("validation"))) == (4000, 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "train, validation; got 'test'"),
        ({"split": "train", "num_scenes": 0}, "at least 1, got 0"),
        ({"split": "train", "image_size": 16}, "at least 32 for `scenes`, got 16"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScenesDataset(**arguments)


def test_a_scene_does_not_depend_on_order_length_or_size():
    dataset, longer = ScenesDataset("train", num_scenes=8), ScenesDataset("train", num_scenes=9, image_size=90)
    backwards = {i: dataset[i] for i in reversed(range(8))}
    for i, item in enumerate(ScenesDataset("train", num_scenes=8)):
        assert item["captions"] == backwards[i]["captions"] == longer[i]["captions"]
        assert item["image"].tobytes() == backwards[i]["image"].tobytes()
    assert dataset[-1]["captions"] == dataset[7]["captions"]


def test_seeds_and_splits_differ():
    firsts = [ScenesDataset(split, seed=seed)[0] for split in ("train", "validation") for seed in (0, 1)]
    assert len({item["image"].tobytes() for item in firsts}) == 4
    assert len({tuple(item["captions"]) for item in firsts}) == 4


def combinations(dataset) -> list[set]:
    return [{(item.color, item.shape) for item in dataset.scene(i).objects} for i in range(len(dataset))]


def test_held_out_combinations_are_seen_in_validation_alone():
    train, validation = combinations(ScenesDataset("train")), combinations(ScenesDataset("validation"))
    held_out = {(color, shape) for color in COLORS for shape in SHAPES if is_held_out(color, shape)}
    assert len(held_out) == 16
    assert not set.union(*train) & held_out
    assert all(scene & held_out for scene in validation)
    assert set.union(*validation) >= held_out


def test_every_color_and_every_shape_is_seen_in_training():
    seen = set.union(*combinations(ScenesDataset("train")))
    assert len(COLORS) >= 8 and len(SHAPES) >= 6
    for color in COLORS:
        assert len({shape for seen_color, shape in seen if seen_color == color}) == 6
    for shape in SHAPES:
        assert len({color for color, seen_shape in seen if seen_shape == shape}) == 6


@pytest.mark.parametrize("image_size", [32, 64, 97])
def test_boxes_lie_in_the_image_and_apart(image_size):
    dataset = ScenesDataset("validation", num_scenes=100, image_size=image_size)
    for i in range(len(dataset)):
        objects = dataset.scene(i).objects
        assert 1 <= len(objects) <= 3
        covered = np.zeros((image_size, image_size), dtype=int)
        for item in objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= image_size and 0 <= top < bottom <= image_size
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_box_holds_all_of_its_object_and_no_more(shape):
    dataset, checked = ScenesDataset("train", num_scenes=60), 0
    for i in range(len(dataset)):
        scene = dataset.scene(i)
        for item in scene.objects:
            if item.shape != shape:
                continue
            alone, empty = replace(scene, objects=(item,)), replace(scene, objects=())
            changed = ImageChops.difference(draw_scene(alone, 64), draw_scene(empty, 64)).convert("L").getbbox()
            assert np.abs(np.subtract(changed, item.box)).max() <= 1
            assert all(outer <= inner for outer, inner in zip(item.box[:2], changed[:2], strict=True))
            assert all(outer >= inner for outer, inner in zip(item.box[2:], changed[2:], strict=True))
            checked += 1
    assert checked > 0


def test_an_object_has_its_color_and_large_is_larger_than_small():
    dataset, sides = ScenesDataset("train", num_scenes=300), {"small": [], "large": []}
    for i in range(len(dataset)):
        pixels = np.asarray(dataset[i]["image"]).astype(int)
        for item in dataset.scene(i).objects:
            left, top, right, bottom = item.box
            near = np.abs(pixels[top:bottom, left:right] - item.rgb).max(-1) <= 3
            assert near.any()
            assert min(COLORS, key=lambda name: np.abs(np.subtract(COLORS[name], item.rgb)).sum()) == item.color
            sides[item.size].append(right - left)
    assert max(sides["small"]) < min(sides["large"])


@pytest.mark.parametrize("shape", SHAPES)
def test_only_a_ring_is_open_in_the_middle(shape):
    item = SceneObject("red", shape, "small", (215, 35, 35), (1, 1), (20, 20, 32, 32))
    image = draw_scene(Scene((item,), "plain", "navy", 0), 64)
    background = image.getpixel((0, 0))
    assert image.getpixel((26, 26)) == (background if shape == "ring" else item.rgb)


@pytest.mark.parametrize(
    ("pattern", "varies_along"),
    [("plain", 0), ("gradient", 1), ("stripes", 1), ("checks", 2), ("noise", 2)],
)
def test_a_background_looks_like_its_name(pattern, varies_along):
    for texture_seed in range(20):
        image = draw_scene(Scene((), pattern, "navy", texture_seed), 64)
        pixels = np.asarray(image).astype(int)
        assert sum((np.ptp(pixels, axis=axis) > 2).any() for axis in (0, 1)) == varies_along
        base = np.array(BACKGROUND_COLORS["navy"])
        assert (pixels >= base - 1).all() and (pixels <= base + 31).all()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_captions_are_true_of_their_scene_and_differ(split):
    dataset = ScenesDataset(split, num_scenes=300)
    for i in range(len(dataset)):
        scene = dataset.scene(i)
        assert len(set(scene.captions)) == 5
        claims = [read_caption(caption) for caption in scene.captions]
        assert all(fits(claim, scene) for claim in claims)
        assert all(len(claim["objects"]) == len(scene.objects) for claim in claims)
        assert all("an" in caption.split() for caption in scene.captions if " an orange" in caption)
        many = len(scene.objects) > 1
        assert sum(claim["background"] is not None for claim in claims) == (2 if many else 3)
        assert sum(claim["relation"] is not None for claim in claims) == (2 if many else 0)
        assert sum(claim["places"][0] is not None for claim in claims) == (1 if many else 4)


def test_the_reader_of_captions_sees_what_is_wrong():
    dataset = ScenesDataset("train", num_scenes=100)
    scene = next(scene for scene in map(dataset.scene, range(100)) if len(scene.objects) == 2)
    flipped = replace(
        scene,
        objects=tuple(
            replace(item, box=other.box, cell=other.cell)
            for item, other in zip(scene.objects, scene.objects[::-1], strict=True)
        ),
    )
    repainted = replace(scene, objects=tuple(replace(item, color="none") for item in scene.objects))
    other_wall = replace(scene, background_color="none")
    claims = [read_caption(caption) for caption in scene.captions]
    assert [sum(fits(claim, wrong) for claim in claims) for wrong in (flipped, repainted, other_wall)] == [2, 0, 3]


def test_captions_tell_validation_scenes_apart():
    """Text-to-image recall@1 of an oracle that picks blindly among all scenes of which a caption is true."""
    dataset = ScenesDataset("validation")
    scenes = [dataset.scene(i) for i in range(len(dataset))]
    chances = [
        1 / sum(fits(claim, other) for other in scenes)
        for scene in scenes
        for claim in map(read_caption, scene.captions)
    ]
    assert np.mean(chances) > 0.97


def test_seeds_change_with_epoch_index_and_data_set_only():
    draws = {(s, e, i): None for s in range(3) for e in range(3) for i in range(50)}
    for seed, epoch, index in draws:
        seeds = EpochSeeds(seed)
        seeds.set_epoch(epoch)
        draws[seed, epoch, index] = seeds(index)
    assert len(set(draws.values())) == len(draws)
    again = EpochSeeds(1)
    again.set_epoch(5)
    again.set_epoch(2)
    assert (again.epoch, again(7)) == (2, draws[1, 2, 7])


def test_a_new_epoch_changes_the_seed_and_leaves_the_scene():
    dataset = ScenesDataset("train", num_scenes=3)
    before = dataset[1]
    dataset.set_epoch(1)
    after = dataset[1]
    assert before["seed"] != after["seed"]
    assert before["image"].tobytes() == after["image"].tobytes() and before["captions"] == after["captions"]


def first_as_text(items: list[dict]) -> str:
    return f"{items[0]['seed']} {items[0]['captions']} {zlib.crc32(items[0]['image'].tobytes())}"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_persistent_workers_draw_the_same_scenes_and_see_set_epoch(context):
    dataset = ScenesDataset("train", num_scenes=4)
    loader = DataLoader(
        dataset, num_workers=1, persistent_workers=True, collate_fn=first_as_text, multiprocessing_context=context
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert list(loader) == [first_as_text([dataset[i]]) for i in range(4)]
