"""Recall and speed of each index type of a local search index among a million vectors.

    OMP_NUM_THREADS=1 python benchmarks/search.py
    OMP_NUM_THREADS=1 python benchmarks/search.py --synthetic --num 20000 --queries 50   # a minute

The vectors are embeddings of a trained model, enlarged, and the queries are embeddings of captions (`embeddings.py`
says how). With --synthetic they are drawn at random in the shape of image embeddings. They share a mean, so that they
lie in a cone. They form many groups of very different sizes, and their variance falls off along the axes. A query is a
vector with noise; it is farther from all vectors than these are from each other, as embeddings of texts are. With
--plain the vectors have no structure: no neighbor is much nearer than the rest, the worst case of approximate search.

Recall@10 is the share of the ten nearest vectors that a search returns among its ten. Speed is the median time of a
query in FAISS' flat index over that in the index type, in the same run, as process time on one thread. The index types
take turns by blocks of 20 queries, because the flat index reads a gigabyte for each query and empties the caches.
Memory is the size of the index file as a share of the flat one's; the float32 embeddings that rescoring reads from the
disk are not counted.

In the table of docs/performance.md row 6 is the index type "ivfpq", and row 6p is an index of FAISS alone.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from embeddings import DIM, MODEL, NUM_IMAGES, embed_scenes, enlarge, train_model
from side_by_side import optional, row

from modeling_cots.scripts.error_boundary import run_script

faiss = optional("faiss")
if faiss is not None:
    from modeling_cots.search.faiss_vectors import FaissVectors
    from modeling_cots.search.index_types import FAISS, INDEX_TYPES

    IN_FAISS = [name for name, index_type in INDEX_TYPES.items() if FAISS in index_type.stores]

TOP = 10
QUICK_SIZES = 3_000, 32, 20  # vectors, their numbers, queries
BLOCK = 20  # queries of one index type in a row, which find the index in the caches, as in a server
REFINED = "IVF1024,PQ128x4fsr,RFlat"  # FAISS' own: 4-bit codes of residuals; rescores from vectors held in memory
REFINED_NPROBE, REFINED_FACTOR = 16, 20
MEASURED = "ivfpq", REFINED  # the rows of the table; building hnsw takes longer than all others together


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
class Found:
    """The figures of one index type."""

    recall: float
    speed: float  # times as fast as FAISS' flat index
    memory: float  # size of the file over that of the flat index
    building: float  # seconds of building over those of one query of the flat index


class RefinedVectors:
    """The peer of row 6p: product codes that FAISS itself refines. It has the methods of `FaissVectors` used here."""

    def __init__(self, dim: int, fetch):
        name = REFINED.replace("1024", "16").replace("128", str(dim // 2)) if dim != DIM else REFINED
        self.index, self._fetch = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT), fetch

    def grow(self, num: int) -> None:
        vectors = np.ascontiguousarray(self._fetch(slice(0, num)))
        self.index.train(vectors[:: max(1, num // 250_000)])
        self.index.add(vectors)

    def search(self, queries, top: int, allowed):
        base = faiss.SearchParametersIVF(nprobe=REFINED_NPROBE)
        parameters = faiss.IndexRefineSearchParameters(k_factor=REFINED_FACTOR, base_index_params=base)
        return self.index.search(queries, top, params=parameters)

    def save(self, vectors: Path, thresholds: Path) -> None:
        faiss.write_index(self.index, str(vectors))


def build(names: list[str], stored: np.ndarray, folder: str) -> dict[str, tuple]:
    """For each name: the index of all vectors, the seconds of building it, the bytes of its file."""
    built = {}
    for name in names:
        dim, fetch = stored.shape[1], lambda positions: np.asarray(stored[positions])
        index = RefinedVectors(dim, fetch) if name == REFINED else FaissVectors(name, dim, fetch)
        start = time.process_time()
        index.grow(len(stored))
        seconds = time.process_time() - start
        paths = Path(folder, "vectors.faiss"), Path(folder, "thresholds.npy")
        index.save(*paths)
        built[name] = index, seconds, os.path.getsize(paths[0])
    return built


def compare(names: list[str], stored: np.ndarray, queries: np.ndarray, folder: str) -> dict[str, Found]:
    """Measure every index type on every query, in turns by blocks; "exact", FAISS' flat index, is always included."""
    faiss.omp_set_num_threads(1)
    built = build(["exact", *(name for name in names if name != "exact")], stored, folder)
    everything = np.ones(len(stored), dtype=bool)
    seconds, hits = {name: [] for name in built}, {name: [] for name in built}
    nearest: list[set[int]] = []
    for start in range(0, len(queries), BLOCK):
        for name, (index, _, _) in built.items():
            for number, query in enumerate(queries[start : start + BLOCK], start):
                begin = time.process_time()
                positions = index.search(query[None], TOP, everything)[1][0]
                seconds[name].append(time.process_time() - begin)
                if name == "exact":
                    nearest.append(set(positions))
                hits[name].append(len(set(positions) & nearest[number]) / TOP)
    flat, size = statistics.median(seconds["exact"]), built["exact"][2]
    return {
        name: Found(float(np.mean(hits[name])), flat / statistics.median(seconds[name]), num_bytes / size, took / flat)
        for name, (_, took, num_bytes) in built.items()
    }


