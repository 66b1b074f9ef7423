"""`results.json`: the metrics of one retrieval run, with the facts that a comparison with other results needs."""

import json
import os

from .retrieval_metrics import check_protocol

ZERO_SHOT_PROTOCOLS = ("pretrained", "fine-tuned-elsewhere", "none")


def stated_zero_shot_protocol(stated: str | None, is_trained_here: bool) -> str:
    """
    How far the results of a run are zero-shot, one of `ZERO_SHOT_PROTOCOLS`.

    "pretrained" means that the model was never fine-tuned for retrieval, "fine-tuned-elsewhere" that it was fine-tuned
    on another data set, and "none" that it was trained on this data set.

    Args:
        stated: What the user says. A run that trains need not say it.
        is_trained_here: Whether the run trains on the data set that it measures on; the answer is then "none".

    Raises `ValueError` for a run that only measures and states none of the three, and for a run that trains and states
    another than "none".
    """
    names = ", ".join(ZERO_SHOT_PROTOCOLS)
    if is_trained_here:
        if stated not in (None, "none"):
            raise ValueError(f"zero_shot_protocol is {stated!r}, but this run trains on the data set: leave it out.")
        return "none"
    if stated not in ZERO_SHOT_PROTOCOLS:
        raise ValueError(f"Say how the measured model came about: zero_shot_protocol, one of {names}; got {stated!r}.")
    return stated


def check_test_set(dataset, protocol: str | None) -> None:
    """Raise `ValueError` for a data set with other numbers of images and captions than the protocol has."""
    if protocol is not None:
        check_protocol(protocol, len(dataset), sum(1 for _ in dataset.iter_captions()))


def write_results(path: str, metrics: dict[str, float], *, protocol: str | None, **facts) -> dict:
    """
    Write the metrics and what they were measured on. The protocol is named only if its whole test set could be read.

    Args:
        path: The JSON file; its folder is created.
        metrics: As `COTSTrainer.evaluate` returns them.
        protocol: One of `PROTOCOLS`, checked beforehand, or `None`.
        facts: Further entries of the file.

    Returns the content of the file.
    """
    measured = {name.removeprefix("eval_"): value for name, value in metrics.items() if name != "epoch"}
    skipped = int(measured.pop("skipped_images", 0))
    results = {**facts, "protocol": protocol if skipped == 0 else None, "num_skipped": skipped, "metrics": measured}
    if protocol is not None and skipped > 0:
        results["note"] = f"{skipped} of the test set could not be read, so this is not {protocol}."
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
        file.write("\n")
    return results
