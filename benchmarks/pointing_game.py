"""Do relevance maps point at what a word names? The pointing game on held-out `scenes`, whose boxes are known.

    python benchmarks/pointing_game.py --model runs/quickstart

A map points at the center of its most relevant patch. Counted is how often that lies in the box of the object that
the words of a caption name: color and shape ("red circle"), the color alone, the shape alone. Beside it stand

* chance: a patch drawn uniformly, which is the share of the patches whose center lies in the box (exact, not sampled);
* attention roll-out (Abnar and Zuidema, 2020), the product of (A + I) / 2 over the layers: it knows no words;
* the GAE map of the whole caption, which knows no single word;
* other meanings of "the map of a word" than ours (what the embedding loses without the word): what it loses when the
  word is replaced by [MASK]; the projected output at the word's own pieces; the word as its own caption;
* occlusion: the patch without which, grayed out to the image's mean, the word's score falls most. No map of
  attention, but what the model reacts to: a bound for what its attention could show.

Words that a caption has twice are left out.
"""

import argparse
from collections import defaultdict

import torch
from torch.nn import functional as F
from transformers import AutoProcessor

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.data.scenes.drawing import SHAPES
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.visualization.relevance import find_words, image_relevance, word_targets

KINDS = ("color and shape", "color", "shape")


def words_of_objects(scene, caption: str) -> list[tuple[str, str, object]]:
    """(kind, word, object) for every object that a caption names by words that it has only once."""
    found = []
    for item in scene.objects:
        for shape in SHAPES[item.shape].words:
            if f"{item.color} {shape}" in caption:
                named = zip(KINDS, (f"{item.color} {shape}", item.color, shape), strict=True)
                padded = f" {caption} ".replace(",", " ,")
                found += [(kind, word, item) for kind, word in named if padded.count(f" {word} ") == 1]
    return found