def synthetic_vectors(num: int, dim: int, num_queries: int, plain: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random vectors in groups, or without structure, and queries; see the module's docstring."""
    rng = np.random.default_rng(0)
    num_groups = max(10, num // 250)
    shares = 1 / np.arange(1, num_groups + 1) ** 0.7  # a few large groups, many small ones
    groups = rng.standard_normal((num_groups, dim), dtype=np.float32), shares / shares.sum()
    vectors = draw_vectors(num, dim, rng, groups, plain)
    return vectors, draw_queries(vectors, num_queries, rng)


def real_vectors(num: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """A trained model's embeddings of images, enlarged, and of captions; trains the model if it is missing."""
    if not (MODEL / "model.safetensors").is_file():
        train_model(MODEL)
    real, queries = embed_scenes(MODEL, min(NUM_IMAGES, num), num_queries)
    return enlarge(real, num, np.random.default_rng(0)), queries


def measure(device: str, quick: bool) -> list[dict]:
    """Row 6, the index type "ivfpq", and row 6p, FAISS' own index with such codes."""
    if faiss is None:
        return [search_row(name, None, "FAISS is not installed") for name in MEASURED]
    if quick:
        vectors, queries = synthetic_vectors(*QUICK_SIZES, plain=False)
    else:
        vectors, queries = real_vectors(1_000_000, 200)
    note = f"{len(vectors):,} x {vectors.shape[1]}, FAISS {faiss.__version__}, one CPU thread"
    with tempfile.TemporaryDirectory() as folder:
        found = compare(list(MEASURED), on_disk(vectors, folder), queries, folder)
    return [search_row(name, found[name].speed, f"recall@10 {found[name].recall:.3f}; {note}") for name in MEASURED]


def search_row(name: str, ratio: float | None, note: str) -> dict:
    id, goal = ("6", ">= 100 at recall@10 >= .95") if name == "ivfpq" else ("6p", "peer")
    title = f"search by captions: FAISS flat / {name if name == REFINED else f'index type {name}'}"
    return row(id, title, ratio, goal, note)


def on_disk(vectors: np.ndarray, folder: str) -> np.ndarray:
    """The vectors memory-mapped from a file, as in a search index."""
    path = os.path.join(folder, "embeddings.npy")
    np.save(path, vectors)
    return np.load(path, mmap_mode="r")


def main() -> None:
    if faiss is None:
        raise ValueError("FAISS is not installed: pip install faiss-cpu.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--engines", nargs="+", choices=[*IN_FAISS, REFINED], default=[*IN_FAISS, REFINED])
    parser.add_argument("--synthetic", action="store_true", help="random vectors in groups, not a model's")
    parser.add_argument("--plain", action="store_true", help="random vectors without structure")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no ratio worth telling")
    args = parser.parse_args()
    if args.quick:
        vectors, queries = synthetic_vectors(*QUICK_SIZES, args.plain)
    elif args.synthetic or args.plain:
        vectors, queries = synthetic_vectors(args.num, DIM, args.queries, args.plain)
    else:
        vectors, queries = real_vectors(args.num, args.queries)
    shape = f"{len(vectors):,} vectors of {vectors.shape[1]}, {len(queries)} queries"
    print(f"{shape}, FAISS {faiss.__version__}", flush=True)
    print("| index type | recall@10 | times as fast as exact | memory | building, in exact queries |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, figures in compare(args.engines, on_disk(vectors, folder), queries, folder).items():
            print(
                f"| {name} | {figures.recall:.3f} | {figures.speed:.1f} | {figures.memory:.3f} | "
                f"{figures.building:,.0f} |"
            )


if __name__ == "__main__":
    run_script(main)
