"""What a model trained on `moving_scenes` tells apart: held-out videos beside captions in which one thing is untrue.

    python benchmarks/moving_scenes_probe.py runs/moving_scenes

For each change the share of videos that are closer to their true caption than to the changed one; chance is 50 %. The
embedding of a video is the mean of its frames' embeddings, so that the two captions of a movement that fills the whole
video, "moves left" and "moves right", describe the same set of frames: there 50 % is right.
"""

import argparse
import random
import tempfile
from dataclasses import replace

import torch

from modeling_cots import COTSModel, COTSProcessor
from modeling_cots.data.revisions import check_revision
from modeling_cots.data.scenes.moving import (
    COLORS,
    SHAPES,
    MovingScene,
    sample_moving_scenes,
    write_captions,
    write_moving_scenes,
)
from modeling_cots.scripts.error_boundary import run_script

OPPOSITES = {"left": "right", "up": "down", "grow": "shrink"}
OPPOSITES |= {end: start for start, end in OPPOSITES.items()}
OTHER_KIND = {"left": "up", "right": "grow", "up": "shrink", "down": "left", "grow": "right", "shrink": "down"}


def with_other_actor(scene: MovingScene, place: int, values, rng: random.Random) -> MovingScene:
    """Another color (place 0) or shape (place 1) of the first actor, one that no actor has."""
    taken = {actor[place] for actor in scene.actors}
    actor = list(scene.actors[0])
    actor[place] = rng.choice([value for value in values if value not in taken])
    return replace(scene, actors=(tuple(actor), *scene.actors[1:]))


def with_other_action(scene: MovingScene, changes: dict[str, str], fills_video: bool | None) -> MovingScene | None:
    """The first event does something else; only if it lasts as long as the video, or as half of it, where asked."""
    event = scene.events[0]
    if fills_video is not None and fills_video != (event.end - event.start == 1.0):
        return None
    return replace(scene, events=(replace(event, action=changes[event.action]), *scene.events[1:]))


def in_other_order(scene: MovingScene) -> MovingScene | None:
    """What happens first happens second; `None` where nothing has an order."""
    if len(scene.events) < 2 or scene.events[1].start == 0:
        return None
    first, second = scene.events
    return replace(scene, events=(replace(second, start=0.0, end=0.5), replace(first, start=0.5, end=1.0)))


CHANGES = {
    "another color": lambda scene, rng: with_other_actor(scene, 0, list(COLORS), rng),
    "another shape": lambda scene, rng: with_other_actor(scene, 1, SHAPES, rng),
    "another kind of action (left: up)": lambda scene, rng: with_other_action(scene, OTHER_KIND, None),
    "its opposite, in half the video": lambda scene, rng: with_other_action(scene, OPPOSITES, False),
    "its opposite, over the whole video": lambda scene, rng: with_other_action(scene, OPPOSITES, True),
    "the other order": lambda scene, rng: in_other_order(scene),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--num_videos", type=int, default=400)
    options = parser.parse_args()
    check_revision("model", options.model, options.revision)
    version = {"revision": options.revision or "main"}
    model = COTSModel.from_pretrained(options.model, **version).eval()
    processor = COTSProcessor.from_pretrained(options.model, **version)
    scenes = sample_moving_scenes("validation", options.num_videos)
    with tempfile.TemporaryDirectory() as folder:
        size = model.config.image_size[0]
        place = write_moving_scenes(folder, "validation", options.num_videos, image_size=size)
        files = [str(path) for path in sorted(place.glob("*.mp4"))]
        videos = torch.cat([model.encode_video(**processor(videos=[file], return_tensors="pt")) for file in files])

    def scores_of(wordings: list[tuple[str, ...]], rows: list[int]) -> torch.Tensor:
        """(V,) mean similarity of each of V videos to the four wordings of one description."""
        texts = [caption for captions in wordings for caption in captions]
        tokens = processor(text=texts, padding=True, truncation=True, return_tensors="pt")
        embeds = model.encode_text(**tokens).unflatten(0, (len(rows), -1))
        return torch.einsum("vd,vcd->vc", videos[rows], embeds).mean(dim=1)

    print(f"{'what is untrue in the other caption':38} videos   true one closer")
    for name, change in CHANGES.items():
        rng = random.Random(0)
        changed = {row: change(scene, rng) for row, scene in enumerate(scenes)}
        rows = [row for row, scene in changed.items() if scene is not None]
        true, untrue = (
            scores_of([write_captions(s.actors, s.events, random.Random(row)) for row, s in pairs], rows)
            for pairs in ([(row, scenes[row]) for row in rows], [(row, changed[row]) for row in rows])
        )
        print(f"{name:38} {len(rows):6}   {100 * (true > untrue).float().mean():.1f} %")


if __name__ == "__main__":
    run_script(main)
