"""Recall and speed of each index type of a local search index among a million vectors.

    OMP_NUM_THREADS=1 python benchmarks/search.py
    OMP_NUM_THREADS=1 python benchmarks/search.py --synthetic --num 20000 --queries 50   # a minute

The vectors are embeddings of a trained model, enlarged, and the queries are embeddings of captions (`embeddings.py`
says how). With --synthetic they are drawn at random in the shape of image embeddings. They share a mean, so that they
lie in a cone. They form many groups of very different sizes, and their variance falls off along the axes. A query is a
vector with noise; it is farther from all vectors than these are from each other, as embeddings of texts are. With
--plain the vectors have no structure: no neighbor is much nearer than the rest, the worst case of approximate search.

Recall@10 is the share of the ten nearest vectors that a search returns among its ten. Speed is the median time of a
query in FAISS' flat index over that in the index type, in the same run, as process time on one thread. All take turns
by blocks of 20 queries, because the flat index reads a gigabyte for each query and empties the caches. Memory is the
size of the index file as a share of the flat one's; the float32 embeddings that rescoring reads from the disk are not
counted.

In the table of docs/performance.md rows 6 are our index types with their defaults and with `--target_recall 0.95`,
which is tuned on 200 captions that are no queries. Rows 6p are other libraries (`search_peers.py`), each with the
fastest setting by which these queries reach a recall of 0.95. Embeddings and the peers' graphs are kept in a folder
under runs/, whose name has the digest of the model; a graph takes minutes to build.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from embeddings import DIM, MODEL, NUM_IMAGES, ROOT, embed_scenes, enlarge, train_model
from search_peers import PEERS, Peer, faiss
from side_by_side import row

from modeling_cots.scripts.error_boundary import run_script

if faiss is not None:
    from modeling_cots.search.faiss_vectors import FaissVectors
    from modeling_cots.search.index_types import FAISS, INDEX_TYPES, TUNED_QUERIES
    from modeling_cots.search.tuning import Sample, choose_effort

    IN_FAISS = [name for name, index_type in INDEX_TYPES.items() if FAISS in index_type.stores]

TOP, TARGET = 10, 0.95
QUICK_SIZES = 3_000, 32, 20  # vectors, their numbers, queries
BLOCK = 20  # queries of one index in a row, which find it in the caches, as in a server
OURS = "ivfpq", "int8", "binary"
TUNED = f" --target_recall {TARGET}"
MEASURED = [*OURS, *(name + TUNED for name in OURS), *PEERS]  # building our hnsw, too, would take minutes each time


def draw_vectors(num: int, dim: int, rng: np.random.Generator, groups, plain: bool) -> np.ndarray:
    """(num, dim) unit vectors around `groups`, a pair of centers and their shares; see the module's docstring."""
    vectors = rng.standard_normal((num, dim), dtype=np.float32)
    if not plain:
        centers, shares = groups
        spread = np.linspace(1, 0.1, dim, dtype=np.float32)
        for start in range(0, num, 50_000):
            chunk = vectors[start : start + 50_000]
            chunk *= 0.8
            chunk += centers[rng.choice(len(centers), len(chunk), p=shares)]
            chunk *= spread
            chunk += 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def draw_queries(vectors: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, dim) unit vectors, each a stored one with noise of 0.6 times its length."""
    chosen = vectors[rng.integers(0, len(vectors), num)]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    queries = chosen + 0.6 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


@dataclass
class Contender:
    """
    An index that is measured.

    Args:
        search: Takes a query (1, d) and returns the positions of its ten results.
        num_bytes: The size of its file.
        building: Seconds of building it; `None` for a peer.
        setting: What it searches with, for the note.
    """

    search: Callable[[np.ndarray], np.ndarray]
    num_bytes: int
    building: float | None
    setting: str


@dataclass
class Found:
    """The figures of one index; `building` is in queries of the flat index."""

    recall: float
    speed: float  # times as fast as FAISS' flat index
    num_bytes: int
    building: float | None
    setting: str


@dataclass
class Data:
    """
    What is searched.

    Args:
        stored: (N, d) vectors, mapped from a file.
        queries: (Q, d) captions.
        sample: (S, d) other captions, for `--target_recall`.
        kept: A folder where graphs are kept.
    """

    stored: np.ndarray
    queries: np.ndarray
    sample: np.ndarray
    kept: Path


def nearest_of(data: Data) -> list[set[int]]:
    """The positions of the ten nearest vectors of each query, by FAISS' flat index."""
    flat = faiss.IndexFlatIP(data.stored.shape[1])
    flat.add(np.ascontiguousarray(data.stored))
    return [set(found) for found in flat.search(data.queries, TOP)[1].tolist()]


