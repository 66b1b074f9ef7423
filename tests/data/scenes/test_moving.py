"""Moving scenes: captions that say what the images show, in order; real files; nothing shared by the splits."""

import itertools
import re

import av
import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_cots.data.scenes import moving as module
from modeling_cots.data.scenes.drawing import COLORS
from modeling_cots.data.scenes.moving import (
    ACTIONS,
    SHAPES,
    MovingScene,
    describe,
    draw_frames,
    sample_moving_scenes,
    write_moving_scenes,
)
from modeling_cots.data.videos import open_videos
from modeling_cots.video_reading_cots import read_video

SIZE, NUM_FRAMES = 96, 13  # an odd number of frames has one in the very middle
SCENES = sample_moving_scenes("train", 60) + sample_moving_scenes("validation", 40)


# What the captions say


def parse(caption: str) -> tuple[list[tuple[str, str, str]], bool]:
    """Who does what, (color, shape, action) in the order of time, and whether at the same time: by rules alone."""
    together = " while " in caption or " at the same time " in caption
    parts = re.split(r", and then | and then |, then | after | while | and at the same time ", caption)
    parts = parts[::-1] if " after " in caption else parts
    steps, actor = [], None
    for part in parts:
        if named := re.search(rf"\ban? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) ", part):
            actor = named.groups()
        (action,) = [name for name, verbs in ACTIONS.items() if any(part.endswith(verb) for verb in verbs)]
        steps.append((*actor, action))
    return steps, together


def test_every_caption_tells_the_events_in_order():
    for scene in SCENES:
        expected = [(*scene.actors[event.actor], event.action) for event in scene.events]
        at_once = len(scene.events) == 2 and scene.events[1].start == 0
        assert len(set(scene.captions)) == len(scene.captions) == 4
        for caption in scene.captions:
            steps, together = parse(caption)
            assert together == at_once, caption
            assert (sorted(steps) if at_once else steps) == (sorted(expected) if at_once else expected), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def test_everything_occurs():
    events = [event for scene in SCENES for event in scene.events]
    assert {event.action for event in events} == set(ACTIONS)
    assert {shape for scene in SCENES for _, shape in scene.actors} == set(SHAPES)
    assert {color for scene in SCENES for color, _ in scene.actors} == set(COLORS)
    plots = {(len(scene.actors), len(scene.events), scene.events[-1].start) for scene in SCENES}
    assert plots == {(1, 1, 0.0), (1, 2, 0.5), (2, 2, 0.5), (2, 2, 0.0)}
    words = " ".join(caption for scene in SCENES for caption in scene.captions)
    for phrase in ("then", "after", "while", "at the same time", "first", *itertools.chain(*ACTIONS.values())):
        assert phrase in words


# What the images show


