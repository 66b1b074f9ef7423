"""`results.json`: the numbers of one retrieval run, with all that is needed to hold them against others'."""

import json
import os

from .retrieval_metrics import check_protocol

ZERO_SHOT_PROTOCOLS = ("pretrained", "fine-tuned-elsewhere", "none")


def stated_zero_shot_protocol(stated: str | None, is_trained_here: bool) -> str:
    """
    How far a number is zero-shot: "pretrained" (the model has seen no pair of this data set's kind of task),
    "fine-tuned-elsewhere" (on another retrieval data set) or "none" (fine-tuned on this data set, here or before).

    Raises `ValueError` where a model that is only measured comes without a statement, and for one that cannot be true.
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
    """Raise `ValueError` before any work where a data set does not have the counts of the protocol."""
    if protocol is not None:
        check_protocol(protocol, len(dataset), sum(1 for _ in dataset.iter_captions()))


def write_results(path: str, metrics: dict[str, float], *, protocol: str | None, **facts) -> dict:
    """
    Write what was measured and on what; a protocol is named only where its whole test set could be read.

    Args:
        path: Of the JSON file; its folder is made.
        metrics: As `COTSTrainer.evaluate` returns them.
        protocol: One of `PROTOCOLS`, checked beforehand, or `None`.
        facts: What else a reader has to know, by name.

    Returns what was written.
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
