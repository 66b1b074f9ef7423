"""How well and how fast each engine of a local search index finds the ten nearest of a million vectors.

    OMP_NUM_THREADS=1 python benchmarks/search.py
    OMP_NUM_THREADS=1 python benchmarks/search.py --num 20000 --queries 50   # a minute

The vectors are synthetic, 256 numbers of unit length, made as embeddings of pictures lie: in a cone (one mean that all
share), in many groups of very different sizes, with variance that falls off along the axes. Queries stand between a
vector and its group, farther from all of them than they from each other, as texts do. Vectors without any structure
(--plain) have no neighbours worth the name and are the worst case of every approximate method.

Recall@10 is the share of the exact ten that are found. Latency is told as a ratio: how many times faster one query is
than exact search in the same run, engines in turn, the median of the rounds. Memory is the size of the written index
as a share of the exact one's; what rescoring reads lies on disk beside it, and is not in it.
"""

import argparse
import os
import statistics
import tempfile
import time

import faiss
import numpy as np

from modeling_cots.search_vectors import ENGINES, VECTORS, FaissVectors

TOP, ROUNDS = 10, 5


def draw_vectors(num: int, dim: int, rng: np.random.Generator, groups, plain: bool) -> np.ndarray:
    """(num, dim) unit vectors around `groups`, a pair of centres and their shares; see the module's text."""
    vectors = rng.standard_normal((num, dim), dtype=np.float32)
    if not plain:
        centres, shares = groups
        spread = np.linspace(1, 0.1, dim, dtype=np.float32)
        for start in range(0, num, 50_000):
            chunk = vectors[start : start + 50_000]
            chunk *= 0.8
            chunk += centres[rng.choice(len(centres), len(chunk), p=shares)]
            chunk *= spread
            chunk += 0.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def draw_queries(vectors: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, dim) unit vectors, each a stored one with noise of its own length."""
    chosen = vectors[rng.integers(0, len(vectors), num)]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    queries = chosen + 0.6 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--plain", action="store_true", help="vectors without structure")
    args = parser.parse_args()
    faiss.omp_set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    rng = np.random.default_rng(0)
    num_groups = max(10, args.num // 250)
    shares = 1 / np.arange(1, num_groups + 1) ** 0.7  # a few large groups, many small ones
    groups = rng.standard_normal((num_groups, args.dim), dtype=np.float32), shares / shares.sum()
    with tempfile.TemporaryDirectory() as folder:
        # As in an index: the float32 vectors lie on disk and are mapped.
        path = os.path.join(folder, "embeddings.npy")
        np.save(path, draw_vectors(args.num, args.dim, rng, groups, args.plain))
        stored = np.load(path, mmap_mode="r")
        queries = draw_queries(stored, args.queries, rng)
        everything = np.ones(args.num, dtype=bool)
        print(f"{args.num:,} vectors of {args.dim}, {args.queries} queries, FAISS {faiss.__version__}", flush=True)
        engines, building, sizes = {}, {}, {}
        for name in dict.fromkeys(["exact", *args.engines]):
            engines[name] = FaissVectors(name, args.dim, lambda positions: np.asarray(stored[positions]))
            start = time.perf_counter()
            engines[name].grow(args.num)
            building[name] = time.perf_counter() - start
            engines[name].save(folder)
            sizes[name] = os.path.getsize(os.path.join(folder, VECTORS))
        exact = np.concatenate([engines["exact"].search(query[None], TOP, everything)[1] for query in queries])
        seconds = {name: [] for name in engines}
        recalls = {}
        for number in range(ROUNDS):  # in turn, so that what else the machine does hits all alike
            share = slice(number * args.queries // ROUNDS, (number + 1) * args.queries // ROUNDS)
            for name, engine in engines.items():
                start = time.perf_counter()
                found = [engine.search(query[None], TOP, everything)[1][0] for query in queries[share]]
                seconds[name].append(time.perf_counter() - start)
                hits = [len(set(a) & set(b)) / TOP for a, b in zip(found, exact[share], strict=True)]
                recalls.setdefault(name, []).extend(hits)
        print("| engine | recall@10 | times as fast as exact | memory | building, in exact queries |")
        print("|---|---|---|---|---|")
        one_query = statistics.median(seconds["exact"]) / (args.queries / ROUNDS)
        for name in engines:
            speed = statistics.median(a / b for a, b in zip(seconds["exact"], seconds[name], strict=True))
            print(
                f"| {name} | {np.mean(recalls[name]):.3f} | {speed:.1f} | {sizes[name] / sizes['exact']:.3f} | "
                f"{building[name] / one_query:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