def part_of(scene: MovingScene, actor: int) -> tuple[slice, slice]:
    """Rows and columns of the image that belong to an actor."""
    whole, halves = slice(0, SIZE), (slice(0, SIZE // 2), slice(SIZE // 2, SIZE))
    if len(scene.actors) == 1:
        return whole, whole
    return (whole, halves[actor]) if scene.is_split_sideways else (halves[actor], whole)


def measure(scene: MovingScene, actor: int, frame: np.ndarray) -> dict[str, float]:
    """Where the pixels of an actor's color are, and how far they reach, in pixels."""
    part = frame[part_of(scene, actor)].astype(int)
    rows, columns = np.nonzero(np.abs(part - COLORS[scene.actors[actor][0]]).sum(axis=-1) < 30)
    return {
        "x": (columns.min() + columns.max()) / 2,
        "y": (rows.min() + rows.max()) / 2,
        "side": columns.max() - columns.min() + 1,
    }


CHANGES = {
    "left": ("x", -1),
    "right": ("x", 1),
    "up": ("y", -1),
    "down": ("y", 1),
    "grow": ("side", 1),
    "shrink": ("side", -1),
}


@pytest.mark.parametrize("scenes", [SCENES[:60], SCENES[60:]], ids=["train", "validation"])
def test_objects_do_what_the_events_say_and_only_then(scenes):
    for scene in scenes:
        frames = list(draw_frames(scene, SIZE, NUM_FRAMES))
        assert all(frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8 for frame in frames)
        measured = [[measure(scene, actor, frame) for frame in frames] for actor in range(len(scene.actors))]
        for event in scene.events:
            what, sign = CHANGES[event.action]
            first, last = (round(share * (NUM_FRAMES - 1)) for share in (event.start, event.end))
            values = sign * np.array([place[what] for place in measured[event.actor][first : last + 1]])
            assert np.diff(values).min() >= -2, scene  # a star's tips come and go as it grows
            assert values[-1] - values[0] >= 0.1 * SIZE, scene
        for actor, places in enumerate(measured):
            for moment, (before, after) in enumerate(itertools.pairwise(places)):
                share = (moment + 0.5) / (NUM_FRAMES - 1)
                acts = any(event.actor == actor and event.start < share < event.end for event in scene.events)
                assert acts or before == after, scene


@settings(deadline=None, max_examples=30)
@given(number=st.integers(0, 99), image_size=st.integers(24, 100).map(lambda half: 2 * half), moment=st.floats(0, 1))
def test_objects_stay_in_the_image_and_apart(number, image_size, moment):
    scene = SCENES[number]
    boxes = [module._object_at(scene, actor, moment, image_size).box for actor in range(len(scene.actors))]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= image_size and 0 <= top < bottom <= image_size
        assert right - left >= 5
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


# Which scenes there are


def test_no_two_scenes_are_described_alike_in_or_across_splits():
    descriptions = [
        describe(scene.actors, scene.events)
        for seed in (0, 1)
        for split in ("train", "validation")
        for scene in sample_moving_scenes(split, 100, seed)
        if seed == 0 or split == "validation"
    ]
    train, validation = set(descriptions[:100]), set(descriptions[100:])
    assert len(train) == 100 and len(set(descriptions[100:200])) == 100
    assert not train & validation


def test_a_description_knows_order_but_not_which_of_two_at_once_is_named_first():
    one, two = ("red", "circle"), ("blue", "square")
    left, grow = module.Event(0, "left", 0.0, 1.0), module.Event(1, "grow", 0.0, 1.0)
    swapped = module.Event(0, "grow", 0.0, 1.0), module.Event(1, "left", 0.0, 1.0)
    assert describe((one, two), (left, grow)) == describe((two, one), swapped)
    in_turn = module.Event(0, "left", 0.0, 0.5), module.Event(1, "grow", 0.5, 1.0)
    turned = module.Event(0, "grow", 0.0, 0.5), module.Event(1, "left", 0.5, 1.0)
    assert describe((one, two), in_turn) != describe((two, one), turned)


def test_scenes_depend_on_seed_and_split_and_not_on_their_number():
    assert sample_moving_scenes("train", 7) == SCENES[:7]
    assert sample_moving_scenes("train", 7, seed=1) != SCENES[:7]
    assert len(sample_moving_scenes("validation")) == 100


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    write_moving_scenes(folder, "train", 4, image_size=64, num_frames=20, frame_rate=10)
    write_moving_scenes(folder, "validation", 2, image_size=64, num_frames=20, frame_rate=10)
    return folder


def test_files_open_as_a_users_own_would(written, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for split, scenes in (("train", SCENES[:4]), ("validation", SCENES[60:62])):
        opened = open_videos(str(written), split)
        assert opened.captions == [list(scene.captions) for scene in scenes]
        for index, scene in enumerate(scenes):
            frames, metadata = read_video(opened[index]["video"])
            assert frames.shape == (20, 64, 64, 3) and metadata.fps == 10
            drawn = np.stack(list(draw_frames(scene, 64, 20))).astype(float)
            assert np.abs(frames - drawn).mean() < 6  # of 255: what compression changes


def _decode(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)])


def test_the_same_files_again(written, tmp_path):
    again = write_moving_scenes(tmp_path, "train", 4, image_size=64, num_frames=20, frame_rate=10)
    names = sorted(path.name for path in again.iterdir())
    assert names == [*(f"0000{number}.mp4" for number in range(4)), "metadata.jsonl"]
    first = written / "train"
    assert (again / "metadata.jsonl").read_bytes() == (first / "metadata.jsonl").read_bytes()
    for name in names[:-1]:  # by their images: an encoder may give one input different bytes from run to run
        frames, frames_again = (_decode(folder / name) for folder in (first, again))
        assert frames.shape == frames_again.shape == (20, 64, 64, 3)
        assert np.abs(frames - frames_again).mean() < 1


def test_a_run_that_was_cut_off_leaves_no_metadata(tmp_path, monkeypatch):
    target = write_moving_scenes(tmp_path, "train", 2, num_frames=2)

    def fail(path, *args):
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_mp4", fail)
    with pytest.raises(OSError, match="disk full"):
        write_moving_scenes(tmp_path, "train", 2, num_frames=2)
    assert not (target / "metadata.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "has the splits train, validation; got 'test'"),
        ({"num_videos": 0}, "at least 1, got 0"),
        ({"image_size": 46}, "even and at least 48, got 46"),
        ({"image_size": 65}, "even and at least 48, got 65"),
        ({"num_frames": 1}, "at least 2, or nothing moves; got 1"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_moving_scenes(**{"folder": tmp_path, "split": "train", "num_videos": 1, **arguments})
    assert not list(tmp_path.iterdir())
