"""What each part of COTS adds on Flickr8k from scratch, beside in-batch contrastive learning (a peer's own code).

    python benchmarks/ablation.py FOLDER --json benchmarks/ablation.json              # every run that is missing there
    python benchmarks/ablation.py FOLDER --json benchmarks/ablation.json --trials     # the search before them
    python benchmarks/ablation_table.py benchmarks/ablation.json docs/results.md      # the tables, from the JSON

FOLDER holds train.parquet, validation.parquet and test.parquet with columns `image` and `captions`. Every arm of
`ARMS` is run with three seeds, on the same images, captions, tokenizer, augmentation, batches and precision, and
with encoders of the same sizes; what they share is examples/configs/flickr8k_small.yaml.

Equal steps: `--steps` for each. Equal compute: as many steps as take the floating-point operations of arm a's, counted
on a real step of each arm, so that what else the machine does plays no part. Trials are measured on the validation
images, and the best settings found are those of the recipe and of arm a; the arms are measured once, on the 1,000
test images.
"""

import argparse
import copy
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from ablation_peer import PeerCollator, build_peer, embed_peer
from noisy_pairs import area_under_roc, find_moved, shuffle_folder
from torch.utils.data import Dataset
from transformers import set_seed

from modeling_cots import COTSConfig, COTSTrainer, COTSTrainingArguments
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.pixel_normalization import PixelNormalizer
from modeling_cots.evaluation.pair_scores import score_pairs
from modeling_cots.evaluation.retrieval_metrics import retrieval_metrics
from modeling_cots.image_reading_cots import read_image
from modeling_cots.scripts.cost import flop_counter
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.factory import (
    build_config,
    build_image_tokenizer,
    build_model,
    build_processor,
    build_tokenizer,
)
from modeling_cots.scripts.starting_point import FROM_SCRATCH
from modeling_cots.training.setup import build_training_collator

EXAMPLES = Path(__file__).parents[1]
RECIPE = EXAMPLES / "examples" / "configs" / "flickr8k_small.yaml"
PROTOCOL = "flickr8k-1k"  # of the test images
SEEDS = 0, 1, 2
NOISE = 0.2  # share of the training captions that the arms e move to other images
KL = {"kl_weight": 0.3, "kl_warmup_steps": 600}
# The filter's statistics need more than a few scores, and then every queued key counts.
SLOW_KEYS = {"momentum": 0.95, "queue_size": 128, "max_key_drift": 1e9}


@dataclass
class Arm:
    """What an arm trains with, and what of the recipe it sets otherwise."""

    title: str
    overrides: dict = field(default_factory=dict)
    is_peer: bool = False
    is_noisy: bool = False


ARMS = {
    "a": Arm("in-batch contrast (VisionTextDualEncoder)", {"weight_decay": 0.2}, is_peer=True),
    "b": Arm("MCL"),
    "c": Arm("MCL + KL", KL),
    "d": Arm("MCL + KL + CMVM + CMLM", {"cmvm_weight": 0.1, "cmlm_weight": 0.2, **KL}),
    "e-off": Arm("MCL + KL on noisy captions, filter off", {**KL, **SLOW_KEYS}, is_noisy=True),
    "e-on": Arm("MCL + KL on noisy captions, filter on", {"adaptive_filter": True, **KL, **SLOW_KEYS}, is_noisy=True),
}
HALF_KEYS = {"momentum": 0.5}
# What each is given otherwise than the recipe, as many times for the peer as for COTS. `temperature` is the model's:
# the peer learns its own from there.
TRIALS = {
    "a": [
        {},
        *({"learning_rate": rate} for rate in (3e-4, 5e-4, 1.5e-3, 2e-3, 4e-3)),
        {"weight_decay": 0.2},
        {"weight_decay": 0.2, "learning_rate": 1.5e-3},
        {"learning_rate": 7e-4},
        {"temperature": 0.05},
    ],
    "c": [
        {},
        {"kl_weight": 1.0},
        {"momentum": 0.2},
        HALF_KEYS,
        *({**HALF_KEYS, "learning_rate": rate} for rate in (1.5e-3, 2e-3)),
        *({**HALF_KEYS, "kl_weight": weight} for weight in (0.0, 1.0)),
        {**HALF_KEYS, "temperature": 0.05},
        SLOW_KEYS,
    ],
}