def recall_of(search: Callable[[np.ndarray], np.ndarray], data: Data, nearest: list[set[int]]) -> float:
    """The mean share of the ten nearest vectors that a search finds."""
    found = [set(search(query[None]).tolist()) for query in data.queries]
    return float(np.mean([len(each & near) / TOP for each, near in zip(found, nearest, strict=True)]))


def build_ours(names: list[str], data: Data) -> dict[str, Contender]:
    """Our index types, by their names, with ` --target_recall 0.95` where they are tuned."""
    contenders = {}
    for index_type in dict.fromkeys(name.removesuffix(TUNED) for name in names):
        vectors = FaissVectors(index_type, data.stored.shape[1], lambda positions: np.asarray(data.stored[positions]))
        start = time.process_time()
        vectors.grow(len(data.stored))
        seconds = time.process_time() - start
        with tempfile.TemporaryDirectory() as folder:
            num_bytes = os.path.getsize(vectors.save(Path(folder, "vectors.faiss"), Path(folder, "thresholds.npy"))[0])
        if index_type in names:
            contenders[index_type] = Contender(_searching(vectors), num_bytes, seconds, "by default")
        if index_type + TUNED in names:
            own, everything = np.full(len(data.sample), -1), np.ones(len(data.stored), dtype=bool)
            effort = choose_effort(vectors, Sample(data.sample, own), everything, TARGET).effort
            setting = f"nprobe {effort.nprobe} and {effort.candidates} candidates, chosen on other captions"
            tuned = vectors.over(vectors.fetch, effort)
            contenders[index_type + TUNED] = Contender(_searching(tuned), num_bytes, seconds, setting)
    return contenders


def _searching(vectors) -> Callable[[np.ndarray], np.ndarray]:
    return lambda query: vectors.search(query, TOP, None)[1][0]


def build_peer(name: str, data: Data, nearest: list[set[int]]) -> Contender | None:
    """A peer with the fastest of its settings that reach the target; `None` where it is not installed."""
    module, _, build, file = PEERS[name]
    if module is None:
        return None
    peer = build(data.stored, data.kept / file)
    seconds = {}
    for setting in peer.settings:
        begin = time.process_time()
        if recall_of(_searching_peer(peer, setting), data, nearest) >= TARGET:
            seconds[str(setting)] = time.process_time() - begin, setting
            if isinstance(setting, int):  # settings in order: the first one that reaches the target is the fastest
                break
    if not seconds:
        return None
    _, setting = min(seconds.values(), key=lambda each: each[0])
    return Contender(_searching_peer(peer, setting), peer.num_bytes, None, f"{peer.name} {setting}")


def _searching_peer(peer: Peer, setting) -> Callable[[np.ndarray], np.ndarray]:
    return lambda query: np.asarray(peer.search(query, TOP, setting))


def compare(names: list[str], data: Data) -> dict[str, Found | None]:
    """Measure every index on every query, in turns by blocks; "exact", FAISS' flat index, is always included.

    A peer that is not installed, or that reaches the target by none of its settings, gives `None`.
    """
    faiss.omp_set_num_threads(1)
    nearest = nearest_of(data)
    contenders = build_ours(["exact", *(name for name in names if name not in PEERS and name != "exact")], data)
    peers = {name: build_peer(name, data, nearest) for name in names if name in PEERS}
    contenders |= {name: peer for name, peer in peers.items() if peer is not None}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    hits: dict[str, list[float]] = {name: [] for name in contenders}
    for start in range(0, len(data.queries), BLOCK):
        for name, contender in contenders.items():
            for number, query in enumerate(data.queries[start : start + BLOCK], start):
                begin = time.process_time()
                positions = contender.search(query[None])
                seconds[name].append(time.process_time() - begin)
                hits[name].append(len(set(positions.tolist()) & nearest[number]) / TOP)
    flat = statistics.median(seconds["exact"])
    found: dict[str, Found | None] = dict.fromkeys(names)
    for name, each in contenders.items():
        speed, building = flat / statistics.median(seconds[name]), each.building and each.building / flat
        found[name] = Found(float(np.mean(hits[name])), speed, each.num_bytes, building, each.setting)
    return found


