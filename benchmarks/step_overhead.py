"""Where the time of the quick start's step goes, and what passes that are left out, or padding, would cost.

    OMP_NUM_THREADS=1 python benchmarks/step_overhead.py

The steps are those of `examples/configs/quickstart.yaml`, taken by the real training loop over a tenth of its images
for as many epochs. Process time is added up by part of the code; time in a part that another one calls counts for the
inner one alone. "Encoders" are the passes of both encoders and of their momentum copies, and the backward pass. Other
libraries' are the encoders, the optimizer and what is left of the loop; all other parts are ours.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from side_by_side import medians, row, run_alone
from transformers import set_seed
from transformers.trainer_callback import CallbackHandler

from modeling_cots import COTSForPreTraining, COTSTrainer, ScenesDataset
from modeling_cots.data.image_collators import COTSDataCollator
from modeling_cots.method.feature_queue import PairQueue
from modeling_cots.method.momentum import MomentumEncoder
from modeling_cots.scripts.pretraining import ScriptArguments
from modeling_cots.scripts.steps import build_parts, parse_options, read_config
from modeling_cots.training import short_captions
from modeling_cots.training.finite_check import FiniteCheck, StepSnapshot
from modeling_cots.training.log import TrainingLog
from modeling_cots.training.objective import COTSObjective
from modeling_cots.training.queue_freshness import QueueFreshness

CONFIGS = Path(__file__).parents[1] / "examples/configs"
NUM_SCENES, ROUNDS = 400, 15
ENCODERS, OPTIMIZER, LOOP = "encoders", "clipping and optimizer", "the rest of the loop"
# What a part is made of: classes and the names of their functions.
PARTS: dict[str, list[tuple[type, str]]] = {
    "drawing scenes": [(ScenesDataset, "__getitem__")],
    "collator": [(COTSDataCollator, "__call__")],
    "transfers and normalization": [(COTSTrainer, "_prepare_inputs")],
    ENCODERS: [(COTSForPreTraining, "forward"), (COTSObjective, "momentum_encode"), (Accelerator, "backward")],
    "losses": [(COTSObjective, "__call__")],
    "queue": [(PairQueue, "candidates"), (COTSObjective, "push")],
    "finite check and snapshot": [
        (FiniteCheck, "add"),
        (FiniteCheck, "check"),
        (StepSnapshot, "take"),
        (StepSnapshot, "take_generators"),
    ],
    "logging": [(TrainingLog, "add"), (QueueFreshness, "add"), (COTSTrainer, "log"), (COTSTrainer, "_averages")],
    "callbacks": [(CallbackHandler, "call_event")],
    "momentum update": [(MomentumEncoder, "update_")],
    OPTIMIZER: [(Accelerator, "clip_grad_norm_"), (AcceleratedOptimizer, "step")],
}
NOT_OURS = (ENCODERS, OPTIMIZER, LOOP)


class PartTimes:
    """Process time by part, of all that runs in `watching`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def _count(self) -> None:
        """What has passed since the last call belongs to the part that runs."""
        now = time.process_time()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, a part runs."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def _timed(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the functions of `PARTS` are timed, and all else is the rest of the loop."""
        plain = [(owner, name, getattr(owner, name)) for functions in PARTS.values() for owner, name in functions]
        for part, functions in PARTS.items():
            for owner, name in functions:
                setattr(owner, name, self._timed(part, getattr(owner, name)))
        try:
            with self.part(LOOP):
                yield
        finally:
            for owner, name, function in plain:
                setattr(owner, name, function)


def build_trainer(folder: str, num_scenes: int, text_dropout: float = 0.0) -> COTSTrainer:
    """The quick start's, without evaluation."""
    options = ["--output_dir", folder, "--disable_tqdm", "true", "--use_cpu", "true"]
    options += ["--model_config", str(CONFIGS / "quickstart_model.json")]
    script_args, args = parse_options(
        ScriptArguments, argv=[str(CONFIGS / "quickstart.yaml"), *options], description=__doc__, writes=False
    )
    set_seed(args.seed)
    config = read_config(script_args)
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = text_dropout
    scenes = ScenesDataset("train", num_scenes, config.image_size[0])
    parts = build_parts(script_args, config, args, scenes)
    return COTSTrainer(
        model=parts.model,
        args=args,
        train_dataset=scenes,
        processing_class=parts.processor,
        image_tokenizer=parts.image_tokenizer,
        max_text_length=script_args.max_text_length,
    )