class DecodedPairs(Dataset):
    """Pairs whose images are decoded once and kept: many runs over the same few small ones."""

    def __init__(self, folder: Path, split: str, seed: int = 0):
        self.pairs = open_pairs(str(folder), split, seed=seed)
        self.images = [read_image(self.pairs[index]["image"]) for index in range(len(self.pairs))]
        self.set_epoch = self.pairs.set_epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {**self.pairs[index], "image": self.images[index]}


class Ablation:
    """
    The recipe with its data, tokenizers and processor, from which every run is made.

    Args:
        folder: The data set.
        eval_split: Split to measure on.
    """

    def __init__(self, folder: Path, eval_split: str):
        self.folder = folder
        self.recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        self.max_text_length = self.recipe["max_text_length"]
        self.protocol = PROTOCOL if eval_split == "test" else None
        self.train_dataset, self.eval_dataset = DecodedPairs(folder, "train"), DecodedPairs(folder, eval_split)
        self.config = build_config(None, str(EXAMPLES / self.recipe["model_config"]), None, None)
        captions = self.train_dataset.pairs.iter_captions()
        vocab_size = self.config.text_config.vocab_size
        self.tokenizer = build_tokenizer(None, None, captions, self.max_text_length, vocab_size)
        self.processor = build_processor(self.config, self.tokenizer, None)
        self.image_tokenizer = build_image_tokenizer("random", self.processor, self.config.image_vocab_size)

    def arguments(self, overrides: dict, seed: int, steps: int, output_dir: str) -> COTSTrainingArguments:
        known = COTSTrainingArguments.__dataclass_fields__
        options = {name: value for name, value in self.recipe.items() if name in known}
        of_this_run = {"seed": seed, "max_steps": steps, "output_dir": output_dir, "save_strategy": "no"}
        of_this_run["use_cpu"] = not torch.cuda.is_available()
        return COTSTrainingArguments(**{**FROM_SCRATCH, **options, **overrides, **of_this_run})

    def settings(self) -> dict:
        """What the numbers depend on beside the options of each run."""
        return {
            "recipe": self.recipe,
            "model": json.loads((EXAMPLES / self.recipe["model_config"]).read_text(encoding="utf-8")),
            "arms": {name: arm.overrides for name, arm in ARMS.items()},
        }

    def run(self, arm: Arm, seed: int, steps: int, overrides: dict | None = None) -> dict:
        """Train once and measure; recalls in percent, ranks, and for noisy captions how well scores tell them."""
        overrides = {**arm.overrides, **(overrides or {})}
        config = copy.deepcopy(self.config)
        config.temperature = overrides.pop("temperature", config.temperature)
        with tempfile.TemporaryDirectory() as work:
            args = self.arguments(overrides, seed, steps, work)
            train_dataset = self.train_dataset
            if arm.is_noisy:
                shuffle_folder(self.folder, Path(work, "noisy"), NOISE, seed)
                train_dataset = DecodedPairs(Path(work, "noisy"), "train")
            trainer = self.build_trainer(arm, args, train_dataset, config)
            trainer.train()
            if arm.is_peer:
                embeds = embed_peer(trainer.model, self.eval_dataset, self.processor, self.max_text_length)
                found = embeds.image_embeds, embeds.text_embeds, embeds.image_ids, embeds.text_ids
                return retrieval_metrics(*found, protocol=self.protocol)
            metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
            if arm.is_noisy:
                metrics["detection_auc"] = self.detection_auc(trainer, Path(work, "noisy"))
            return metrics

    def build_trainer(self, arm: Arm, args: COTSTrainingArguments, train_dataset: Dataset, config: COTSConfig):
        """The trainer of one run: COTS's, or transformers' own around the peer."""
        set_seed(args.seed)
        if arm.is_peer:
            collator = build_training_collator(train_dataset, config, args, self.processor, self.max_text_length)
            return build_peer(config, args, train_dataset, PeerCollator(collator, self.processor))
        model = build_model(
            model=None,
            text_model=None,
            vision_model=None,
            config=config,
            tokenizer=self.tokenizer,
            num_image_tokens=config.image_vocab_size,
            max_text_length=self.max_text_length,
        )
        return COTSTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self.eval_dataset,
            processing_class=self.processor,
            image_tokenizer=self.image_tokenizer,
            max_text_length=self.max_text_length,
            eval_protocol=self.protocol,
        )

    def detection_auc(self, trainer: COTSTrainer, noisy: Path) -> float:
        """Area under the ROC curve of the momentum similarity as a detector of the moved training captions."""
        dataset = open_pairs(str(noisy), "train")
        pairs = score_pairs(
            trainer.momentum_state.encoder.model,
            dataset,
            self.processor,
            trainer.accelerator,
            batch_size=trainer.args.eval_batch_size,
            max_text_length=self.max_text_length,
        )
        is_noise = find_moved(noisy, pairs.pair_ids.tolist(), pairs.caption_numbers.tolist())
        return area_under_roc(pairs.scores.numpy(), is_noise)

    def flop_per_step(self, arm: Arm) -> float:
        """Floating-point operations of one step of an arm, forward and backward, counted on the same real batch."""
        with tempfile.TemporaryDirectory() as work:
            args = self.arguments(arm.overrides, 0, 1, work)
            trainer = self.build_trainer(arm, args, self.train_dataset, self.config)
            items = [self.train_dataset[index] for index in range(trainer.args.train_batch_size)]
            batch = PixelNormalizer(self.processor)(trainer.data_collator(items))
            trainer.model.train()
            with flop_counter() as counter, trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, batch).backward()
            return float(counter.get_total_flops())


