"""How well the adaptive momentum filter finds captions that belong to other images.

    python benchmarks/noisy_pairs.py shuffle FOLDER NOISY --share 0.2
    python examples/run_pretraining.py examples/configs/flickr8k_small.yaml --dataset NOISY ...
    python examples/visualize_filter.py NOISY --model RUN/checkpoint-900 --output_dir SCORES
    python benchmarks/noisy_pairs.py report NOISY SCORES/scores.parquet

`shuffle` copies a folder of train.parquet, test.parquet, ... with columns `image` and `captions` (lists) and moves the
given share of the training captions to other images; the column `is_shuffled` of its train.parquet tells which. For
FOLDER `scenes` it draws the built-in training scenes instead.
`report` prints how the scores of visualize_filter.py tell these captions from the others. The numbers in
docs/results.md are made this way.
"""

import argparse
import io
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_cots import ScenesDataset
from modeling_cots.scripts.error_boundary import run_script

NUM_STDS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)


def shuffle_captions(captions: list[list[str]], share: float, seed: int) -> tuple[list[list[str]], list[list[bool]]]:
    """
    Move a share of all captions, drawn at random, to other images, every one of them; each image keeps its number.

    Returns the captions, and for each whether it came from elsewhere. Raises `ValueError` where that cannot be done.
    """
    rng = random.Random(seed)
    slots = [(image, place) for image, texts in enumerate(captions) for place in range(len(texts))]
    chosen = rng.sample(slots, round(share * len(slots)))
    for _ in range(1000):  # each gets the next one's caption; drawn again until none is of its own image
        rng.shuffle(chosen)
        following = chosen[1:] + chosen[:1]
        if all(slot[0] != source[0] for slot, source in zip(chosen, following, strict=True)):
            break
    else:
        raise ValueError(f"Found no way to move {len(chosen)} captions of {len(captions)} images to other images.")
    moved = [list(texts) for texts in captions]
    is_moved = [[False] * len(texts) for texts in captions]
    for (image, place), (source, source_place) in zip(chosen, following, strict=True):
        moved[image][place] = captions[source][source_place]
        is_moved[image][place] = True
    return moved, is_moved


def scenes_table(num_scenes: int = 1000, image_size: int = 96) -> pa.Table:
    """The first training scenes of `scenes`, as the columns `image` and `captions`."""
    images, captions = [], []
    for item in ScenesDataset("train", num_scenes, image_size):
        file = io.BytesIO()
        item["image"].save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{item['name']}.png"})
        captions.append(item["captions"])
    return pa.table({"image": images, "captions": captions})


def shuffle_folder(folder: Path, noisy: Path, share: float, seed: int) -> None:
    """Write `noisy`: the splits of `folder`, and its training captions partly at other images."""
    table = scenes_table() if str(folder) == "scenes" else pq.read_table(folder / "train.parquet")
    moved, is_moved = shuffle_captions(table["captions"].to_pylist(), share, seed)
    place = table.column_names.index("captions")
    table = table.set_column(place, "captions", pa.array(moved, pa.list_(pa.string())))
    table = table.append_column("is_shuffled", pa.array(is_moved, pa.list_(pa.bool_()))).replace_schema_metadata()
    noisy.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.parquet"):
        if path.name != "train.parquet":
            shutil.copyfile(path, noisy / path.name)
    pq.write_table(table, noisy / "train.parquet", row_group_size=100)
    num_moved = sum(map(sum, is_moved))
    print(f"{num_moved:,} of {sum(map(len, is_moved)):,} training captions are at other images now: {noisy}")


def area_under_roc(scores: np.ndarray, is_noise: np.ndarray) -> float:
    """Probability that a right pair scores higher than a noisy one, ties counting half (Mann and Whitney)."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    num_clean = int((~is_noise).sum())
    num_noisy = len(scores) - num_clean
    return float((ranks[~is_noise].sum() - num_clean * (num_clean + 1) / 2) / (num_clean * num_noisy))


def find_moved(noisy: Path, pair_ids: list[int], caption_numbers: list[int]) -> np.ndarray:
    """(N,) bool: which of these captions of the training split `shuffle_folder` has moved."""
    is_moved = pq.read_table(noisy / "train.parquet", columns=["is_shuffled"])["is_shuffled"].to_pylist()
    return np.array([is_moved[image][number] for image, number in zip(pair_ids, caption_numbers, strict=True)])


def report(noisy: Path, scores_path: Path) -> None:
    """Print how well the scores detect the shuffled captions, and what the threshold does at several k."""
    table = pq.read_table(scores_path)
    scores = table["score"].to_numpy().astype(np.float64)
    is_noise = find_moved(noisy, table["pair_id"].to_pylist(), table["caption_number"].to_pylist())
    print(f"{scores_path}: {len(scores):,} pairs, {is_noise.sum():,} shuffled; mean {scores.mean():.3f}")
    print(f"area under the ROC curve {area_under_roc(scores, is_noise):.3f}")
    print("   k  threshold  dropped  precision  recall   (shuffled pairs among those dropped; dropped among shuffled)")
    for num_std in NUM_STDS:
        threshold = scores.mean() - num_std * scores.std()
        dropped = scores < threshold
        precision = is_noise[dropped].mean() if dropped.any() else float("nan")
        shares = f"{100 * dropped.mean():6.1f} %  {100 * precision:7.1f} %  {100 * dropped[is_noise].mean():4.1f} %"
        print(f"{num_std:4.1f}  {threshold:9.3f}  {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shuffle = commands.add_parser("shuffle", help="make a copy of a data set with misplaced captions")
    shuffle.add_argument("folder", type=Path)
    shuffle.add_argument("noisy", type=Path)
    shuffle.add_argument("--share", type=float, default=0.2)
    shuffle.add_argument("--seed", type=int, default=0)
    measure = commands.add_parser("report", help="hold scores against the truth")
    measure.add_argument("noisy", type=Path)
    measure.add_argument("scores", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "shuffle":
        shuffle_folder(args.folder, args.noisy, args.share, args.seed)
    else:
        for path in args.scores:
            report(args.noisy, path)


if __name__ == "__main__":
    run_script(main)
