"""`moving_scenes`: a built-in generator of short videos whose captions speak of motion and order.

One or two objects act, one after the other or at the same time: "a blue square grows, then a red circle moves left".
The videos are real mp4 files with a metadata.jsonl, so that they are opened and read as a user's own videos are. No
validation video has the actors and events of a training video. This toy problem is not from the paper.

A model that averages its frame embeddings sees where objects have been and how large they were, but not in what order.
It can learn the parts of "moves left, then grows", but it cannot tell a video from its reverse.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.utils import requires_backends

from ..atomic_write import atomic_write
from ..splits import MissingSplitError
from .drawing import BACKGROUND_COLORS, COLORS, SHAPES, Scene, SceneObject, draw_scene

SPLIT_SIZES = {"train": 2000, "validation": 100}
VALIDATION_SHARE = 8  # one description in so many belongs to the validation split
MIN_IMAGE_SIZE = 48  # below this a small object has fewer than five pixels a side
PATTERNS = ("plain", "gradient")
# Verb phrases, by action.
ACTIONS = {
    "left": ("moves left", "goes to the left", "slides left"),
    "right": ("moves right", "goes to the right", "slides right"),
    "up": ("moves up", "goes upwards", "rises"),
    "down": ("moves down", "goes downwards", "sinks"),
    "grow": ("grows", "gets bigger", "becomes larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
}
# Side of an object as a share of its part of the image.
SMALL, MEDIUM, LARGE = 0.25, 0.35, 0.55
CAPTIONS_PER_VIDEO = 4


@dataclass(frozen=True)
class Event:
    """
    One action of one actor.

    Args:
        actor: 0 or 1, the position in `MovingScene.actors`.
        action: A key of `ACTIONS`.
        start, end: Shares of the video's length.
    """

    actor: int
    action: str
    start: float
    end: float


@dataclass(frozen=True)
class MovingScene:
    """
    What a video shows.

    Args:
        actors: (color, shape) of one or two objects.
        events: One event, or two in the order in which they start.
        is_split_sideways: Whether two actors have the left and right half of the image, not the upper and lower half.
        pattern, background_color, texture_seed: As in [`Scene`].
        captions: Captions of the same meaning and different wording.
    """

    actors: tuple[tuple[str, str], ...]
    events: tuple[Event, ...]
    is_split_sideways: bool
    pattern: str
    background_color: str
    texture_seed: int
    captions: tuple[str, ...]


def write_moving_scenes(
    folder: str | Path,
    split: str,
    num_videos: int | None = None,
    *,
    image_size: int = 64,
    num_frames: int = 24,
    frame_rate: int = 12,
    seed: int = 0,
) -> Path:
    """
    Write the videos of a split and their captions: `folder`/`split`/{00000.mp4, ..., metadata.jsonl}.

    Args:
        folder: `open_videos` opens it when its splits are written.
        split: "train" or "validation".
        num_videos: 2,000 and 100 by default. The first videos do not depend on this number.
        image_size: Height and width in pixels, even. The scenes are the same at every size.
        num_frames: Frames of each video.
        frame_rate: Frames per second.
        seed: Seed of the scenes.

    Returns the folder of the split. Raises `ValueError` for an unknown split, fewer than one video or two frames, and
    an odd size or one of fewer than 48 pixels; `ImportError` without PyAV, the extra `video`.
    """
    if image_size < MIN_IMAGE_SIZE or image_size % 2:
        raise ValueError(f"`image_size` must be even and at least {MIN_IMAGE_SIZE}, got {image_size}.")
    if num_frames < 2:
        raise ValueError(f"`num_frames` must be at least 2, or nothing moves; got {num_frames}.")
    scenes = sample_moving_scenes(split, num_videos, seed)
    target = Path(folder) / split
    target.mkdir(parents=True, exist_ok=True)
    metadata = target / "metadata.jsonl"
    metadata.unlink(missing_ok=True)
    rows: list[dict] = []
    for number, scene in enumerate(scenes):
        rows.append({"file_name": f"{number:05d}.mp4", "captions": scene.captions})
        write_mp4(target / rows[-1]["file_name"], draw_frames(scene, image_size, num_frames), frame_rate, image_size)
    # Written last, so that it names no missing files after a run that was cut off.
    with atomic_write(metadata) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], frame_rate: int, image_size: int) -> None:
    """Write square frames, uint8 RGB, as an mp4 file: in H.264, or in MPEG-4 where FFmpeg was built without it."""
    requires_backends(write_mp4, ["av"])
    import av

    # A fixed quantizer without look-ahead: with look-ahead x264 gives the same input different bytes from run to run.
    h264 = {"qp": "18", "bf": "0", "sc_threshold": "0"}
    codec, options = ("libx264", h264) if "libx264" in av.codecs_available else ("mpeg4", {})
    with atomic_write(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=frame_rate, options=options)
        stream.width = stream.height = image_size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes must not depend on the machine's number of cores
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


# Scenes


def sample_moving_scenes(split: str, num_videos: int | None = None, seed: int = 0) -> list[MovingScene]:
    """The scenes of a split. No two scenes have the same description, in one split or in both."""
    if split not in SPLIT_SIZES:
        message = f"`moving_scenes` has the splits {', '.join(SPLIT_SIZES)}; got {split!r}."
        raise MissingSplitError(message, SPLIT_SIZES, can_be_cut=False)
    num_videos = SPLIT_SIZES[split] if num_videos is None else num_videos
    if num_videos < 1:
        raise ValueError(f"`num_videos` must be at least 1, got {num_videos}.")
    rng = random.Random(f"{seed}/{split}")
    scenes: dict[tuple, MovingScene] = {}
    while len(scenes) < num_videos:
        actors, events = _sample_plot(rng)
        description = describe(actors, events)
        if description not in scenes and _is_of_validation(description) == (split == "validation"):
            scenes[description] = MovingScene(
                actors=actors,
                events=events,
                is_split_sideways=rng.random() < 0.5,
                pattern=rng.choice(PATTERNS),
                background_color=rng.choice(list(BACKGROUND_COLORS)),
                texture_seed=rng.getrandbits(32),
                captions=write_captions(actors, events, rng),
            )
    return list(scenes.values())


def describe(actors: tuple[tuple[str, str], ...], events: tuple[Event, ...]) -> tuple:
    """The events without wording and image: each actor's action, in order. Simultaneous events have no order."""
    steps = [(*actors[event.actor], event.action, event.start) for event in events]
    return tuple(sorted(steps, key=lambda step: (step[-1], step)))