def runs_wanted(ablation: Ablation, steps: int, results: dict) -> list[dict]:
    """Every run of the tables: with equal steps, and b, c and d with the steps that arm a's compute allows too.

    Warm-ups of fewer steps are shorter by as much.
    """
    for name, arm in ARMS.items():
        if name not in results["flop_per_step"]:
            results["flop_per_step"][name] = ablation.flop_per_step(arm)
    flop = results["flop_per_step"]
    wanted = []
    for seed in SEEDS:
        wanted += [{"arm": name, "seed": seed, "steps": steps} for name in ARMS]
        for name in "bcd":
            fewer = round(steps * flop["a"] / flop[name])
            # The warm-up of the learning rate is a share of the steps in any case.
            warmup = ARMS[name].overrides.get("kl_warmup_steps")
            shorter = {} if warmup is None else {"kl_warmup_steps": round(warmup * fewer / steps)}
            wanted.append({"arm": name, "seed": seed, "steps": fewer, "overrides": shorter})
    return wanted


def trials_wanted(steps: int) -> list[dict]:
    """As many trials for the peer as for COTS, each with what it sets otherwise than the recipe."""
    return [
        {"arm": name, "seed": 0, "steps": steps, "overrides": overrides}
        for name, trials in TRIALS.items()
        for overrides in trials
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--json", type=Path, required=True, help="where results are kept; what is there is not run again"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--trials", action="store_true", help="run the trials instead, on the validation images")
    args = parser.parse_args()

    results = {"flop_per_step": {}, "runs": [], "trials": []}
    if args.json.exists():
        results |= json.loads(args.json.read_text(encoding="utf-8"))
    ablation = Ablation(args.folder, "validation" if args.trials else "test")
    settings = json.loads(json.dumps(ablation.settings()))
    if results.setdefault("settings", settings) != settings:
        raise ValueError(f"{args.json} holds results of another recipe or other arms: move it away, or name another.")
    kind = "trials" if args.trials else "runs"
    wanted = trials_wanted(args.steps) if args.trials else runs_wanted(ablation, args.steps, results)
    done = [{name: value for name, value in run.items() if name != "metrics"} for run in results[kind]]
    for run in wanted:
        if run in done:
            continue
        metrics = ablation.run(ARMS[run["arm"]], run["seed"], run["steps"], run.get("overrides"))
        results[kind].append({**run, "metrics": metrics})
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({**run, "t2i_recall_at_10": metrics["t2i_recall_at_10"]}), flush=True)


if __name__ == "__main__":
    run_script(main)
