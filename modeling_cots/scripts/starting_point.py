"""What a training starts from, and the defaults that fit: pre-trained encoders, or fresh weights.

The paper starts from pre-trained encoders, and so do the defaults of `COTSTrainingArguments`. From scratch weights
move fast and mean nothing at first. What these defaults are worth: docs/results.md, "Any data".
"""

import math

from ..configuration_cots import COTSConfig

FROM_SCRATCH = {
    "learning_rate": 1e-3,  # a rate of fine-tuning would take days
    "warmup_steps": 0.05,  # of all steps
    "lr_hold_epochs": 0.0,  # linear decay right after the warm-up
    "queue_size": 1_024,  # what is older than that is stale for most of the run
    "kl_weight": 0.0,  # flat distributions are its cheapest solution; it is logged all the same
    "cmvm_weight": 0.0,  # the masked passes nearly double the work and bring no recall
    "cmlm_weight": 0.0,
    "adaptive_filter": False,  # the scores of encoders that know nothing yet are no measure of noise
    "min_crop_scale": 1.0,  # in a short run crops cost more than they bring, and captions may say where things are
}


def is_from_scratch(options) -> bool:
    """Whether neither encoder is pre-trained. `options` has `model`, `text_model`, `vision_model`, `None` or not."""
    return options.model is None and options.text_model is None and options.vision_model is None


def starting_defaults(options) -> dict[str, float | bool]:
    """The defaults of training options that fit what the training starts from."""
    return dict(FROM_SCRATCH) if is_from_scratch(options) else {}


def name_start(options) -> str:
    """What training starts from, in a few words, as cards tell it."""
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
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


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
        if "initializer_range" not in given.get(name, {}):
            encoder = getattr(config, name)
            encoder.initializer_range = 1 / math.sqrt(encoder.hidden_size)
