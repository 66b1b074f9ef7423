"""Measure all ratios and write them to a JSON file, or write the table of docs/performance.md from such a file.

    python benchmarks/run_all.py --device cuda --json out.json
    OMP_NUM_THREADS=1 python benchmarks/run_all.py --device cpu --json benchmarks/results_cpu.json
    python benchmarks/run_all.py --device cpu --json out.json --quick --only encode memory    # whether it runs
    python benchmarks/run_all.py --table benchmarks/results_cpu.json docs/performance.md      # nothing is measured

Every topic is a script in this folder with a function `measure(device, quick)`. It runs in a separate process. The
file is written after each row, with its date and the versions that it was measured with; the rows of a topic replace
its old ones, and a file of another device is refused. Of several GPUs the first visible one is used, and the search,
`encode_cpu` and `step_overhead` have one thread. On a GPU all ends after 8 minutes, and what only a GPU can tell comes
first.
"""

import argparse
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from side_by_side import format_ratio, print_rows, versions, write_between

from modeling_cots.scripts.error_boundary import run_script

FOLDER = Path(__file__).parent
TOPICS = ("encode", "encode_cpu", "step", "step_overhead", "memory", "data", "search", "cross_encoder")
FIRST_ON_GPU = (("encode", "measure_first"), ("step", "measure_first"), ("memory", "measure"))
GPU_MINUTES = 8
# Their rows say so; this holds for matrix products, too. `data` sets it itself.
ON_ONE_THREAD = ("encode_cpu", "search", "step_overhead")
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


def plan(device: str, topics: list[str]) -> list[tuple[str, str]]:
    """
    Topics in the order in which they are measured, each with the name of the function that does it.

    On a GPU the rows that only a GPU gives come first: 1b, 3b and compiled layers, and the peaks of row 5.
    """
    if device == "cpu":
        return [(topic, "measure") for topic in topics]
    first = [(topic, name) for topic, name in FIRST_ON_GPU if topic in topics]
    halves = [topic for topic, name in first if name == "measure_first"]
    later = [(topic, "measure_rest" if topic in halves else "measure") for topic in topics]
    return [*first, *(step for step in later if step not in first)]


def run_topic(topic: str, function: str, device: str, quick: bool, deadline: float = math.inf) -> Iterator[dict]:
    """
    Rows of one topic, each as soon as a new process has measured it.

    Args:
        function: Of the topic's script.
        deadline: When the process is ended, by `time.monotonic`.

    Raises `ValueError` if it fails or returns malformed rows, and `TimeoutError` at the deadline.
    """
    reader, writer = os.pipe()
    program = (
        f"import json, os, sys; sys.path.insert(0, {str(FOLDER)!r}); import {topic}\n"
        f"for row in {topic}.{function}({device!r}, {quick!r}):\n"
        f"    os.write({writer}, (json.dumps(row) + '\\n').encode())"
    )
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment_of(topic),
            pass_fds=[writer],
            start_new_session=True,  # it may have workers, which end with it
        )
        os.close(writer)
        stopped = threading.Event()
        timer = threading.Timer(min(deadline - time.monotonic(), threading.TIMEOUT_MAX), _stop, [process, stopped])
        timer.start()
        num_rows = 0
        try:
            with open(reader, encoding="utf-8") as lines:
                for line in lines:
                    num_rows += 1
                    yield _dated(topic, json.loads(line))
            failed = process.wait() != 0
        finally:
            timer.cancel()
            _stop(process)
        if stopped.is_set():
            raise TimeoutError
        errors.seek(0)
        if failed or num_rows == 0:
            why = errors.read().decode(errors="replace")[-3000:] if failed else "it gave no rows"
            raise ValueError(f"{topic} failed:\n{why}")


