"""What each part of COTS adds from pre-trained encoders on Flickr8k, beside in-batch contrast (transformers' class).

    python benchmarks/ablation.py FLICKR8K --json benchmarks/ablation.json            # every run that is missing there
    python benchmarks/ablation.py FLICKR8K --json benchmarks/ablation.json --trials   # the search before them
    python benchmarks/ablation_table.py benchmarks/ablation.json docs/results.md      # the tables, from the JSON

FLICKR8K holds train.parquet, validation.parquet and test.parquet with columns `image` and `captions`; `--vision_model`
and `--text_model` give both encoders as folders, where no hub is at hand. What the arms share is
examples/configs/flickr8k_dinov2.yaml; what each sets otherwise stands in a file of the folder of that name. Encoders
are locked, and their features computed once for all arms (`--features`), so that a run trains projections alone.

Equal steps: as many for each arm. Equal compute: as many steps as take the floating-point operations of the in-batch
arm, counted on a real step of each. Noise moves a share of the training captions to other images. Trials, as many for
the peer as for MCL, are measured on the validation images; the arms are measured once, on the 1,000 test images.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from ablation_peer import PeerCollator, build_peer, embed_peer
from noisy_pairs import area_under_roc, shuffle_captions
from torch.utils.data import Dataset
from transformers import set_seed

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainer, COTSTrainingArguments
from modeling_cots.data.feature_cache import EVALUATION, TRAINING
from modeling_cots.data.feature_writing import cache_features
from modeling_cots.data.items import EpochSeeds
from modeling_cots.data.pairs import open_pairs
from modeling_cots.evaluation.retrieval_metrics import retrieval_metrics
from modeling_cots.method.filtering import filter_threshold, keep_above, mixture_threshold
from modeling_cots.scripts.cost import flop_counter
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.factory import CONFIG_OPTIONS, build_config, build_model, build_processor, build_tokenizer
from modeling_cots.training.setup import build_training_collator
from modeling_cots.training.standardization import fit_standardization_

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
RECIPE = CONFIGS / "flickr8k_dinov2.yaml"
PROTOCOL = "flickr8k-1k"  # of the test images
SEEDS = 0, 1, 2
PEER, MCL = "in_batch", "mcl"
SMALL_BATCH = {"per_device_train_batch_size": 16, "max_steps": 1_800}
SLOWER_KEYS = {"momentum": 0.998}  # a queue of 1,024 pairs is 64 batches of 16 long, and 16 of 64
FILTERS = "filter_deviation", "filter_mixture", "filter_half_deviation"
TRIALS = [
    {},
    *({"learning_rate": rate} for rate in (3e-4, 3e-3)),
    *({"temperature": temperature} for temperature in (0.05, 0.07)),
    {"temperature": 0.05, "learning_rate": 3e-4},
    {"weight_decay": 0.02},
    {"weight_decay": 1.0},
]
SMALL_BATCH_TRIALS = {
    PEER: [{}, *({"learning_rate": rate} for rate in (3e-4, 1e-4)), {"learning_rate": 3e-4, "weight_decay": 1.0}],
    MCL: [{"learning_rate": 3e-4}, *({**SLOWER_KEYS, "learning_rate": rate} for rate in (1e-3, 3e-4, 1e-4))],
}
BEST_OF_SMALL_BATCH = {PEER: {"learning_rate": 3e-4}, MCL: {**SLOWER_KEYS, "learning_rate": 3e-4}}


@dataclass
class Arm:
    """What an arm trains with, and what of the recipe it sets otherwise."""

    title: str
    peer: bool = False
    overrides: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Arm":
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(options.pop("title"), options.pop("peer", False), options)


def read_arms() -> dict[str, Arm]:
    """The arms by the names of their files."""
    return {path.stem: Arm.read(path) for path in sorted((CONFIGS / RECIPE.stem).glob("*.yaml"))}


class PairsInMemory(Dataset):
    """Captions and features of all items, without images, some captions at other images where `noise` is above 0."""

    def __init__(self, dataset, noise: float = 0.0, seed: int = 0):
        self.seeds = EpochSeeds(seed)
        self.set_epoch = self.seeds.set_epoch  # another caption of each image in each epoch
        items = [dataset[index] for index in range(len(dataset))]
        places = [[(image, place) for place in range(len(item["captions"]))] for image, item in enumerate(items)]
        self.is_moved = [[False] * len(each) for each in places]
        if noise > 0:
            places, self.is_moved = shuffle_captions(places, noise, seed)
        self.items = [
            {
                **item,
                "image": None,
                "captions": [items[image]["captions"][place] for image, place in sources],
                "text_features": np.stack([items[image]["text_features"][place] for image, place in sources]),
            }
            for item, sources in zip(items, places, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return {**self.items[index], "seed": self.seeds(index)}


class Ablation:
    """
    The recipe with its data, features and processor, from which every run is made.

    Args:
        folder: The data set.
        eval_split: Split to measure on.
        features: Folder of cached features.
        encoders: `vision_model` and `text_model`, where they are not the recipe's.
    """

    def __init__(self, folder: Path, eval_split: str, features: Path, encoders: dict[str, str]):
        self.recipe = {**yaml.safe_load(RECIPE.read_text(encoding="utf-8")), **encoders}
        self.max_text_length = self.recipe["max_text_length"]
        self.protocol = PROTOCOL if eval_split == "test" else None
        text_model, vision_model = self.recipe["text_model"], self.recipe["vision_model"]
        options = {name: self.recipe[name] for name in CONFIG_OPTIONS}
        self.config = build_config(None, None, text_model, vision_model, **options)
        train = open_pairs(str(folder), "train", seed=0)
        tokenizer = build_tokenizer(None, text_model, train.iter_captions(), self.max_text_length, 0)
        self.processor = build_processor(self.config, tokenizer, vision_model)
        self.model = build_model(
            model=None,
            text_model=text_model,
            vision_model=vision_model,
            config=self.config,
            tokenizer=tokenizer,
            num_image_tokens=self.config.image_vocab_size,
            max_text_length=self.max_text_length,
        )
        made = {"max_text_length": self.max_text_length, "batch_size": self.recipe["per_device_eval_batch_size"]}
        made["precision"] = "bfloat16" if self.recipe["bf16"] else "float32"
        self.train_dataset, self.eval_dataset = (
            cache_features(opened, self.model.cots, self.processor, features, view=view, **made)
            for opened, view in ((train, TRAINING), (open_pairs(str(folder), eval_split), EVALUATION))
        )
        self.sources = {source.kind: source for source in self.train_dataset.columns}
        fit_standardization_(
            self.model.cots,
            self.train_dataset,
            self.processor,
            batch_size=made["batch_size"],
            max_text_length=self.max_text_length,
            features=self.sources,
        )

    def arguments(self, overrides: dict, seed: int, output_dir: str) -> COTSTrainingArguments:
        known = COTSTrainingArguments.__dataclass_fields__
        options = {name: value for name, value in {**self.recipe, **overrides}.items() if name in known}
        of_this_run = {"seed": seed, "output_dir": output_dir, "save_strategy": "no", "disable_tqdm": True}
        of_this_run |= {"use_cpu": not torch.cuda.is_available(), "feature_cache": None}
        return COTSTrainingArguments(**{**options, **of_this_run})

    def settings(self, arms: dict[str, Arm]) -> dict:
        """What the numbers depend on beside the options of each run, but for where the encoders lie."""
        recipe = {name: value for name, value in self.recipe.items() if name not in ("vision_model", "text_model")}
        return {"recipe": recipe, "arms": {name: vars(arm) for name, arm in arms.items()}}

    def run(self, arm: Arm, seed: int, overrides: dict, noise: float = 0.0) -> dict:
        """Train once and measure; recalls in percent, and with noise how well scores and filter tell it."""
        overrides = {**arm.overrides, **overrides}
        config = copy.deepcopy(self.config)
        config.temperature = overrides.pop("temperature", config.temperature)
        with tempfile.TemporaryDirectory() as work:
            args = self.arguments(overrides, seed, work)
            train_dataset = PairsInMemory(self.train_dataset, noise, seed)
            trainer = self.build_trainer(arm, args, train_dataset, config)
            trainer.train()
            if arm.peer:
                found = embed_peer(trainer.model, self.eval_dataset)
                return retrieval_metrics(*found, protocol=self.protocol)
            metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
            return {**metrics, **(detection(trainer, train_dataset) if noise > 0 or args.adaptive_filter else {})}

    def build_trainer(self, arm: Arm, args: COTSTrainingArguments, train_dataset: Dataset, config: COTSConfig):
        """The trainer of one run: COTS's, or transformers' own around the peer. Projections begin alike in both."""
        set_seed(args.seed)
        model = COTSForPreTraining(config)
        model.load_state_dict(
            {name: tensor for name, tensor in self.model.state_dict().items() if _is_given(name)}, False
        )
        if arm.peer:
            collator = build_training_collator(
                train_dataset, config, args, self.processor, self.max_text_length, features=self.sources
            )
            return build_peer(model.cots, args, train_dataset, PeerCollator(collator))
        return COTSTrainer(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self.eval_dataset,
            processing_class=self.processor,
            max_text_length=self.max_text_length,
            eval_protocol=self.protocol,
        )

    def flop_per_step(self, arm: Arm, overrides: dict) -> float:
        """Floating-point operations of one step of an arm, forward and backward, counted on a real batch."""
        overrides = {**arm.overrides, **overrides}
        config = copy.deepcopy(self.config)
        overrides.pop("temperature", None)
        with tempfile.TemporaryDirectory() as work:
            args = self.arguments(overrides, 0, work)
            train_dataset = PairsInMemory(self.train_dataset)
            trainer = self.build_trainer(arm, args, train_dataset, config)
            batch = trainer.data_collator([train_dataset[index] for index in range(args.train_batch_size)])
            with flop_counter() as counter, trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model.train(), batch).backward()
            return float(counter.get_total_flops())


def _is_given(name: str) -> bool:
    """Whether a tensor of the model is the same in all runs: encoders, and how their features are standardized."""
    return "_model." in name or "standardization" in name


@torch.no_grad()
def detection(trainer: COTSTrainer, dataset: PairsInMemory) -> dict[str, float]:
    """
    How well momentum similarity tells moved captions from others, over all training pairs.

    Returns the area under the ROC curve (without noise there is none), and the shares in percent of moved and of other
    captions that the filter's rule drops.
    """
    momentum, args = trainer.momentum_state.encoder.model.eval(), trainer.args
    images = momentum.embed_image_features(torch.from_numpy(np.stack([each["image_features"][0] for each in dataset])))
    texts = momentum.embed_text_features(torch.from_numpy(np.concatenate([each["text_features"] for each in dataset])))
    images = images.repeat_interleave(torch.tensor([len(each["captions"]) for each in dataset]), dim=0)
    is_noise = torch.tensor([moved for each in dataset.is_moved for moved in each])
    scores = (images * texts).sum(dim=1)
    found = {"detection_auc": area_under_roc(scores.numpy(), is_noise.numpy())} if is_noise.any() else {}
    if not args.adaptive_filter:
        return found
    if args.filter_rule == "mixture":
        threshold = mixture_threshold(scores, (images * texts.roll(5, dims=0)).sum(dim=1))
    else:
        threshold = filter_threshold(scores, args.filter_num_std)
    is_dropped = ~keep_above(scores, threshold)
    if is_noise.any():
        found["dropped_noise"] = 100 * is_dropped[is_noise].float().mean().item()
    return {**found, "dropped_clean": 100 * is_dropped[~is_noise].float().mean().item()}


def runs_wanted(ablation: Ablation, arms: dict[str, Arm], results: dict) -> list[dict]:
    """Every run of the tables, all seeds of one after the other, and what the text says most of first."""
    wanted, others = [], []
    of_small = [{**SMALL_BATCH, **BEST_OF_SMALL_BATCH[name]} for name in (PEER, MCL)]
    for of_peer, of_mcl in (({}, {}), of_small):
        options = {**ablation.recipe, **of_peer}
        flop = results["flop_per_step"].setdefault(str(options["per_device_train_batch_size"]), {})
        for name in (PEER, MCL):
            if name not in flop:
                flop[name] = ablation.flop_per_step(arms[name], of_peer)
        wanted += [{"arm": PEER, "overrides": of_peer}, {"arm": MCL, "overrides": of_mcl}]
        fewer = round(options["max_steps"] * flop[PEER] / flop[MCL])
        others.append({"arm": MCL, "overrides": {**of_mcl, "max_steps": fewer}})
    *filters, last_filter = FILTERS
    for noise in (0.4, 0.2):
        wanted += [{"arm": name, "overrides": {}, "noise": noise} for name in (MCL, *filters)]
    wanted += [{"arm": name, "overrides": {}} for name in arms if name.startswith("kl") or name in filters]
    others += [{"arm": name, "overrides": {}, "noise": noise} for name in (last_filter, PEER) for noise in (0.4, 0.2)]
    others.append({"arm": last_filter, "overrides": {}})
    return [{**run, "seed": seed} for run in [*wanted, *others] for seed in SEEDS]


def trials_wanted() -> list[dict]:
    """As many trials for the peer as for MCL, each with what it sets otherwise than the recipe."""
    small = zip(SMALL_BATCH_TRIALS[PEER], SMALL_BATCH_TRIALS[MCL], strict=True)
    pairs = [({**SMALL_BATCH, **of_peer}, {**SMALL_BATCH, **of_mcl}) for of_peer, of_mcl in small]
    pairs += [(overrides, overrides) for overrides in TRIALS]
    arms = PEER, MCL
    return [{"arm": arm, "overrides": each, "seed": 0} for pair in pairs for arm, each in zip(arms, pair, strict=True)]


def read_into(results: dict, path: Path) -> None:
    """Add what a file of results holds already."""
    if path.exists():
        results |= json.loads(path.read_text(encoding="utf-8"))


def check_settings(path: Path, results: dict, kind: str, settings: dict) -> None:
    """Note the settings of the first runs of a kind. Raises `ValueError` for runs that were made with others."""
    settings = json.loads(json.dumps(settings))
    if results.setdefault(f"settings_of_{kind}", settings) != settings:
        raise ValueError(f"{path} holds {kind} of another recipe or other arms: move it away, or name another.")


def measure_missing(
    path: Path, results: dict, kind: str, wanted: list[dict], measure: Callable[[dict], dict]
) -> Iterator[tuple[dict, dict]]:
    """Measure the wanted runs that are not there yet, each of which is written before it is given."""
    done = [{name: value for name, value in run.items() if name != "metrics"} for run in results[kind]]
    for run in (run for run in wanted if run not in done):
        metrics = measure(run)
        results[kind].append({**run, "metrics": metrics})
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        yield run, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="where results are kept; what is there stays")
    parser.add_argument("--features", type=Path, default="runs/flickr8k_dinov2_features", help="as the recipe's")
    parser.add_argument("--vision_model", help="a folder, in the place of the recipe's Hub id")
    parser.add_argument("--text_model", help="likewise")
    parser.add_argument("--trials", action="store_true", help="run the trials instead, on the validation images")
    args = parser.parse_args()

    arms = read_arms()
    results = {"flop_per_step": {}, "runs": [], "trials": []}
    read_into(results, args.json)
    encoders = {name: getattr(args, name) for name in ("vision_model", "text_model") if getattr(args, name)}
    ablation = Ablation(args.folder, "validation" if args.trials else "test", args.features, encoders)
    kind = "trials" if args.trials else "runs"
    check_settings(args.json, results, kind, ablation.settings(arms))
    wanted = trials_wanted() if args.trials else runs_wanted(ablation, arms, results)
    for run, metrics in measure_missing(
        args.json,
        results,
        kind,
        wanted,
        lambda run: ablation.run(arms[run["arm"]], run["seed"], run["overrides"], run.get("noise", 0.0)),
    ):
        print(json.dumps({**run, "recall_sum": metrics["recall_sum"]}), flush=True)


if __name__ == "__main__":
    run_script(main)
