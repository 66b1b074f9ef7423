"""Every argument of transformers' `TrainingArguments`, as the table in docs/training.md says: passed on, or refused.

A field that a new release of transformers adds is in no row, and fails here until somebody has looked at it.
"""

import dataclasses
import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.data import IterableDataset, Subset
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations import integration_utils
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available

from modeling_cots import COTSTrainer, COTSTrainingArguments, ScenesDataset
from modeling_cots.data.streaming.dataset import StreamingPairs
from modeling_cots.training.base_arguments import MEASURES, REFUSED, check_measure
from modeling_cots.training.setup import REFUSED_PARTS, check_parts

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
PASSED_ON = ("passed on", "passed on, with a default of COTS", "passed on, where the value fits")
REFUSED_ROW = "refused, as it would be ignored or would break the method"
SCRIPTS_ROW = "for scripts"


def read_table() -> dict[str, set[str]]:
    """From the first column of the table to the arguments in the second; values stand there in parentheses."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("## transformers' arguments\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|$", section, re.MULTILINE)
    return {title: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", names))) for title, names in rows}


TABLE = read_table()
PASSED = sorted(set().union(*(TABLE[row] for row in PASSED_ON)) & set(FIELDS))


def first(trainer, name: str):
    return next(entry[name] for entry in trainer.state.log_history if name in entry)


def layers(trainer) -> list:
    return [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoints(trainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def group(trainer) -> dict:
    return trainer.optimizer.param_groups[0]


def steps_of(trainer, name: str) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


SAVING = {"save_strategy": "steps", "save_steps": 1}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}
# What a run of two steps on 24 images in batches of 8 shows of an argument: what it is given, and what must be seen.
EFFECTS = {
    "output_dir": ({}, lambda t: Path(t.args.output_dir).is_dir()),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 4}, lambda t: t.queue.num_pushed == 8),
    "num_train_epochs": ({"max_steps": -1, "num_train_epochs": 2}, lambda t: t.state.global_step == 6),
    "max_steps": ({"max_steps": 1}, lambda t: t.state.global_step == 1),
    "learning_rate": ({"learning_rate": 5e-4}, lambda t: first(t, "learning_rate") == 5e-4),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, lambda t: t.lr_scheduler.get_last_lr()[0] == 1e-3),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 4e-4}},
        lambda t: t.lr_scheduler.get_last_lr()[0] == pytest.approx(4e-4),
    ),
    "warmup_steps": ({"warmup_steps": 2}, lambda t: first(t, "learning_rate") == 0),
    "optim": ({"optim": "sgd"}, lambda t: type(t.optimizer.optimizer) is torch.optim.SGD),
    "weight_decay": ({"weight_decay": 0.3}, lambda t: group(t)["weight_decay"] == 0.3),
    "adam_beta1": ({"adam_beta1": 0.5}, lambda t: group(t)["betas"][0] == 0.5),
    "adam_beta2": ({"adam_beta2": 0.5}, lambda t: group(t)["betas"][1] == 0.5),
    "adam_epsilon": ({"adam_epsilon": 1e-3}, lambda t: group(t)["eps"] == 1e-3),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, lambda t: t.queue.num_pushed == 24),
    "max_grad_norm": ({"max_grad_norm": 1e-9, "optim": "sgd", "weight_decay": 0.0}, lambda t: moved(t) < 1e-9),
    "bf16": ({"bf16": True}, lambda t: t.accelerator.mixed_precision == "bf16"),
    "fp16": ({"fp16": True}, lambda t: t.accelerator.scaler is not None),
    "activation_checkpointing": ({"activation_checkpointing": True}, lambda t: layers(t)[0].gradient_checkpointing),
    "activation_checkpointing_kwargs": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        lambda t: layers(t)[0]._gradient_checkpointing_func.keywords["use_reentrant"],
    ),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, lambda t: first(t, "loss") != first(without(t), "loss")),
    "logging_strategy": ({"logging_strategy": "epoch", "max_steps": 3}, lambda t: steps_of(t, "loss") == [3]),
    "logging_steps": ({"logging_steps": 2}, lambda t: steps_of(t, "loss") == [2]),
    "logging_first_step": ({"logging_steps": 2, "logging_first_step": True}, lambda t: steps_of(t, "loss") == [1, 2]),
    "include_num_input_tokens_seen": (
        {"include_num_input_tokens_seen": "non_padding"},
        lambda t: t.state.num_input_tokens_seen == num_tokens(t),
    ),
    "report_to": ({"report_to": "none"}, lambda t: t.args.report_to == []),
    "eval_strategy": ({"eval_strategy": "epoch", "max_steps": 3}, lambda t: steps_of(t, "eval_recall_sum") == [3]),
    "eval_steps": (EVALUATING, lambda t: steps_of(t, "eval_recall_sum") == [1, 2]),
    "eval_delay": ({**EVALUATING, "eval_delay": 2}, lambda t: steps_of(t, "eval_recall_sum") == [2]),
    "eval_on_start": ({"eval_on_start": True}, lambda t: steps_of(t, "eval_recall_sum") == [0]),
    "save_strategy": (
        {"save_strategy": "best", **EVALUATING},
        lambda t: f"checkpoint-{t.state.best_global_step}" in checkpoints(t) and t.state.best_global_step > 0,
    ),
    "save_steps": (SAVING, lambda t: checkpoints(t) == ["checkpoint-1", "checkpoint-2"]),
    "save_total_limit": ({**SAVING, "save_total_limit": 1}, lambda t: checkpoints(t) == ["checkpoint-2"]),
    "save_only_model": (
        {**SAVING, "save_only_model": True},
        lambda t: not list(Path(t.args.output_dir).glob("checkpoint-*/momentum_state*")) and len(checkpoints(t)) == 2,
    ),
    "full_determinism": ({"full_determinism": True}, lambda t: torch.are_deterministic_algorithms_enabled()),
    "seed": ({"seed": 7}, lambda t: first(t, "loss") != first(without(t), "loss") and t.args.data_seed == 7),
    "data_seed": ({"data_seed": 7}, lambda t: first(t, "loss") != first(without(t), "loss")),
    "use_cpu": ({"use_cpu": True}, lambda t: t.args.device.type == "cpu"),
    "dataloader_drop_last": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 16, "max_steps": -1, "num_train_epochs": 1},
        lambda t: t.state.global_step == 1,
    ),
    "train_sampling_strategy": (
        {"train_sampling_strategy": "sequential", "max_steps": 1},
        lambda t: t.queue.pair_ids[:8].tolist() == list(range(8)),
    ),
    "skip_memory_metrics": (
        {"skip_memory_metrics": False},
        lambda t: first(t, "train_mem_cpu_alloc_delta") is not None,
    ),
    "load_best_model_at_end": (
        {**SAVING, **EVALUATING, "load_best_model_at_end": True, "learning_rate": 0.1},
        lambda t: t.state.best_metric == t.evaluate()["eval_recall_sum"],
    ),
}


def without(trainer):
    """The same run without the option in question."""
    plain = trainer.make(max_steps=2)
    plain.train()
    return plain


def moved(trainer) -> float:
    start = trainer.make().model.state_dict()
    return max((tensor - start[name]).abs().max().item() for name, tensor in trainer.model.state_dict().items())


def num_tokens(trainer) -> int:
    """Of the captions of the first two batches, as the run drew them."""
    return sum(int((batch["attention_mask"]).sum()) for batch in trainer.batches)


@pytest.fixture
def train(make_trainer, monkeypatch):
    """A function that trains for two steps."""

    def run(**arguments):
        trainer = make_trainer(eval_dataset=ScenesDataset("validation", 9, 32), **{"max_steps": 2, **arguments})
        trainer.make, trainer.batches = make_trainer, []
        step = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest: (
            trainer.batches.append(inputs) or step(model, inputs, *rest)
        )
        trainer.train()
        return trainer

    yield run
    torch.use_deterministic_algorithms(False)


def source_that_reads() -> str:
    """What looks at the arguments while `COTSTrainer` trains: methods that it replaces whole are not among it."""
    methods = [method for name, method in inspect.getmembers(Trainer, inspect.isfunction) if is_used(name)]
    parts = [*methods, TrainingArguments, integration_utils, transformers.trainer_callback]
    if find_spec("transformers.trainer_optimizer"):  # not in all of 5.x
        parts.append(import_module("transformers.trainer_optimizer"))
    ours = Path(inspect.getfile(COTSTrainer)).parent
    parts_of_ours = [(ours / name).read_text() for name in ("trainer.py", "stream_loading.py", "setup.py")]
    return "\n".join([*map(inspect.getsource, parts), *parts_of_ours])


def is_used(name: str) -> bool:
    replacement = vars(COTSTrainer).get(name)
    return replacement is None or f"super().{name}(" in inspect.getsource(replacement)


def test_every_field_is_in_one_row():
    rows = list(TABLE.values())
    assert list(TABLE) == [*PASSED_ON, REFUSED_ROW, SCRIPTS_ROW]
    assert len(set().union(*rows)) == sum(map(len, rows))
    assert TABLE[REFUSED_ROW] == set(REFUSED)


@pytest.mark.parametrize("name", FIELDS)
def test_the_table_knows_the_field(name):
    (row,) = [title for title, names in TABLE.items() if name in names]
    if row == REFUSED_ROW:
        default = {field.name: field.default for field in dataclasses.fields(COTSTrainingArguments)}[name]
        value = not default if isinstance(default, bool) else 0.5 if isinstance(default, float) else "on"
        with pytest.raises(ValueError, match=f"^{name}=.* cannot be used: "):
            COTSTrainingArguments("run", use_cpu=True, **{name: value})
    elif row in PASSED_ON:
        assert re.search(rf"(args\.|self\.|\"){name}\b", source_that_reads()), f"nothing reads {name}"


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_what_is_passed_on_has_its_effect(train, name):
    arguments, seen = EFFECTS[name]
    if missing := set(arguments) - {field.name for field in dataclasses.fields(COTSTrainingArguments)}:
        pytest.skip(f"this release of transformers has no {missing}")
    assert name in PASSED
    assert seen(train(**arguments))


def test_arguments_can_be_copied():
    HfArgumentParser(COTSTrainingArguments)  # it changes the types of optional fields, for all who look at them later
    args = COTSTrainingArguments("run", use_cpu=True, load_best_model_at_end=True, **SAVING, **EVALUATING)
    assert dataclasses.replace(args, seed=3).metric_for_best_model == "eval_recall_sum"


# ------------------------------------------------------------------------------------------- the best model


@pytest.mark.parametrize("measure", MEASURES)
def test_ranks_are_better_when_lower_and_the_rest_when_higher(measure):
    args = COTSTrainingArguments("run", use_cpu=True, metric_for_best_model=measure)
    assert args.greater_is_better == (not measure.endswith("_rank"))
    with pytest.raises(ValueError, match="leave greater_is_better=.* out"):
        COTSTrainingArguments(
            "run", use_cpu=True, metric_for_best_model=measure, greater_is_better=measure.endswith("_rank")
        )


def test_the_measures_are_those_of_the_evaluation(make_trainer):
    metrics = make_trainer(eval_dataset=ScenesDataset("validation", 9, 32)).evaluate()
    assert {name.removeprefix("eval_") for name in metrics} == {*MEASURES, "epoch"}


@pytest.mark.parametrize("measure", ["eval_recall_sum", "i2t_median_rank", "eval_i2t_mean_rank"])
def test_the_checkpoint_with_the_best_measure_is_loaded(train, measure):
    trainer = train(
        **SAVING,
        **EVALUATING,
        load_best_model_at_end=True,
        metric_for_best_model=measure,
        learning_rate=0.05,
        max_steps=3,
    )
    name = f"eval_{measure.removeprefix('eval_')}"
    seen = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
    best = (min if measure.endswith("rank") else max)(seen.values())
    assert len(set(seen.values())) > 1, "the example must have a best step"
    assert seen[int(trainer.state.best_model_checkpoint.rpartition("-")[2])] == best
    assert trainer.evaluate()[name] == best


@pytest.mark.parametrize(("measure", "mode"), [(None, "max"), ("i2t_median_rank", "min")])
def test_a_schedule_by_the_measure_follows_it_the_right_way(train, measure, mode):
    trainer = train(**EVALUATING, lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model=measure)
    assert trainer.lr_scheduler.mode == mode
    with pytest.raises(ValueError, match="backwards"):
        COTSTrainingArguments(
            "run",
            use_cpu=True,
            lr_hold_epochs=0,
            **EVALUATING,
            lr_scheduler_type="reduce_lr_on_plateau",
            metric_for_best_model=measure,
            lr_scheduler_kwargs={"mode": "min" if mode == "max" else "max"},
        )


def test_a_measure_that_no_evaluation_gives_is_refused(make_trainer):
    scenes = ScenesDataset("validation", 9, 32)
    for measure in ("loss", "eval_loss", "recall", "photos_recall_sum"):
        with pytest.raises(ValueError, match=f"metric_for_best_model={measure} is not measured: take one of i2t_rec"):
            make_trainer(eval_dataset=scenes, metric_for_best_model=measure)
    args = COTSTrainingArguments("run", use_cpu=True, metric_for_best_model="eval_photos_t2i_mean_rank")
    check_measure(args, {"photos": scenes})
    with pytest.raises(ValueError, match="take one of drawings_i2t"):
        check_measure(args, {"drawings": scenes})


# ------------------------------------------------------------------------------------------- refused values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "must be random or sequential"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be random or sequential"),
        ({"max_steps": 0}, "leave no step to train"),
        ({"num_train_epochs": 0}, "leave no step to train"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": [1, "a"]}, "learning_rate must be a finite number, got "),
        ({"warmup_steps": float("inf")}, "warmup_steps must be a finite number"),
        ({"kl_weight": float("nan")}, "kl_weight must be a finite number"),
        ({"queue_size": 12.5}, "queue_size must be a whole number, got 12.5"),
        ({"queue_size": True}, "queue_size must be a whole number, got True"),
        ({"momentum": "0.9"}, "momentum must be a finite number, got '0.9'"),
        ({"neftune_noise_alpha": float("inf")}, "neftune_noise_alpha must be a finite number"),
        ({"optim_target_modules": ["query"]}, "belongs to GaLore and APOLLO"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches=True cannot be used"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cannot be used"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches=False cannot be used"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "set eval_strategy"),
        ({"save_strategy": "best"}, "set eval_strategy"),
        ({"lr_hold_epochs": 1, "lr_scheduler_kwargs": {"min_lr": 0.1}}, "set lr_hold_epochs to 0"),
    ],
    ids=str,
)
def test_values_that_no_run_could_use_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        COTSTrainingArguments("run", use_cpu=True, **arguments)


@pytest.mark.parametrize("name", [name for name in OptimizerNames if re.search("lomo|schedule_free|layerwise", name)])
def test_optimizers_that_do_not_keep_to_the_steps_are_refused(name):
    with pytest.raises(ValueError, match="does not keep to the steps"):
        COTSTrainingArguments("run", use_cpu=True, optim=name)


@pytest.mark.parametrize("name", REFUSED_PARTS)
def test_parts_that_the_trainer_has_its_own_of_are_refused(name):
    with pytest.raises(ValueError, match=f"takes no {name}"):
        check_parts(COTSTrainingArguments("run", use_cpu=True), {name: len})


def test_a_stream_is_not_read_in_sequence():
    args = COTSTrainingArguments("run", use_cpu=True, max_steps=1, train_sampling_strategy="sequential")
    stream = object.__new__(StreamingPairs)
    with pytest.raises(ValueError, match="does not apply to a stream"):
        check_parts(args, {"train_dataset": stream})


# ------------------------------------------------------------------------------------------- too little data


class NoItems(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("arguments", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 2}])
def test_data_that_make_no_batch_are_refused(make_trainer, arguments):
    trainer = make_trainer(per_device_train_batch_size=64, dataloader_drop_last=True, **arguments)
    with pytest.raises(ValueError, match="24 images make no batch of 64, and dataloader_drop_last"):
        trainer.train()


def test_no_data_are_refused(make_trainer):
    with pytest.raises(ValueError, match="the training data is empty"):
        make_trainer(train_dataset=Subset(ScenesDataset("train", 4, 32), [])).train()
    with pytest.raises(ValueError, match="the training data gave no batch"):
        make_trainer(train_dataset=NoItems(), max_steps=5, accelerator_config={"dispatch_batches": False}).train()


@pytest.mark.parametrize("max_steps", [2, 4])
def test_a_run_that_is_resumed_at_its_end_takes_no_step(make_trainer, max_steps):
    """Four steps are in the middle of the second epoch of three."""
    arguments = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(max_steps=4, **arguments)
    whole.train()
    resumed = make_trainer(max_steps=max_steps, **arguments)
    resumed.train("latest")
    assert resumed.state.global_step == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="has a GPU that computes bf16")
def test_bf16_without_such_a_gpu_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="bf16 needs a GPU.*--use_cpu true.*--bf16 false"):
        COTSTrainingArguments("run", bf16=True)
    assert COTSTrainingArguments("run", bf16=True, use_cpu=True).bf16
