"""The tables of `ablation.py`'s results, written between two marks of a Markdown file.

python benchmarks/ablation_table.py benchmarks/ablation.json docs/results.md
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from ablation import ARMS
from side_by_side import write_between

from modeling_cots.scripts.error_boundary import run_script

BEGIN, END = "<!-- written by benchmarks/ablation_table.py -->", "<!-- end of what it writes -->"
MEASURES = "recall_at_1", "recall_at_5", "recall_at_10", "median_rank"
DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}


def spread(values: list[float]) -> str:
    """Mean, and the sample standard deviation where there is more than one value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def results_table(runs: list[dict], flop_per_step: dict[str, float]) -> list[str]:
    """One row an arm, number of steps and direction, over all seeds; the sum is that of both directions."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["arm"], run["steps"]].append(run["metrics"])
    unit = flop_per_step["a"] * max(steps for arm, steps in groups if arm == "a")
    rows = [
        "| arm | steps | compute | seeds | direction | R@1 | R@5 | R@10 | median rank | sum of recalls |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (arm, steps), metrics in sorted(groups.items(), key=lambda group: (group[0][0], -group[0][1])):
        compute = f"{steps * flop_per_step[arm] / unit:.2f}"
        title, total = f"({arm}) {ARMS[arm].title}", spread([found["recall_sum"] for found in metrics])
        for side, direction in DIRECTIONS.items():
            cells = [spread([found[f"{side}_{measure}"] for found in metrics]) for measure in MEASURES]
            rows.append(f"| {' | '.join([title, str(steps), compute, str(len(metrics)), direction, *cells, total])} |")
            title = compute = total = ""
    return rows


def detection_rows(runs: list[dict]) -> list[str]:
    """How well the momentum similarity tells moved captions from others, at the end of each noisy arm."""
    aucs = defaultdict(list)
    for run in runs:
        if "detection_auc" in run["metrics"]:
            aucs[run["arm"]].append(run["metrics"]["detection_auc"])
    rows = ["| arm | area under the ROC curve |", "|---|---|"]
    for arm, values in sorted(aucs.items()):
        auc = f"{statistics.mean(values):.3f}"
        if len(values) > 1:
            auc += f" ± {statistics.stdev(values):.3f}"
        rows.append(f"| ({arm}) {ARMS[arm].title} | {auc} |")
    return rows


def trials_table(trials: list[dict]) -> list[str]:
    """Every trial, the best of each arm first."""
    rows = [
        "| arm | otherwise than the recipe | steps | text to image R@10 | image to text R@10 |",
        "|---|---|---|---|---|",
    ]
    for trial in sorted(trials, key=lambda trial: (trial["arm"], -trial["metrics"]["recall_sum"])):
        overrides = ", ".join(f"`{name}` {value:g}" for name, value in trial["overrides"].items()) or "nothing"
        found = [f"{trial['metrics'][f'{side}_recall_at_10']:.1f}" for side in DIRECTIONS]
        rows.append(f"| {' | '.join([trial['arm'], overrides, str(trial['steps']), *found])} |")
    return rows


def write_tables(json_path: Path, markdown: Path) -> None:
    """Tables of what there is of results in `json_path`, between the marks of `markdown`."""
    results = json.loads(json_path.read_text(encoding="utf-8"))
    lines = []
    if results["runs"]:
        lines += ["", *results_table(results["runs"], results["flop_per_step"]), "", *detection_rows(results["runs"])]
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