def _is_of_validation(description: tuple) -> bool:
    digest = hashlib.blake2b(repr(description).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % VALIDATION_SHARE == 0


def _sample_plot(rng: random.Random) -> tuple[tuple[tuple[str, str], ...], tuple[Event, ...]]:
    """Draw one actor with one or two events, or two actors with one event each, in turn or at the same time."""
    combinations = [(color, shape) for color in COLORS for shape in SHAPES]
    kind = rng.choices(("one event", "two events", "in turn", "at once"), weights=(1, 2, 3, 2))[0]
    actors = tuple(rng.sample(combinations, 1 if "event" in kind else 2))
    if kind == "one event":
        return actors, (Event(0, rng.choice(list(ACTIONS)), 0.0, 1.0),)
    first, second = rng.sample(list(ACTIONS), 2) if kind == "two events" else rng.choices(list(ACTIONS), k=2)
    first_end, second_start = (1.0, 0.0) if kind == "at once" else (0.5, 0.5)
    return actors, (Event(0, first, 0.0, first_end), Event(len(actors) - 1, second, second_start, 1.0))


# Captions


def write_captions(
    actors: tuple[tuple[str, str], ...], events: tuple[Event, ...], rng: random.Random
) -> tuple[str, ...]:
    """Four different captions, worded at random."""
    captions: dict[str, None] = {}
    while len(captions) < CAPTIONS_PER_VIDEO:
        captions[_write_caption(actors, events, rng)] = None
    return tuple(captions)


def _write_caption(actors: tuple[tuple[str, str], ...], events: tuple[Event, ...], rng: random.Random) -> str:
    names = [f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}" for color, shape in actors]
    verbs = [rng.choice(ACTIONS[event.action]) for event in events]
    if len(events) == 1:
        return rng.choice(("", "we see how ", "a video in which ")) + f"{names[0]} {verbs[0]}"
    if len(actors) == 1:
        return rng.choice(
            (f"{names[0]} {verbs[0]}, then {verbs[1]}", f"{names[0]} first {verbs[0]} and then {verbs[1]}")
        )
    first, second = (f"{name} {verb}" for name, verb in zip(names, verbs, strict=True))
    if events[1].start == 0:
        first, second = rng.sample((first, second), 2)
        return rng.choice((f"{first} while {second}", f"{first} and at the same time {second}"))
    return rng.choice((f"{first}, then {second}", f"first {first}, and then {second}", f"{second} after {first}"))


# Frames


def draw_frames(scene: MovingScene, image_size: int, num_frames: int) -> Iterator[np.ndarray]:
    """The frames of a scene, (H, W, 3) uint8 RGB, from the first moment to the last."""
    for number in range(num_frames):
        moment = number / (num_frames - 1)
        still = Scene(
            objects=tuple(_object_at(scene, actor, moment, image_size) for actor in range(len(scene.actors))),
            pattern=scene.pattern,
            background_color=scene.background_color,
            texture_seed=scene.texture_seed,
        )
        yield np.asarray(draw_scene(still, image_size))


def _object_at(scene: MovingScene, actor: int, moment: float, image_size: int) -> SceneObject:
    """The object of an actor at a moment. Each actor has its own part of the image, so that none covers another."""
    (color, shape), cell = scene.actors[actor], (0, 0)
    left = top = 0
    width = height = image_size
    if len(scene.actors) == 2 and scene.is_split_sideways:
        width, cell = image_size // 2, (0, actor)
        left = actor * width
    elif len(scene.actors) == 2:
        height, cell = image_size // 2, (actor, 0)
        top = actor * height
    x, y, share = _state_at([event for event in scene.events if event.actor == actor], moment)
    side = round(share * min(width, height))
    left, top = left + round(x * (width - side)), top + round(y * (height - side))
    return SceneObject(color, shape, "moving", COLORS[color], cell, (left, top, left + side, top + side))


def _state_at(events: list[Event], moment: float) -> tuple[float, float, float]:
    """
    x, y and side of an actor at a moment: x and y from 0 to 1 in its part of the image, side as a share of it.

    An actor starts where its events do not lead: one that moves left starts on the right.
    """
    state = {"x": 0.5, "y": 0.5, "side": MEDIUM}
    for event in reversed(events):  # the first event about a quantity says where it starts
        name, start, _ = _CHANGES[event.action]
        state[name] = start
    for event in events:
        name, start, end = _CHANGES[event.action]
        progress = min(1.0, max(0.0, (moment - event.start) / (event.end - event.start)))
        if progress > 0:
            state[name] = start + progress * (end - start)
    return state["x"], state["y"], state["side"]


# The quantity that an action changes, with its value at the start and at the end.
_CHANGES = {
    "left": ("x", 0.95, 0.05),
    "right": ("x", 0.05, 0.95),
    "up": ("y", 0.95, 0.05),
    "down": ("y", 0.05, 0.95),
    "grow": ("side", SMALL, LARGE),
    "shrink": ("side", LARGE, SMALL),
}