def _stop(process: subprocess.Popen, stopped: threading.Event | None = None) -> None:
    if process.poll() is None:
        if stopped is not None:
            stopped.set()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _dated(topic: str, entry: dict) -> dict:
    if set(entry) != FIELDS:
        raise ValueError(f"{topic} gave a row without exactly {', '.join(sorted(FIELDS))}.")
    found = {"python": platform.python_version(), **versions()}
    found = {name: version for name, version in found.items() if version != "missing"}
    return {**entry, "topic": topic, "date": datetime.date.today().isoformat(), "versions": found}


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
    """
    Measure, print and write each row; returns how many topics failed.

    Failures are printed at the end and stop no topic. On a GPU nothing is measured after `GPU_MINUTES`.
    """
    check(device, topics, path)
    results = Results(path, device, quick)
    deadline = math.inf if device == "cpu" else time.monotonic() + 60 * GPU_MINUTES
    failed, late = [], []
    for topic, function in plan(device, topics):
        print(f"\n{topic}", flush=True)
        try:
            for entry in run_topic(topic, function, device, quick, deadline):
                print_rows([entry])
                results.add(entry)
        except TimeoutError:
            late.append(topic)
        except ValueError as error:
            failed.append((topic, str(error)))
    for topic in set(topics) - set(late) - {topic for topic, _ in failed}:
        results.drop_old(topic)
    for _, error in failed:
        print(error, file=sys.stderr)
    if late:
        names = " ".join(dict.fromkeys(late))
        print(f"Not all was measured within {GPU_MINUTES} minutes: go on with --only {names}", file=sys.stderr)
    return len(failed)


class Results:
    """
    The rows of a file, which is written whenever one is added.

    Args:
        path: The file. What it holds already stays where nothing new replaces it.
        device, quick: As measured now. Raises `ValueError` where the file was measured otherwise.
    """

    def __init__(self, path: Path, device: str, quick: bool):
        self.path, self.described = path, describe(device, quick)
        self.old, old_versions = read_old(path, device, quick)
        self.new: list[dict] = []
        # A peer that is missing now has kept its rows.
        self.described["versions"] = {
            name: old_versions.get(name, version) if version == "missing" else version
            for name, version in self.described["versions"].items()
        }
        if any(self.described["versions"].get(name) != version for name, version in old_versions.items()):
            self.old = [{"versions": old_versions, **entry} for entry in self.old]

    def add(self, entry: dict) -> None:
        """Take a row in the place of that of the same topic, id and title."""
        self.new.append(entry)
        key = _key(entry)
        self.old = [other for other in self.old if _key(other) != key]
        self._write()

    def drop_old(self, topic: str) -> None:
        """Leave out the rows of a topic that it does not give any more."""
        self.old = [entry for entry in self.old if entry["topic"] != topic]
        self._write()

    def _write(self) -> None:
        rows = [entry for topic in TOPICS for entry in [*self.new, *self.old] if entry["topic"] == topic]
        content = json.dumps({**self.described, "rows": rows}, indent=1) + "\n"
        whole = self.path.with_name(f"{self.path.name}.new")
        whole.write_text(content, encoding="utf-8")
        whole.replace(self.path)  # a run may be ended at any time


def _key(entry: dict) -> tuple[str, str, str]:
    return entry["topic"], entry["id"], entry["title"]


def sort_key(entry: dict) -> tuple[int, str]:
    """Sort rows 1a, 1b, 1p, 2, ...: by number, then by letter; rows without a number come last."""
    digits = "".join(letter for letter in entry["id"] if letter.isdigit())
    return (int(digits) if digits else 99, entry["id"])


def versions_of(results: dict) -> dict[str, list[str]]:
    """The versions that rows were measured with, by package; of a row without its own they are those of the file."""
    found: dict[str, list[str]] = {}
    for name, version in results["versions"].items():
        rows = [entry.get("versions", results["versions"]).get(name, version) for entry in results["rows"]]
        found[name] = list(dict.fromkeys(sorted(rows))) or [version]
    return found


def format_table(results: dict) -> str:
    """The table of the documentation, in markdown."""
    used = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions_of(results).items())
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