def measure_parts(num_scenes: int) -> tuple[dict[str, float], int]:
    """Seconds of every part, and the number of steps that they were spent in."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, num_scenes)
        times = PartTimes()
        with times.watching():
            trainer.train()
        return times.seconds, trainer.state.global_step


def overhead_rows(num_scenes: int) -> list[dict]:
    """Percent of the step's time, by part, and ours together."""
    seconds, num_steps = measure_parts(num_scenes)
    total = sum(seconds.values())
    note = f"{num_steps} steps of 64 pairs, one thread; a library's"
    rows = []
    for part in [*PARTS, LOOP]:
        own = note if part in NOT_OURS else note.replace("a library's", "ours")
        rows.append(row("overhead", f"% of the quick start's step: {part}", 100 * seconds[part] / total, "none", own))
    ours = sum(spent for part, spent in seconds.items() if part not in NOT_OURS)
    title = "% of the quick start's step: all of ours"
    return [
        *rows,
        row(
            "overhead",
            title,
            100 * ours / total,
            "none",
            f"{num_steps} steps; all but the encoders' passes, the optimizer and the libraries' loop",
        ),
    ]


def step_of(trainer: COTSTrainer) -> Callable[[], None]:
    """A whole step on one batch, always the same, as the training loop takes it."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()

    def take() -> None:
        trainer.finite_check.begin_step()
        trainer.training_step(trainer.model, batch)
        trainer.check_step(trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0))
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return take


def copied_row(text_dropout: float, rounds: int) -> dict:
    """A whole step with momentum 0: passes that equal the online ones taken from there, beside all of them run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, 64, text_dropout)
        take_step = step_of(trainer)

        def take(is_copy: bool) -> None:
            trainer.copied_passes.is_copy = lambda: is_copy
            take_step()
            trainer.momentum_state.encoder.update_(trainer.model.cots, 0.0)

        times = medians({"once": lambda: take(True), "twice": lambda: take(False)}, "cpu", rounds)
    kinds = "no dropout, both encoders" if text_dropout == 0 else f"text dropout {text_dropout}, images alone"
    title = f"step with momentum 0: equal passes run once / twice ({kinds})"
    return row("copied", title, times["once"] / times["twice"], "<= 1", "64 pairs of the quick start, one thread")


def lengths_row(rounds: int) -> dict:
    """A whole step whose captions run by length, beside one whose captions run together."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, 64)
        take_step = step_of(trainer)

        def take(num_groups: int) -> None:
            short_captions.NUM_GROUPS = num_groups
            take_step()

        num_groups = short_captions.NUM_GROUPS
        try:
            times = medians({"by length": lambda: take(num_groups), "together": lambda: take(1)}, "cpu", rounds)
        finally:
            short_captions.NUM_GROUPS = num_groups
    title = f"step: captions in {num_groups} groups by length / together"
    return row(
        "lengths", title, times["by length"] / times["together"], "<= 1", "64 pairs of the quick start, one thread"
    )


def measure(device: str, quick: bool) -> Iterator[dict]:
    """Shares of the step, and the ratio of steps."""
    if device != "cpu":
        yield row("overhead", "% of the quick start's step", None, "none", "a CPU's row: --device cpu")
        return
    torch.set_num_threads(1)
    yield from overhead_rows(64 if quick else NUM_SCENES)
    for text_dropout in (0.0, 0.1):
        yield copied_row(text_dropout, 2 if quick else ROUNDS)
    yield lengths_row(2 if quick else ROUNDS)


if __name__ == "__main__":
    run_alone(measure, __doc__)
