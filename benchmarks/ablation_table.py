"""The tables of the results of `ablation.py`, or of `ablation_upper_layers.py`, between two marks of a Markdown file.

python benchmarks/ablation_table.py benchmarks/ablation.json docs/results.md
python benchmarks/ablation_table.py benchmarks/ablation_upper_layers.json docs/results.md --upper_layers
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import yaml
from ablation import FILTERS, MCL, PEER, RECIPE, Arm, read_arms
from ablation_upper_layers import read_upper_layer_arms
from side_by_side import write_between

from modeling_cots.scripts.error_boundary import run_script

BEGIN, END = "<!-- written by benchmarks/ablation_table.py -->", "<!-- end of what it writes -->"
BEGIN_UPPER = "<!-- written by benchmarks/ablation_table.py --upper_layers -->"
END_UPPER = "<!-- end of what it writes of the upper layers -->"
DIRECTIONS = "t2i", "i2t"
SHAPE = "per_device_train_batch_size", "max_steps"


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, and the sample standard deviation where there is more than one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _shape(overrides: dict, recipe: dict) -> tuple[int, int]:
    """Batch size and steps of a run."""
    batch_size, steps = ({**recipe, **overrides}[name] for name in SHAPE)
    return batch_size, steps


def _others(overrides: dict) -> str:
    """What a run sets otherwise than the recipe, but for what has a column of its own."""
    return ", ".join(f"`{name}` {value:g}" for name, value in overrides.items() if name not in SHAPE)


def _groups(runs: list[dict], recipe: dict) -> dict[tuple, list[dict]]:
    """Metrics of all seeds by batch size, steps, noise, arm and what else is set otherwise than the recipe."""
    groups = defaultdict(list)
    for run in runs:
        shape, noise = _shape(run["overrides"], recipe), run.get("noise", 0.0)
        groups[*shape, noise, run["arm"], _others(run["overrides"])].append(run["metrics"])
    return groups


def results_table(runs: list[dict], recipe: dict, flop_per_step: dict[str, dict[str, float]]) -> list[str]:
    """Arms without noise: one row for each, batch size and number of steps, over all seeds."""
    titles = {name: arm.title for name, arm in read_arms().items()}
    rows = [
        "| arm | batch | steps | compute | seeds | t2i R@1 / R@10 | i2t R@1 / R@10 | sum of recalls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = {key: metrics for key, metrics in _groups(runs, recipe).items() if key[2] == 0 and key[3] not in FILTERS}
    for (batch, steps, _, arm, others), metrics in sorted(groups.items(), key=_place):
        flop, most = flop_per_step[str(batch)], max(key[1] for key in groups if key[0] == batch)
        compute = f"{steps * flop[arm] / (most * flop[PEER]):.2f}" if arm in flop else ""
        title = f"{titles[arm]}, {others}" if others else titles[arm]
        cells = [title, str(batch), f"{steps:,}", compute, str(len(metrics)), *_recalls(metrics)]
        rows.append(f"| {' | '.join(cells)} | {spread([found['recall_sum'] for found in metrics])} |")
    return rows


def _recalls(metrics: list[dict]) -> list[str]:
    """R@1 and R@10 of each direction."""
    return [
        " / ".join(spread([found[f"{side}_recall_at_{k}"] for found in metrics]) for k in (1, 10))
        for side in DIRECTIONS
    ]


def _place(group: tuple) -> tuple:
    """The place of a row: larger batches first, then the peer, MCL and the others, then more steps first."""
    batch, steps, _, arm, _ = group[0]
    return -batch, [PEER, MCL, arm].index(arm), arm, -steps


def filter_table(runs: list[dict], recipe: dict) -> list[str]:
    """Filters at each share of noise: sum of recalls, and what the rule drops of all training pairs at the end."""
    titles = {name: arm.title for name, arm in read_arms().items()}
    rows = [
        "| arm | captions moved | sum of recalls | dropped of moved / of others, % | area under the ROC curve |",
        "|---|---|---|---|---|",
    ]
    whole = _shape({}, recipe)
    groups = {key[2:4]: metrics for key, metrics in _groups(runs, recipe).items() if key[:2] == whole}
    for noise in sorted({noise for noise, _ in groups}):
        for arm in (PEER, MCL, *FILTERS):
            metrics = groups.get((noise, arm), [])
            if not metrics:
                continue
            cells = [spread([found["recall_sum"] for found in metrics])]
            cells.append(" / ".join(_cell(metrics, f"dropped_{kind}", 1) for kind in ("noise", "clean")))
            cells.append(_cell(metrics, "detection_auc", 3))
            rows.append(f"| {titles[arm]} | {100 * noise:.0f} % | {' | '.join(cells)} |")
    return rows


def _cell(metrics: list[dict], name: str, digits: int) -> str:
    values = [found[name] for found in metrics if name in found]
    return spread(values, digits) if values else "–"


def upper_layers_table(runs: list[dict]) -> list[str]:
    """The arms of the second stage over all seeds, and what the first stage measures before them."""
    rows = ["| arm | seeds | t2i R@1 / R@10 | i2t R@1 / R@10 | sum of recalls | before |", "|---|---|---|---|---|---|"]
    for name, arm in read_upper_layer_arms().items():
        metrics = [run["metrics"] for run in runs if run["arm"] == name]
        if metrics:
            sums = [spread([found[key] for found in metrics]) for key in ("recall_sum", "before")]
            rows.append(f"| {' | '.join([arm.title, str(len(metrics)), *_recalls(metrics), *sums])} |")
    return rows


def trials_table(trials: list[dict], arms: dict[str, Arm]) -> list[str]:
    """Every trial, the best of each arm first."""
    titles = {name: arm.title for name, arm in arms.items()}
    rows = ["| arm | otherwise than the recipe | sum of recalls |", "|---|---|---|"]
    for trial in sorted(trials, key=lambda trial: (trial["arm"], -trial["metrics"]["recall_sum"])):
        overrides = ", ".join(f"`{name}` {value:g}" for name, value in trial["overrides"].items()) or "nothing"
        rows.append(f"| {titles[trial['arm']]} | {overrides} | {trial['metrics']['recall_sum']:.1f} |")
    return rows


def write_tables(json_path: Path, markdown: Path) -> None:
    """Tables of what there is of results in `json_path`, between the marks of `markdown`."""
    results = json.loads(json_path.read_text(encoding="utf-8"))
    lines = []
    if results["runs"]:
        runs, recipe = results["runs"], yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        lines += ["", *results_table(runs, recipe, results["flop_per_step"]), "", *filter_table(runs, recipe)]
    if results["trials"]:
        lines += ["", *trials_table(results["trials"], read_arms())]
    write_between(markdown, BEGIN, END, [*lines, ""])


def write_upper_layers(json_path: Path, markdown: Path) -> None:
    """Likewise of the results of `ablation_upper_layers.py`."""
    results = json.loads(json_path.read_text(encoding="utf-8"))
    lines = ["", *upper_layers_table(results["runs"])]
    if results["trials"]:
        lines += ["", *trials_table(results["trials"], read_upper_layer_arms())]
    write_between(markdown, BEGIN_UPPER, END_UPPER, [*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("markdown", type=Path)
    parser.add_argument("--upper_layers", action="store_true", help="the JSON is that of ablation_upper_layers.py")
    args = parser.parse_args()
    (write_upper_layers if args.upper_layers else write_tables)(args.json, args.markdown)


if __name__ == "__main__":
    run_script(main)
