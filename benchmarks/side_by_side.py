"""Timing two sides in turns, and the rows of the ratio table in docs/performance.md; shared by the benchmarks.

A row is a dict of `id` (its number or name in the table), `title`, `ratio` (`None` where it cannot be measured here),
`goal` and `note` (sizes, and why a ratio is missing or misses its goal). Sides take turns (A B A B ...) on the same
inputs, threads and precision, and medians are compared. On a CPU the time is process time, so that other programs
do not count; on a GPU it is the device's time between two events. Where other processes load while a model computes
(`seconds_a_batch`), it is the time of the clock.
"""

import argparse
import gc
import importlib
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from modeling_cots.scripts.error_boundary import run_script

PEERS = ("timm", "transformers", "open_clip_torch", "sentence-transformers", "faiss-cpu", "onnxruntime", "torch")
PEERS += ("torchvision", "pillow", "simplejpeg", "opencv-python-headless", "pyvips", "usearch", "scalable-vs")
ALSO_CALLED = {"faiss-cpu": ("faiss-gpu", "faiss-gpu-cu12")}  # other packages with the same module
HEAD_START, TIMED, LEFT = 2, 10, 2  # batches of a worker: prefetched before the timing, timed, left after the timing


def seconds(function: Callable[[], object], device: str) -> float:
    """Seconds that one call of `function` takes."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def seconds_a_batch(batches: Iterator, num_workers: int, device: str) -> float:
    """
    Seconds that a batch takes while `num_workers` processes load; needs `batches_to_time(num_workers)` batches.

    The start of the workers and the two batches that each prefetches are not timed. As many batches are left at the
    end, so that no timed batch was prefetched. Returns time by the clock; without workers on a CPU, process time.
    """
    workers = max(1, num_workers)
    clock = time.process_time if device == "cpu" and num_workers == 0 else time.perf_counter
    for _ in range(HEAD_START * workers):
        next(batches)
    wait_for(device)
    start = clock()
    for _ in range(TIMED * workers):
        next(batches)
    wait_for(device)
    return (clock() - start) / (TIMED * workers)


def batches_to_time(num_workers: int) -> int:
    """How many batches `seconds_a_batch` needs."""
    return (HEAD_START + TIMED + LEFT) * max(1, num_workers)


def wait_for(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def medians(sides: dict[str, Callable], device: str, rounds: int = 5, timer: Callable = seconds) -> dict[str, float]:
    """Median seconds of every side, after one untimed call of each."""
    for side in sides.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(timer(side, device))
    return {name: statistics.median(values) for name, values in times.items()}


def speed(ours: Callable, theirs: Callable, device: str, rounds: int = 5, timer: Callable = seconds) -> float:
    """Median time of `theirs` over that of `ours`: above 1 we are faster."""
    times = medians({"ours": ours, "theirs": theirs}, device, rounds, timer)
    return times["theirs"] / times["ours"]


def row(id: str, title: str, ratio: float | None, goal: str, note: str) -> dict:
    """One row; the module's docstring describes the fields."""
    return {"id": id, "title": title, "ratio": ratio, "goal": goal, "note": note}


def optional(module: str):
    """An optional peer, or `None` where it is not installed (`pip install -e ".[bench]"`)."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def versions() -> dict[str, str]:
    """Versions of the peers, under the name of the package that is installed; "missing" for those that are not."""
    found = {}
    for peer in PEERS:
        names = [name for name in (peer, *ALSO_CALLED.get(peer, ())) if version_of(name) is not None]
        found[names[0] if names else peer] = version_of(names[0]) if names else "missing"
    return found


def version_of(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def free(device: str) -> None:
    """Free the memory of models that nothing refers to any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def write_between(document: Path, begin: str, end: str, lines: list[str]) -> None:
    """
    Replace the lines between two marks of a Markdown file.

    Raises `ValueError` unless the file has each mark once, in this order.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{document} must hold the lines {begin} and {end} once, in this order.")
    before, after = text[: text.index(begin)], text[text.index(end) :]
    document.write_text("\n".join([f"{before}{begin}", *lines, after]), encoding="utf-8")


def format_ratio(ratio: float | None) -> str:
    """Format a ratio with three decimals below 10, where it is close to its goal, and with two above."""
    if ratio is None:
        return "not measured"
    return f"{ratio:,.3f}" if ratio < 10 else f"{ratio:,.2f}"


def print_rows(rows: Iterable[dict]) -> None:
    """Print each row in one line, with its note below."""
    for entry in rows:
        value = format_ratio(entry["ratio"])
        print(
            f"{entry['id']:4s} {entry['title']:78s} {value:>12s}   goal {entry['goal']}\n     {entry['note']}",
            flush=True,
        )


def run_alone(measure: Callable[[str, bool], Iterable[dict]], description: str) -> None:
    """The command line of a topic's script, whose errors end in one sentence."""
    run_script(lambda: _print_measured(measure, description))


def _print_measured(measure: Callable[[str, bool], Iterable[dict]], description: str) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no ratio worth telling")
    options = parser.parse_args()
    print(", ".join(f"{name} {version}" for name, version in versions().items()), end="; ")
    print(f"{options.device}, {torch.get_num_threads()} threads", flush=True)
    print_rows(measure(options.device, options.quick))
