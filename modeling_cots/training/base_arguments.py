"""Which arguments of `transformers.TrainingArguments` COTS refuses, and which measure is the best model chosen by.

Every other argument is passed on to transformers: docs/training.md has the whole table, and
tests/training/test_base_arguments.py holds it, one test for each field of the base class.
"""

import dataclasses
import math
import numbers

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from ..evaluation.retrieval_metrics import RECALL_AT

# The measures of `retrieval_metrics`; ranks are better when lower, everything else when higher.
MEASURES = (
    *(f"{side}_recall_at_{k}" for side in ("i2t", "t2i") for k in RECALL_AT),
    *(f"{side}_{statistic}_rank" for side in ("i2t", "t2i") for statistic in ("median", "mean")),
    "recall_sum",
)

_EVALUATION = "evaluation embeds the whole data set and measures retrieval on it"
_LENGTHS = "captions are not grouped by length: docs/training.md says why"
_FSDP = (
    "it would leave out the momentum copy, and on CPUs do nothing; set shard_model to split both among the processes"
)
_ELSEWHERE = "it knows nothing of the momentum copy; set shard_model to split model and copy among the processes"
_LIGER = "it has no kernels for COTS"

# What would be ignored, or would break the momentum copy and the queue: the name, and why it must keep its default.
REFUSED = {
    "label_smoothing_factor": "the losses of COTS have no labels to smooth",
    "label_names": "the batches of COTS have no labels",
    "average_tokens_across_devices": "the losses are means over the pairs of all processes in any case",
    "use_cache": "encoders generate nothing that a cache would serve",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "auto_find_batch_size": "its second attempt would start with the queue and the momentum copy of the first one; "
    "lower per_device_train_batch_size instead",
    "enable_jit_checkpoint": "it saves in the middle of a step, from which a run cannot go on exactly; lower "
    "save_steps instead",
    "bf16_full_eval": "evaluation runs in the precision of the training: set bf16",
    "fp16_full_eval": "evaluation runs in the precision of the training: set fp16",
    "eval_accumulation_steps": _EVALUATION,
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "length_column_name": _LENGTHS,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "deepspeed": _ELSEWHERE,
    "parallelism_config": _ELSEWHERE,
    "remove_unused_columns": "COTSTrainer's batches rely on it",
    "ddp_broadcast_buffers": "the momentum state relies on it",
    "ddp_static_graph": "a batch without a readable image leaves parameters without a gradient",
    "ddp_find_unused_parameters": "the parameters of unused losses are frozen instead",
}
# The lowest values of what transformers takes as it comes; the arguments of COTS are in arguments.py.
LOWEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_prefetch_factor": 1,
    "torch_empty_cache_steps": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
    "max_steps": -1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "neftune_noise_alpha": 0,
    "dataloader_num_workers": 0,
    "eval_delay": 0,
    "seed": 0,
    "data_seed": 0,
}
ABOVE_ZERO = ("logging_steps", "save_steps", "eval_steps")
BELOW_ONE = ("adam_beta1", "adam_beta2")
HIGHEST_SEED = 2**32 - 1
# These optimizers move weights before the step is checked, or evaluate with other weights than those that they move.
REFUSED_OPTIMIZERS = ("lomo", "adalomo", "schedule_free_", "layerwise")
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def refuse_unused(args: TrainingArguments) -> None:
    """Raise `ValueError` for an argument that training would ignore, before the base class has looked at any."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, reason in REFUSED.items():
        value = getattr(args, name, None)
        if value not in (None, "", [], {}) and value != defaults[name]:
            raise ValueError(f"{name}={value!r} cannot be used: {reason}.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy must be random or sequential, got {args.train_sampling_strategy!r}: {_LENGTHS}."
        )


def check_precision(args: TrainingArguments) -> None:
    """Raise `ValueError` for bf16 without a GPU that computes it, unless the CPU is asked for."""
    if args.bf16 and not (args.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        raise ValueError(
            "bf16 needs a GPU that computes it, and none is found: add --use_cpu true to train on the CPU, or --bf16 "
            "false."
        )


def check_numbers(args: TrainingArguments) -> None:
    """Raise `ValueError` where a field that is a number holds something else, is infinite, NaN or out of range."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value is None and field.default is None:
            continue
        if field.type is int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise ValueError(f"{field.name} must be a whole number, got {value!r}.")
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if (field.type is float and not is_number) or (is_number and not math.isfinite(value)):
            raise ValueError(f"{field.name} must be a finite number, got {value!r}.")
    _check_ranges(args)


