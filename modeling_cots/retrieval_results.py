"""`results.json`: the numbers of one retrieval run, with all that is needed to hold them against others'."""

import json
import os

from .model_card import add_results, eval_results, load_card
from .retrieval_metrics import RECALL_AT, check_protocol

ZERO_SHOT_PROTOCOLS = ("pretrained", "fine-tuned-elsewhere", "none")
# The last section of a card to which measurements were added. Unlike its rows, its head begins with a bar alone.
MEASURED_LATER = "## Measured later\n\nRecall in percent.\n\n"
TABLE_HEAD = "|on | protocol | zero-shot | direction | R@1 | R@5 | R@10 | median rank |\n" + 8 * "|---" + "|"


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


def write_card_of_measured(output_dir: str, model: str, results: dict, unit: str = "image") -> None:
    """Write the card of a checkpoint that was only measured, with the numbers added; the checkpoint's own stays.

    Args:
        output_dir: Its `README.md` is written.
        model: The checkpoint, a folder or a Hub id.
        results: What `write_results` returned, with `measured_on` and `zero_shot_protocol` among its facts.
        unit: What the captions tell of, an "image" or a "video".
    """
    card = load_card(model)
    measured = eval_results(
        {name.replace("v2t", "i2t").replace("t2v", "t2i"): value for name, value in results["metrics"].items()},
        results["measured_on"],
        unit=unit,
        protocol=results["protocol"],
        zero_shot_protocol=results["zero_shot_protocol"],
    )
    add_results(card, measured, model_name=os.path.basename(os.path.normpath(model)))
    card.text = _with_rows(card.text, results, unit)
    card.save(os.path.join(output_dir, "README.md"))


def _with_rows(text: str, results: dict, unit: str) -> str:
    """The text of a card with one row a direction in its last table; rows of the same test set are replaced."""
    what = f"| {results['measured_on']} | {results['protocol'] or ''} | {results['zero_shot_protocol']} |"
    text, _, table = text.partition(MEASURED_LATER)
    rows = [row for row in table.splitlines() if row.startswith("| ") and not row.startswith(what)]
    image, metrics = unit[0] if unit == "video" else "i", results["metrics"]
    for direction, side in ((f"{unit} to text", f"{image}2t"), (f"text to {unit}", f"t2{image}")):
        numbers = [f"{metrics[f'{side}_recall_at_{k}']:.1f}" for k in RECALL_AT]
        rows.append(" ".join([what, direction, "|", " | ".join(numbers), f"| {metrics[f'{side}_median_rank']:g} |"]))
    return "\n".join([text.rstrip() + "\n", MEASURED_LATER + TABLE_HEAD, *rows]) + "\n"


__all__ = [
    "ZERO_SHOT_PROTOCOLS",
    "check_test_set",
    "stated_zero_shot_protocol",
    "write_card_of_measured",
    "write_results",
]
