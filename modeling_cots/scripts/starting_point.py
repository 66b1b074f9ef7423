"""What a training starts from, and the defaults that fit: pre-trained encoders, or fresh weights.

The paper starts from pre-trained encoders, and so do the defaults of `COTSTrainingArguments`. From scratch weights
move fast and mean nothing at first. What these defaults are worth: docs/results.md, "Any data".
"""

import json
import math
from pathlib import Path

from ..configuration_cots import COTSConfig

FROM_SCRATCH = {
    "warmup_steps": 0.1,  # of all steps
    "lr_hold_epochs": 0.0,  # linear decay right after the warm-up
    "queue_size": 1_024,  # what is older than that is stale for most of the run
    "kl_weight": 0.0,  # flat distributions are its cheapest solution; it is logged all the same
    "cmvm_weight": 0.0,  # the masked passes nearly double the work and bring no recall
    "cmlm_weight": 0.0,
    "adaptive_filter": False,  # the scores of encoders that know nothing yet are no measure of noise
    "min_crop_scale": 1.0,  # in a short run crops cost more than they bring, and captions may say where things are
}


PAPER_WIDTH = 768
RATE_TIMES_WIDTH = 0.06  # wide encoders are trained at a smaller learning rate


def is_from_scratch(options) -> bool:
    """Whether neither encoder is pre-trained. `options` has `model`, `text_model`, `vision_model`, `None` or not."""
    return options.model is None and options.text_model is None and options.vision_model is None


def starting_defaults(options) -> dict[str, float | bool]:
    """The defaults of training options that fit what training starts from; `options` has `model_config` as well."""
    if not is_from_scratch(options):
        return {}
    given = read_fields(options.model_config)
    widths = [_part(given, name).get("hidden_size", PAPER_WIDTH) for name in ("text_config", "vision_config")]
    if not all(isinstance(width, int) and width > 0 for width in widths):
        raise ValueError(f"{options.model_config}: hidden_size must be a whole number above 0, got {widths}.")
    defaults = {"learning_rate": RATE_TIMES_WIDTH / max(widths), **FROM_SCRATCH}
    if getattr(options, "filter_log", None) is not None:  # who wants the filter's log wants the filter
        del defaults["adaptive_filter"]
    return defaults


def _part(given: dict, name: str) -> dict:
    """The fields of an encoder; those of no mapping are refused by the configuration itself."""
    part = given.get(name)
    return part if isinstance(part, dict) else {}


def read_fields(path: str | None) -> dict:
    """The fields in a file of a configuration; none without a file. Raises `ValueError` where they cannot be read."""
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"model_config={path} cannot be read: {error.strerror}. Give the name of a JSON file of COTSConfig fields."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file of COTSConfig fields: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no JSON file of COTSConfig fields: it has no braces around them.")
    return content


def name_start(options) -> str:
    """What training starts from, in a few words, as cards tell it."""
    adapters = "" if options.lora_rank is None else f", with LoRA of rank {options.lora_rank}"
    return _name_weights(options) + adapters


def _name_weights(options) -> str:
    if options.model is not None:
        return f"the checkpoint {options.model}"
    if is_from_scratch(options):
        return "fresh weights"
    given = {"text": options.text_model, "vision": options.vision_model}
    return " and ".join(
        f"a fresh {kind} encoder" if name is None else f"the {kind} encoder {name}" for kind, name in given.items()
    )


def describe_start(options, chosen: dict) -> str:
    """
    Three lines for the user: what training starts from, which defaults follow, and what overrides them.

    Args:
        options: See `is_from_scratch`.
        chosen: The defaults of `starting_defaults` that the user has not set.
    """
    lines = [f"Training starts from {name_start(options)}."]
    if is_from_scratch(options):
        settings = ", ".join(f"{name} {_format(value)}" for name, value in chosen.items())
        lines.append(f"Defaults for that: {settings or 'all are set'}; initializer_range 1 / sqrt(hidden_size).")
    elif options.model is None and None in (options.text_model, options.vision_model):
        lines.append("Defaults: the paper's, for pre-trained encoders; with a fresh one try a learning_rate of 3e-4.")
    else:
        lines.append("Defaults: the paper's.")
    return "\n".join([*lines, "What you set, or a configuration file sets, stays. docs/training.md says why."])


def _format(value: float | bool) -> str:
    return str(value).lower() if isinstance(value, bool | int) else f"{value:.3g}"


def set_initializer_range(config: COTSConfig, given: dict) -> None:
    """
    Give the fresh encoders of `config` weights of a standard deviation of 1 / sqrt(hidden_size), in place.

    The usual 0.02 belongs to 768 channels and long training; small encoders begin so flat with it that they lose the
    first part of a short run.

    Args:
        config: Of a model that is trained from scratch.
        given: What a configuration file sets; an `initializer_range` there stays.
    """
    for name in ("text_config", "vision_config"):
        if "initializer_range" not in _part(given, name):
            encoder = getattr(config, name)
            encoder.initializer_range = 1 / math.sqrt(encoder.hidden_size)