def attention_rollout(attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(N,) row of [CLS] in the product of (A + I) / 2 over the layers of one image, A averaged over the heads."""
    row = torch.zeros(attentions[0].shape[-1])
    row[0] = 1
    for attention in reversed(attentions):
        row = (row + row @ attention[0].mean(dim=0)) / 2
    return row


def occlusion_maps(model, pixel_values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(K, rows, columns): by how much the scores of (K, d) targets fall when a patch becomes the image's mean."""
    height, width = model.config.patch_size
    rows, columns = pixel_values.shape[-2] // height, pixel_values.shape[-1] // width
    occluded = pixel_values.repeat(rows * columns, 1, 1, 1)
    mean = pixel_values.mean(dim=(2, 3), keepdim=True)[0]
    for patch in range(rows * columns):
        top, left = patch // columns * height, patch % columns * width
        occluded[patch, :, top : top + height, left : left + width] = mean
    fall = model.encode_image(pixel_values) @ targets.t() - model.encode_image(occluded) @ targets.t()
    return fall.t().unflatten(-1, (rows, columns))


def is_inside(box, y: float, x: float) -> bool:
    left, top, right, bottom = box
    return left <= x < right and top <= y < bottom


class Game:
    """Hits of every method and kind of words, with chance and the best that patch centers allow."""

    def __init__(self, model, scenes: ScenesDataset):
        self.model, self.scenes = model, scenes
        self.hits: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.named: dict[tuple[str, str], list[float]] = defaultdict(list)

    def play(self, kind: str, item, objects, maps: dict[str, torch.Tensor]) -> None:
        """Score one word: maps (rows, columns) by method; `item` is the object that it names, one of `objects`."""
        height, width = self.model.config.patch_size
        rows, columns = next(iter(maps.values())).shape
        centers = [((row + 0.5) * height, (column + 0.5) * width) for row in range(rows) for column in range(columns)]
        inside = [is_inside(item.box, *center) for center in centers]
        self.hits["chance", kind].append(sum(inside) / len(inside))
        self.hits["best possible", kind].append(float(any(inside)))
        for method, relevance in maps.items():
            point = centers[int(relevance.argmax())]
            hit = is_inside(item.box, *point)
            self.hits[method, kind].append(float(hit))
            if len(objects) > 1 and any(is_inside(other.box, *point) for other in objects):
                self.named[method, kind].append(float(hit))

    def table(self) -> str:
        """Hits in percent; in brackets the share of the named object in all objects hit, in scenes of several."""
        methods = dict.fromkeys(method for method, _ in self.hits)
        lines = [f"{'':24s}" + "".join(f"{kind:>20s}" for kind in KINDS)]
        for method in methods:
            cells = []
            for kind in KINDS:
                hits, named = self.hits[method, kind], self.named[method, kind]
                share = f" ({100 * sum(named) / len(named):.0f})" if named else ""
                cells.append(f"{100 * sum(hits) / len(hits):.1f}{share}")
            lines.append(f"{method:24s}" + "".join(f"{cell:>20s}" for cell in cells))
        counts = ", ".join(f"{len(self.hits['chance', kind]):,} {kind}" for kind in KINDS)
        return "\n".join([*lines, f"words: {counts}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart", help="a COTS checkpoint trained on scenes")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--num_scenes", type=int, default=200, help="held-out scenes, five captions each")
    args = parser.parse_args()
    check_revision("model", args.model, args.revision)
    version = {"revision": args.revision or "main"}
    model = COTSModel.from_pretrained(args.model, attn_implementation="eager", **version).eval()
    processor = AutoProcessor.from_pretrained(args.model, **version)
    scenes = ScenesDataset("validation", args.num_scenes, model.config.image_size[0])
    game = Game(model, scenes)
    for number in range(len(scenes)):
        scene = scenes.scene(number)
        pixel_values = processor.image_processor(scenes[number]["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            outputs = model.get_image_features(pixel_values, output_attentions=True)
        rows, columns = (side // p for side, p in zip(pixel_values.shape[-2:], model.config.patch_size, strict=True))
        rollout = attention_rollout(outputs.attentions)[-rows * columns :].view(rows, columns)
        for caption in scene.captions:
            words = words_of_objects(scene, caption)
            if not words:
                continue
            targets = targets_of(model, processor.tokenizer, caption, [word for _, word, _ in words])
            stacked = torch.cat(list(targets.values()))
            gae = image_relevance(model, pixel_values, stacked.unsqueeze(0))[0].split(len(words))
            with torch.no_grad():
                occlusion = occlusion_maps(model, pixel_values, targets["GAE, the word"])
            for place, (kind, _, item) in enumerate(words):
                maps = {"attention roll-out": rollout}
                maps.update({name: of_words[place] for name, of_words in zip(targets, gae, strict=True)})
                game.play(kind, item, scene.objects, {**maps, "occlusion, the word": occlusion[place]})
    print(f"{args.num_scenes} held-out scenes: map's maximum on the named object, in percent")
    print("(in scenes of several objects: the named one's share of all objects hit)")
    print(game.table())


@torch.no_grad()
def targets_of(model, tokenizer, caption: str, words: list[str]) -> dict[str, torch.Tensor]:
    """By method (K, d): what the maps of K words are the maps of."""
    tokens = tokenizer(caption, truncation=True, return_offsets_mapping=True, return_tensors="pt")
    input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
    found = find_words(caption, tokens["offset_mapping"][0].tolist(), words)
    masks = torch.zeros(len(found), input_ids.shape[1], dtype=torch.bool)
    for row, word in enumerate(found):
        masks[row, list(word.positions)] = True
    whole = model.encode_text(input_ids, attention_mask).expand(len(words), -1)
    hidden = model.run_text_model(input_ids, attention_mask).last_hidden_state[0]
    own = model.text_projection(masks.float() @ hidden / masks.sum(dim=1, keepdim=True))
    masked_ids = input_ids.expand(len(words), -1).masked_fill(masks, tokenizer.mask_token_id)
    alone = tokenizer(words, padding=True, return_tensors="pt")
    return {
        "GAE, whole caption": whole,
        "GAE, the word": word_targets(model, input_ids, attention_mask, masks.unsqueeze(0))[0],
        "GAE, word masked": whole - model.encode_text(masked_ids, attention_mask.expand(len(words), -1)),
        "GAE, its own tokens": F.normalize(own, dim=-1),
        "GAE, word as caption": model.encode_text(alone["input_ids"], alone["attention_mask"]),
    }


if __name__ == "__main__":
    run_script(main)
