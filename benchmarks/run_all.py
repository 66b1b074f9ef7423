"""Measure all ratios and write them to a JSON file, or write the table of docs/performance.md from such a file.

    python benchmarks/run_all.py --device cuda --json out.json
    OMP_NUM_THREADS=1 python benchmarks/run_all.py --device cpu --json benchmarks/results_cpu.json
    python benchmarks/run_all.py --device cpu --json out.json --quick --only encode memory    # whether it runs
    python benchmarks/run_all.py --table benchmarks/results_cpu.json docs/performance.md      # nothing is measured

Every topic is a script in this folder with a function `measure(device, quick)`. It runs in a separate process. The
file is written after each topic, whose rows replace its old ones; a file of another device is refused. Of several GPUs
the first visible one is used, and the search and `encode_cpu` have one thread.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from side_by_side import format_ratio, print_rows, versions, write_between

from modeling_cots.scripts.error_boundary import run_script

FOLDER = Path(__file__).parent
TOPICS = ("encode", "encode_cpu", "step", "memory", "data", "search", "cross_encoder")
# Their rows say so; this holds for matrix products, too. `data` sets it itself.
ON_ONE_THREAD = ("encode_cpu", "search")
BEGIN, END = "<!-- ratios: written by benchmarks/run_all.py -->", "<!-- end of ratios -->"
FIELDS = {"id", "title", "ratio", "goal", "note"}


def available_topics() -> list[str]:
    """The topics whose script exists."""
    return [topic for topic in TOPICS if (FOLDER / f"{topic}.py").is_file()]


def check(device: str, topics: list[str], path: Path) -> None:
    """Raise `ValueError` for arguments that would fail later."""
    unknown = sorted(set(topics) - set(available_topics()))
    if unknown:
        raise ValueError(f"There is no topic {', '.join(unknown)}; there are {', '.join(available_topics())}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no GPU here: take --device cpu.")
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written.")


def read_old(path: Path, device: str, quick: bool) -> tuple[list[dict], dict[str, str]]:
    """Rows and versions of the file, if it exists. Raises `ValueError` for one of another device or other sizes."""
    if not path.is_file():
        return [], {}
    old, new = json.loads(path.read_text(encoding="utf-8")), describe(device, quick)
    for name in ("device", "quick"):
        if old[name] != new[name]:
            raise ValueError(
                f"{path} was measured with {name} {old[name]!r}, and this is {new[name]!r}: take another."
            )
    return [{"date": old["date"], **entry} for entry in old["rows"]], old["versions"]


def environment_of(topic: str) -> dict[str, str]:
    """The environment of a topic's process: one GPU, as COTSTrainer requires, and one thread where rows say so."""
    environment = dict(os.environ)
    environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if topic in ON_ONE_THREAD:
        environment["OMP_NUM_THREADS"] = "1"
    return environment


def run_topic(topic: str, device: str, quick: bool) -> list[dict]:
    """Rows of one topic, measured in a new process. Raises `ValueError` if it fails or returns malformed rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        program = (
            f"import json, sys; sys.path.insert(0, {str(FOLDER)!r}); import {topic}\n"
            f"rows = {topic}.measure({device!r}, {quick!r})\n"
            f"open({str(path)!r}, 'w').write(json.dumps(rows))"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment_of(topic))
        if done.returncode != 0:
            raise ValueError(f"{topic} failed:\n{done.stderr[-3000:]}")
        rows = json.loads(path.read_text(encoding="utf-8"))
    if not rows or any(set(entry) != FIELDS for entry in rows):
        raise ValueError(f"{topic} gave rows without exactly {', '.join(sorted(FIELDS))}.")
    return [{**entry, "topic": topic, "date": datetime.date.today().isoformat()} for entry in rows]


def describe(device: str, quick: bool) -> dict:
    """Device, date and versions of a measurement."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()}, {threads} threads)"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "quick": quick,
        "versions": {"python": platform.python_version(), **versions()},
    }


def measure_all(device: str, topics: list[str], quick: bool, path: Path) -> int:
    """Measure, print and write; returns how many topics failed. Failures are printed at the end and stop no topic."""
    check(device, topics, path)
    old, old_versions = read_old(path, device, quick)
    described = describe(device, quick)
    # A peer that is missing now has kept its rows.
    described["versions"] = {
        name: old_versions.get(name, version) if version == "missing" else version
        for name, version in described["versions"].items()
    }
    measured, failed = {}, []
    for topic in topics:
        print(f"\n{topic}", flush=True)
        try:
            measured[topic] = run_topic(topic, device, quick)
        except ValueError as error:
            failed.append(str(error))
            continue
        print_rows(measured[topic])
        kept = {entry["topic"]: [other for other in old if other["topic"] == entry["topic"]] for entry in old}
        merged = {**kept, **measured}
        rows = [entry for name in TOPICS for entry in merged.get(name, [])]
        path.write_text(json.dumps({**described, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for error in failed:
        print(error, file=sys.stderr)
    return len(failed)


def sort_key(entry: dict) -> tuple[int, str]:
    """Sort rows 1a, 1b, 1p, 2, ...: by number, then by letter; rows without a number come last."""
    digits = "".join(letter for letter in entry["id"] if letter.isdigit())
    return (int(digits) if digits else 99, entry["id"])


def format_table(results: dict) -> str:
    """The table of the documentation, in markdown."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    dates = sorted(entry.get("date", results["date"]) for entry in results["rows"])
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    lines = [
        f"Measured on: {results['device']}, {when}; {used}.",
        "",
        "| # | numerator / denominator | goal | ratio | sizes; why it is short or missing |",
        "|---|---|---|---|---|",
    ]
    for entry in sorted(results["rows"], key=sort_key):
        cells = [entry["id"], entry["title"], entry["goal"], format_ratio(entry["ratio"]), entry["note"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def write_table(results_path: Path, document: Path) -> None:
    """Write the table between the two marks of `document`. Raises `ValueError` for results of `--quick`."""
    results = json.loads(results_path.read_text(encoding="utf-8"))
    if results["quick"]:
        raise ValueError(f"{results_path} was measured with --quick: its ratios mean nothing.")
    write_between(document, BEGIN, END, [format_table(results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="the file to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no ratio worth telling")
    parser.add_argument("--only", nargs="+", metavar="TOPIC", help=f"some of {', '.join(available_topics())}")
    parser.add_argument("--table", nargs=2, type=Path, metavar=("JSON", "MARKDOWN"), help="write the table instead")
    options = parser.parse_args()
    if options.table is not None:
        write_table(*options.table)
        return
    if options.json is None:
        parser.error("give --json FILE to write to, or --table JSON MARKDOWN")
    sys.exit(measure_all(options.device, options.only or available_topics(), options.quick, options.json) > 0)


if __name__ == "__main__":
    run_script(main)
