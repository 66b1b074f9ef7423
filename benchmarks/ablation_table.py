"""The tables of `ablation.py`'s results, written between two marks of a Markdown file.

python benchmarks/ablation_table.py benchmarks/ablation.json docs/results.md
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import yaml
from ablation import FILTERS, MCL, PEER, RECIPE, read_arms
from side_by_side import write_between

from modeling_cots.scripts.error_boundary import run_script

BEGIN, END = "<!-- written by benchmarks/ablation_table.py -->", "<!-- end of what it writes -->"
DIRECTIONS = "t2i", "i2t"


def spread(values: list[float], digits: int = 1) -> str:
    """Mean, and the sample standard deviation where there is more than one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _shape(overrides: dict, recipe: dict) -> tuple[int, int]:
    """Batch size and steps of a run."""
    options = {**recipe, **overrides}
    return options["per_device_train_batch_size"], options["max_steps"]


def _groups(runs: list[dict], recipe: dict) -> dict[tuple, list[dict]]:
    """Metrics of all seeds by batch size, steps, noise and arm."""
    groups = defaultdict(list)
    for run in runs:
        groups[*_shape(run["overrides"], recipe), run.get("noise", 0.0), run["arm"]].append(run["metrics"])
    return groups


def results_table(runs: list[dict], recipe: dict, flop_per_step: dict[str, dict[str, float]]) -> list[str]:
    """Arms without noise: one row for each, batch size and number of steps, over all seeds."""
    titles = {name: arm.title for name, arm in read_arms().items()}
    rows = [
        "| arm | batch | steps | compute | seeds | t2i R@1 / R@10 | i2t R@1 / R@10 | sum of recalls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = {key: metrics for key, metrics in _groups(runs, recipe).items() if key[2] == 0 and key[3] not in FILTERS}
    for (batch, steps, _, arm), metrics in sorted(groups.items(), key=_place):
        flop, most = flop_per_step[str(batch)], max(key[1] for key in groups if key[0] == batch)
        compute = f"{steps * flop[arm] / (most * flop[PEER]):.2f}" if arm in flop else ""
        recalls = [
            " / ".join(spread([found[f"{side}_recall_at_{k}"] for found in metrics]) for k in (1, 10))
            for side in DIRECTIONS
        ]
        cells = [titles[arm], str(batch), f"{steps:,}", compute, str(len(metrics)), *recalls]
        rows.append(f"| {' | '.join(cells)} | {spread([found['recall_sum'] for found in metrics])} |")
    return rows


def _place(group: tuple) -> tuple:
    """The place of a row: larger batches first, then the peer, MCL and the others, then more steps first."""
    batch, steps, _, arm = group[0]
    return -batch, [PEER, MCL, arm].index(arm), arm, -steps


def filter_table(runs: list[dict], recipe: dict) -> list[str]:
    """Filters at each share of noise: sum of recalls, and what the rule drops of all training pairs at the end."""
    titles = {name: arm.title for name, arm in read_arms().items()}
    rows = [
        "| arm | captions moved | sum of recalls | dropped of moved / of others, % | area under the ROC curve |",
        "|---|---|---|---|---|",
    ]
    whole = _shape({}, recipe)
    groups = {key[2:]: metrics for key, metrics in _groups(runs, recipe).items() if key[:2] == whole}
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


def trials_table(trials: list[dict]) -> list[str]:
    """Every trial, the best of each arm first."""
    titles = {name: arm.title for name, arm in read_arms().items()}
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
        lines += ["", *trials_table(results["trials"])]
    write_between(markdown, BEGIN, END, [*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("markdown", type=Path)
    args = parser.parse_args()
    write_tables(args.json, args.markdown)


if __name__ == "__main__":
    run_script(main)