def synthetic_vectors(num: int, dim: int, num_queries: int, plain: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random vectors in groups, or without structure, and queries; see the module's docstring."""
    rng = np.random.default_rng(0)
    num_groups = max(10, num // 250)
    shares = 1 / np.arange(1, num_groups + 1) ** 0.7  # a few large groups, many small ones
    groups = rng.standard_normal((num_groups, dim), dtype=np.float32), shares / shares.sum()
    vectors = draw_vectors(num, dim, rng, groups, plain)
    return vectors, draw_queries(vectors, num_queries, rng)


def real_data(num: int, num_queries: int) -> Data:
    """A trained model's embeddings of images, enlarged, and of captions; trains the model if it is missing."""
    if not (MODEL / "model.safetensors").is_file():
        train_model(MODEL)
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()[:8]
    folder = ROOT / "runs" / f"search_{digest}_{num}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "captions.npy").is_file():
        images, captions = embed_scenes(MODEL, min(NUM_IMAGES, num), 1_000)
        np.save(folder / "images.npy", enlarge(images, num, np.random.default_rng(0)))
        np.save(folder / "captions.npy", captions)
    captions = np.load(folder / "captions.npy")
    stored = np.load(folder / "images.npy", mmap_mode="r")
    return Data(stored, captions[:num_queries], captions[-TUNED_QUERIES:], folder)


def drawn_data(num: int, dim: int, num_queries: int, plain: bool, folder: str) -> Data:
    """`synthetic_vectors`, mapped from a file of the folder."""
    vectors, queries = synthetic_vectors(num, dim, num_queries + TUNED_QUERIES, plain)
    np.save(Path(folder, "images.npy"), vectors)
    stored = np.load(Path(folder, "images.npy"), mmap_mode="r")
    return Data(stored, queries[:num_queries], queries[num_queries:], Path(folder))


def measure(device: str, quick: bool) -> list[dict]:
    """Rows 6, our index types, and rows 6p, other libraries."""
    if faiss is None:
        return [search_row(name, None, "FAISS is not installed") for name in MEASURED]
    with tempfile.TemporaryDirectory() as folder:
        data = drawn_data(*QUICK_SIZES, False, folder) if quick else real_data(1_000_000, 500)
        found = compare(MEASURED, data)
    sizes = f"{len(data.stored):,} x {data.stored.shape[1]}, FAISS {faiss.__version__}, one CPU thread"
    return [_row_of(name, found[name], len(data.stored), sizes) for name in MEASURED]


def _row_of(name: str, found: Found | None, num: int, sizes: str) -> dict:
    if found is None:
        missing = f"{PEERS[name][1]} is not installed" if PEERS[name][0] is None else f"never reaches {TARGET}"
        return search_row(name, None, missing)
    num_bytes = f"{found.num_bytes / num:,.0f} bytes a vector in memory"
    return search_row(name, found.speed, f"recall@10 {found.recall:.3f}, {num_bytes}; {found.setting}; {sizes}")


def search_row(name: str, ratio: float | None, note: str) -> dict:
    is_peer = name in PEERS
    title = f"search by captions: FAISS flat / {name if is_peer else f'index type {name}'}"
    return row("6p" if is_peer else "6", title, ratio, "peer" if is_peer else ">= 150 at recall@10 >= .95", note)


def main() -> None:
    if faiss is None:
        raise ValueError("FAISS is not installed: pip install faiss-cpu.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    choices = [*IN_FAISS, *(name + TUNED for name in OURS), *PEERS]
    parser.add_argument("--engines", nargs="+", choices=choices, default=choices)
    parser.add_argument("--synthetic", action="store_true", help="random vectors in groups, not a model's")
    parser.add_argument("--plain", action="store_true", help="random vectors without structure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no ratio worth telling")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            data = drawn_data(*QUICK_SIZES, args.plain, folder)
        elif args.synthetic or args.plain:
            data = drawn_data(args.num, DIM, args.queries, args.plain, folder)
        else:
            data = real_data(args.num, args.queries)
        shape = f"{len(data.stored):,} vectors of {data.stored.shape[1]}, {len(data.queries)} queries"
        print(f"{shape}, FAISS {faiss.__version__}", flush=True)
        print("| index | recall@10 | times as fast as exact | memory | building, in exact queries | searched |")
        print("|---|---|---|---|---|---|")
        found = compare(args.engines, data)
        flat = found["exact"]
        for name, each in found.items():
            if each is None:
                print(f"| {name} | not measured | | | | |")
                continue
            building = "" if each.building is None else f"{each.building:,.0f}"
            memory = each.num_bytes / flat.num_bytes
            print(f"| {name} | {each.recall:.3f} | {each.speed:.1f} | {memory:.3f} | {building} | {each.setting} |")


if __name__ == "__main__":
    run_script(main)
