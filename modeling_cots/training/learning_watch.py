"""Tells a run that learns nothing: losses that stay at chance, flat distributions, no gradient, recall at chance.

All are pure functions of what the run has logged or measured. What is done about it is the caller's business.
"""

import math

from ..evaluation.retrieval_metrics import RECALL_AT, chance_recall

# A line of logs is at chance above this share of the losses of uniform distributions, and flat below this KL loss.
CHANCE_SHARE, FLAT_KL = 0.98, 1e-3
# Shares of the run: from when on lines count, and how long they must be at chance.
FLAT_FROM, FLAT_FOR = 0.2, 0.1
CHANCE_FROM, CHANCE_FOR = 0.35, 0.25
NO_GRADIENT = 1e-6
STALE_SHARE = 0.8  # losses below this share of chance say that the training pairs are told apart
MIN_IMAGES = 20
NUM_DEVIATIONS = 3


def loss_warnings(lines: list[dict[str, float]], max_steps: int) -> dict[str, str]:
    """
    What the lines of training logs say against a run, by kind; empty for a run that learns.

    Args:
        lines: In order, each with `step`, `loss_i2t`, `loss_t2i`, `loss_kl`, `chance_loss` and, if known, `grad_norm`.
        max_steps: Of the whole run.
    """
    if len(lines) < 2:
        return {}
    last, warnings = lines[-1], {}
    step, contrastive = last["step"], _contrastive(last)
    chance = last["chance_loss"]
    found = f"Step {step}: the two contrastive losses sum to {contrastive:.2f}, and chance is {chance:.2f}."
    flat, at_chance = _last(lines, FLAT_FOR * max_steps), _last(lines, CHANCE_FOR * max_steps)
    if step >= FLAT_FROM * max_steps and all(_is_at_chance(line) and line["loss_kl"] < FLAT_KL for line in flat):
        warnings["flat"] = (
            f"{found} loss_kl is {last['loss_kl']:.1e}: all pairs look alike to the model, which has collapsed and "
            "will not come back. Start again with a smaller kl_weight (0 from scratch) or a larger kl_warmup_steps, a "
            "longer warm-up of the learning rate, a smaller learning rate, or pre-trained encoders."
        )
    elif step >= CHANCE_FROM * max_steps and all(_is_at_chance(line) for line in at_chance):
        warnings["chance"] = (
            f"{found} The model has learned nothing for a quarter of the run. Look whether captions belong to their "
            "images; try a learning rate ten times larger or smaller, and from scratch a larger initializer_range."
        )
    if all(line.get("grad_norm", math.inf) < NO_GRADIENT for line in lines[-2:]):
        warnings["gradient"] = (
            f"Step {step}: the norm of the gradient is {last['grad_norm']:.1e}, so nothing is learned any more. Look "
            "whether all parameters are frozen, and whether features have been scaled to huge values."
        )
    return warnings


def _last(lines: list[dict], num_steps: float) -> list[dict]:
    """The lines of the last so many steps, and two at least."""
    recent = [line for line in lines if line["step"] > lines[-1]["step"] - num_steps]
    return recent if len(recent) >= 2 else lines[-2:]


def _contrastive(line: dict) -> float:
    return line["loss_i2t"] + line["loss_t2i"]


def _is_at_chance(line: dict) -> bool:
    return _contrastive(line) >= CHANCE_SHARE * line["chance_loss"]


def is_recall_chance(metrics: dict[str, float], num_images: int, num_captions: int) -> bool | None:
    """
    Whether recall in both directions is within the noise of chance: three standard deviations of a random order.

    Captions of one image are not independent, so the deviation is that of as many draws as there are images.

    Args:
        metrics: Of `retrieval_metrics`, without prefix.
        num_images, num_captions: Of the data set, or of one fold.

    Returns `None` where that cannot be told: with fewer than 20 images.
    """
    if num_images < MIN_IMAGES:
        return None
    chance_of = {
        "t2i": lambda k: chance_recall(k, num_images),
        "i2t": lambda k: chance_recall(k, num_captions, max(1, num_captions // num_images)),
    }
    for direction, chance in chance_of.items():
        k = max(k for k in RECALL_AT if k == min(RECALL_AT) or chance(k) <= 50)
        expected = chance(k) / 100
        deviation = math.sqrt(expected * (1 - expected) / num_images)
        if metrics[f"{direction}_recall_at_{k}"] > 100 * (expected + NUM_DEVIATIONS * deviation):
            return False
    return True


def recall_warning(
    metrics: dict[str, float], num_images: int, line: dict[str, float] | None, *, is_early: bool = False
) -> str:
    """
    The sentences for recall at chance, with what to do.

    Args:
        metrics: Of `retrieval_metrics`, without prefix.
        num_images: Of the evaluation.
        line: The last line of training logs, if there is one.
        is_early: Whether this is the measurement of the first tenth of a run.
    """
    recall = f"{metrics['t2i_recall_at_10']:.1f} and {metrics['i2t_recall_at_10']:.1f} %"
    start = f"Retrieval among {num_images:,} held-out images is at chance (R@10 {recall})"
    if line is not None and _contrastive(line) < STALE_SHARE * line["chance_loss"]:
        freshness = line.get("queue_freshness")
        cosine = "" if freshness is None else f", and queued keys have a cosine of {freshness:.2f} to fresh ones"
        return (
            f"{start}, while the contrastive losses, {_contrastive(line):.2f}, are far below chance, "
            f"{line['chance_loss']:.2f}{cosine}. The model tells training pairs apart by something that held-out "
            "pairs do not share: keys of earlier steps (set batch_candidates, a smaller max_key_drift, queue_size), "
            "a text or an image that gives the pair away, or too few pairs for so many steps."
        )
    if is_early:
        return f"{start} after a tenth of the run. If that stays, stop: {_WHAT_TO_DO}"
    return f"{start}: this model has learned nothing that can be found again. {_WHAT_TO_DO}"


_WHAT_TO_DO = (
    "Look whether captions belong to their images and whether the held-out pairs are of the same kind; train for more "
    "steps, or with a learning rate ten times larger or smaller."
)
