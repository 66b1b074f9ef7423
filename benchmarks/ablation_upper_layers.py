"""Masked vision and language modeling while upper layers of both encoders train: the second stage of `ablation.py`.

    python benchmarks/ablation_upper_layers.py FLICKR8K --json benchmarks/ablation_upper_layers.json
    python benchmarks/ablation_upper_layers.py FLICKR8K --json benchmarks/ablation_upper_layers.json --trials
    python benchmarks/ablation_table.py benchmarks/ablation_upper_layers.json docs/results.md --upper_layers

For each seed the projections are trained first on locked encoders, as the arm `mcl` of `ablation.py` trains them. From
this model every arm in examples/configs/flickr8k_dinov2_upper_layers goes on for equally many steps, in which the two
upper layers of both encoders train as well. Image tokens are k-means' over the patch features of the same DINOv2
(`kmeans:MODEL`). Images are smaller than the recipe's: an image is encoded in every step, on a CPU.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

from ablation import (
    CONFIGS,
    MCL,
    RECIPE,
    SEEDS,
    Ablation,
    Arm,
    PairsInMemory,
    check_settings,
    measure_missing,
    read_arms,
    read_into,
)
from transformers import set_seed

from modeling_cots import COTSForPreTraining, COTSTrainer
from modeling_cots.data.pairs import open_pairs
from modeling_cots.method.kmeans_tokenizer import KMeansImageTokenizer
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.kmeans_fitting import VOCAB_SIZE, find_or_fit

ARMS = CONFIGS / f"{RECIPE.stem}_upper_layers"
FIRST_STAGE = {"image_size": 112}
SECOND_STAGE = {"freeze_vision": "10", "freeze_text": "4", "max_steps": 40, "logging_steps": 20}  # of 12 and 6 layers
CONTRAST, MASKED_LOSSES = "contrast", ("loss_cmvm", "loss_cmlm")
TRIALS = [{"learning_rate": 1e-4}, {"learning_rate": 3e-5}, {"learning_rate": 1e-5}]
RATES = {"learning_rate": 1e-4, "encoder_learning_rate": 3e-5}  # heads of the masked losses are fresh


def read_upper_layer_arms() -> dict[str, Arm]:
    """The arms by the names of their files."""
    return {path.stem: Arm.read(path) for path in sorted(ARMS.glob("*.yaml"))}


class UpperLayers:
    """
    The first stage by seed, and the second from it.

    Args:
        first: The recipe with its data and features.
        folder: The data set.
        eval_split: Split to measure on.
        tokens: Folder where the image tokenizer is kept.
    """

    def __init__(self, first: Ablation, folder: Path, eval_split: str, tokens: Path):
        self.first, self.mcl = first, read_arms()[MCL]
        self.train_dataset = open_pairs(str(folder), "train", seed=0)
        self.eval_dataset = open_pairs(str(folder), eval_split)
        self.tokens = tokens
        self._heads: dict[int, tuple[COTSForPreTraining, dict]] = {}

    def tokenizer(self) -> KMeansImageTokenizer:
        """Fitted to the training images on the first call, and found again later."""
        images, encoder = self.first.processor.image_processor, self.first.recipe["vision_model"]
        normalization = images.image_mean, images.image_std
        return find_or_fit(
            f"kmeans:{encoder}", self.train_dataset, self.first.config, VOCAB_SIZE, *normalization, str(self.tokens)
        )

    def heads(self, seed: int) -> tuple[COTSForPreTraining, dict]:
        """The model whose projections are trained on locked encoders, and what it measures."""
        if seed not in self._heads:
            with tempfile.TemporaryDirectory() as work:
                args = self.first.arguments(self.mcl.overrides, seed, work)
                dataset = PairsInMemory(self.first.train_dataset, seed=seed)
                trainer = self.first.build_trainer(self.mcl, args, dataset, copy.deepcopy(self.first.config))
                trainer.train()
                self._heads = {seed: (trainer.model, _names(trainer.evaluate()))}
        return self._heads[seed]

    def run(self, arm: Arm, seed: int, overrides: dict) -> dict:
        """Train the second stage once and measure; `before` is what the first stage measures."""
        model, before = self.heads(seed)
        config = copy.deepcopy(model.config)
        config.image_vocab_size = VOCAB_SIZE
        set_seed(seed)
        upper = COTSForPreTraining(config)
        upper.cots.load_state_dict(model.cots.state_dict())
        with tempfile.TemporaryDirectory() as work:
            options = {**self.mcl.overrides, **SECOND_STAGE, **arm.overrides, **overrides}
            args = self.first.arguments(options, seed, work)
            trainer = COTSTrainer(
                model=upper,
                args=args,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                processing_class=self.first.processor,
                image_tokenizer=self.tokenizer() if args.cmvm_weight > 0 else None,
                max_text_length=self.first.max_text_length,
                eval_protocol=self.first.protocol,
            )
            trainer.train()
            lines = [line for line in trainer.state.log_history if "loss_i2t" in line]
            losses = {name: value for name, value in lines[-1].items() if name in MASKED_LOSSES}
            return {**_names(trainer.evaluate()), **losses, "before": before["recall_sum"]}


def _names(metrics: dict) -> dict:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def runs_wanted(arms: dict[str, Arm], trials: bool) -> list[dict]:
    """Every run, all of one seed one after the other; or every trial, which is of the contrastive losses alone."""
    if trials:
        return [{"arm": CONTRAST, "overrides": overrides, "seed": 0} for overrides in TRIALS]
    return [{"arm": name, "overrides": RATES, "seed": seed} for seed in SEEDS for name in arms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept; what is there stays")
    parser.add_argument("--features", type=Path, default="runs/flickr8k_dinov2_features", help="as the recipe's")
    parser.add_argument("--tokens", type=Path, default="runs/flickr8k_dinov2_tokens", help="for the image tokenizer")
    parser.add_argument("--vision_model", help="a folder, in the place of the recipe's Hub id")
    parser.add_argument("--text_model", help="likewise")
    parser.add_argument("--trials", action="store_true", help="run the trials instead, on the validation images")
    args = parser.parse_args()

    arms = read_upper_layer_arms()
    results = {"runs": [], "trials": []}
    read_into(results, args.json)
    encoders = {name: getattr(args, name) for name in ("vision_model", "text_model") if getattr(args, name)}
    split, kind = ("validation", "trials") if args.trials else ("test", "runs")
    first = Ablation(args.folder, split, args.features, {**encoders, **FIRST_STAGE})
    check_settings(args.json, results, kind, {**first.settings(arms), "second_stage": SECOND_STAGE})
    stages = UpperLayers(first, args.folder, split, args.tokens)
    for run, metrics in measure_missing(
        args.json,
        results,
        kind,
        runs_wanted(arms, args.trials),
        lambda run: stages.run(arms[run["arm"]], run["seed"], run["overrides"]),
    ):
        print(json.dumps({**run, "recall_sum": metrics["recall_sum"], "before": metrics["before"]}), flush=True)


if __name__ == "__main__":
    run_script(main)