def _check_ranges(args: TrainingArguments) -> None:
    values = {name: getattr(args, name) for name in (*LOWEST, *ABOVE_ZERO) if getattr(args, name) is not None}
    for name, value in values.items():
        if name in LOWEST and not value >= LOWEST[name]:
            wanted = "not be negative" if LOWEST[name] == 0 else f"be at least {LOWEST[name]}"
            raise ValueError(f"{name} must {wanted}, got {value}.")
        if name in ABOVE_ZERO and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}.")
        if name in BELOW_ONE and not value < 1:
            raise ValueError(f"{name} must be below 1, got {value}.")
        if name.endswith("seed") and value > HIGHEST_SEED:
            raise ValueError(f"{name} must be at most {HIGHEST_SEED}, got {value}.")


def choose_measure(args: TrainingArguments) -> None:
    """
    Set the measure of the best model where one is needed and none is given, and whether more of it is better.

    Raises `ValueError` where `greater_is_better` would choose the worst model.
    """
    needs_one = args.load_best_model_at_end or args.save_strategy == "best"
    if args.metric_for_best_model is None and (needs_one or args.lr_scheduler_type in METRIC_SCHEDULES):
        args.metric_for_best_model = "eval_recall_sum"
    if args.metric_for_best_model is None:
        return
    is_rank = args.metric_for_best_model.endswith("_rank")
    if args.greater_is_better is None:
        args.greater_is_better = not is_rank
    if args.greater_is_better == is_rank:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model} is better when {'lower' if is_rank else 'higher'}: "
            f"leave greater_is_better={args.greater_is_better} out."
        )


def check_base_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for values and combinations that the base class takes and no run of COTS could use."""
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps={args.max_steps} and num_train_epochs={args.num_train_epochs:g} leave no step to train: give "
            "one of them a positive number (max_steps=-1 leaves it to the epochs)."
        )
    for kind in REFUSED_OPTIMIZERS:
        if kind in args.optim:
            raise ValueError(
                f"optim={args.optim.value} does not keep to the steps that COTSTrainer checks and the momentum copy "
                "follows: use another optimizer, such as adamw_torch_fused."
            )
    if args.optim_target_modules is not None and not args.optim.startswith(("galore_", "apollo_")):
        raise ValueError(f"optim_target_modules belongs to GaLore and APOLLO, not to optim={args.optim.value}.")
    _check_batches_of_processes(args.accelerator_config)
    _check_choice_of_best(args)


def _check_batches_of_processes(config) -> None:
    for name, value in {"split_batches": False, "dispatch_batches": None, "even_batches": True}.items():
        if getattr(config, name) not in (value, bool(value)):
            raise ValueError(
                f"accelerator_config with {name}={getattr(config, name)} cannot be used: every process makes its own "
                "batches, all of them equally long."
            )


def _check_choice_of_best(args: TrainingArguments) -> None:
    if (args.load_best_model_at_end or args.save_strategy == "best") and args.eval_strategy == "no":
        raise ValueError("The best model is chosen by evaluations: set eval_strategy to steps or epoch.")
    if args.lr_scheduler_type not in METRIC_SCHEDULES:
        return
    mode = "max" if args.greater_is_better else "min"
    options = {"mode": mode, **(args.lr_scheduler_kwargs or {})}
    if options["mode"] != mode:
        raise ValueError(
            f"lr_scheduler_kwargs with mode={options['mode']} would follow {args.metric_for_best_model} backwards: "
            "leave mode out."
        )
    args.lr_scheduler_kwargs = options


def check_measure(args: TrainingArguments, eval_dataset) -> None:
    """Raise `ValueError` for a `metric_for_best_model` that evaluating `eval_dataset` does not give."""
    if args.metric_for_best_model is None or eval_dataset is None:
        return
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [f"{prefix}{measure}" for prefix in prefixes for measure in MEASURES]
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model} is not measured: take one of {', '.join(known)}."
        )
