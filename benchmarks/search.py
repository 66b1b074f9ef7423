"""How well and how fast each engine of a local search index finds the ten nearest of a million vectors: ratio 6.

    OMP_NUM_THREADS=1 python benchmarks/search.py
    OMP_NUM_THREADS=1 python benchmarks/search.py --synthetic --num 20000 --queries 50   # a minute

The vectors are embeddings of a trained model, enlarged, and the queries are captions (`embeddings.py` says how). With
--synthetic, they are made as embeddings of images lie: in a cone (one mean that all share), in many groups of very
different sizes, with variance that falls off along the axes; queries stand between a vector and its group, farther
from all of them than they from each other, as texts do. Vectors without any structure (--plain) have no neighbors
worth the name and are the worst case of every approximate method.

Recall@10 is the share of the exact ten that are found. Speed is how many times faster one query is than FAISS' flat
index in the same run, engines in turn by blocks of 20 queries (a flat index reads a gigabyte for each and leaves
nothing of others' in the caches), by the time of the process on one thread, the median of the queries. Memory is
the size of the written index as a share of the exact one's; what rescoring reads lies on disk beside it, and is not in
it.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import numpy as np
from embeddings import DIM, MODEL, NUM_IMAGES, embed_scenes, enlarge, train_model
from side_by_side import optional, row

faiss = optional("faiss")
if faiss is not None:
    from modeling_cots.search.faiss_vectors import ENGINES, VECTORS, FaissVectors

TOP = 10
BLOCK = 20  # queries of one engine in a row, which then finds its index in the caches, as one that serves does
LEVER = "IVF1024,PQ128x4fsr,RFlat"  # FAISS' own: 4-bit codes of residuals, all vectors in memory to rank them again
LEVER_LISTS, LEVER_FACTOR = 16, 20
MEASURED = "ivfpq", LEVER  # the rows of the table; building hnsw takes longer than all the rest


def draw_vectors(num: int, dim: int, rng: np.random.Generator, groups, plain: bool) -> np.ndarray:
    """(num, dim) unit vectors around `groups`, a pair of centers and their shares; see the module's text."""
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
    """(num, dim) unit vectors, each a stored one with noise of its own length."""
    chosen = vectors[rng.integers(0, len(vectors), num)]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    queries = chosen + 0.6 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


@dataclass
class Found:
    """One engine's figures: times as fast as FAISS' flat index; sizes and building as shares of its size and query."""

    recall: float
    speed: float
    memory: float
    building: float


class Lever:
    """PERFORMANCE's lever 13 in FAISS alone, with the interface of `FaissVectors` as far as it is used here."""

    def __init__(self, dim: int, fetch):
        name = LEVER.replace("1024", "16").replace("128", str(dim // 2)) if dim != DIM else LEVER
        self.index, self._fetch = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT), fetch

    def grow(self, num: int) -> None:
        vectors = np.ascontiguousarray(self._fetch(slice(0, num)))
        self.index.train(vectors[:: max(1, num // 250_000)])
        self.index.add(vectors)

    def search(self, queries, top: int, allowed):
        lists = faiss.SearchParametersIVF(nprobe=LEVER_LISTS)
        parameters = faiss.IndexRefineSearchParameters(k_factor=LEVER_FACTOR, base_index_params=lists)
        return self.index.search(queries, top, params=parameters)

    def save(self, folder: str) -> None:
        faiss.write_index(self.index, os.path.join(folder, VECTORS))


def build(names: list[str], stored: np.ndarray, folder: str) -> dict[str, tuple]:
    """By name: the engine with all vectors in it, seconds of building, bytes of its file."""
    built = {}
    for name in names:
        dim, fetch = stored.shape[1], lambda positions: np.asarray(stored[positions])
        engine = Lever(dim, fetch) if name == LEVER else FaissVectors(name, dim, fetch)
        start = time.process_time()
        engine.grow(len(stored))
        seconds = time.process_time() - start
        engine.save(folder)
        built[name] = engine, seconds, os.path.getsize(os.path.join(folder, VECTORS))
    return built


def compare(names: list[str], stored: np.ndarray, queries: np.ndarray, folder: str) -> dict[str, Found]:
    """Every engine on every query, in turn by blocks; "exact" is FAISS' flat index and always among them."""
    faiss.omp_set_num_threads(1)
    built = build(["exact", *(name for name in names if name != "exact")], stored, folder)
    everything = np.ones(len(stored), dtype=bool)
    seconds, hits = {name: [] for name in built}, {name: [] for name in built}
    nearest: list[set[int]] = []
    for start in range(0, len(queries), BLOCK):
        for name, (engine, _, _) in built.items():
            for number, query in enumerate(queries[start : start + BLOCK], start):
                begin = time.process_time()
                positions = engine.search(query[None], TOP, everything)[1][0]
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
    """Vectors in groups, or without structure, and queries; see the module's text."""
    rng = np.random.default_rng(0)
    num_groups = max(10, num // 250)
    shares = 1 / np.arange(1, num_groups + 1) ** 0.7  # a few large groups, many small ones
    groups = rng.standard_normal((num_groups, dim), dtype=np.float32), shares / shares.sum()
    vectors = draw_vectors(num, dim, rng, groups, plain)
    return vectors, draw_queries(vectors, num_queries, rng)


def real_vectors(num: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """A trained model's embeddings, enlarged, and captions'; the model is trained if it is not there yet."""
    if not (MODEL / "model.safetensors").is_file():
        train_model(MODEL)
    real, queries = embed_scenes(MODEL, min(NUM_IMAGES, num), num_queries)
    return enlarge(real, num, np.random.default_rng(0)), queries


def measure(device: str, quick: bool) -> list[dict]:
    """Row 6 of the product's engine for many millions, and FAISS' own index of that kind beside it."""
    if faiss is None:
        return [search_row(name, None, "FAISS is not installed") for name in MEASURED]
    if quick:
        vectors, queries = synthetic_vectors(3000, 32, 20, plain=False)
    else:
        vectors, queries = real_vectors(1_000_000, 200)
    note = f"{len(vectors):,} x {vectors.shape[1]}, FAISS {faiss.__version__}, one CPU thread"
    with tempfile.TemporaryDirectory() as folder:
        found = compare(list(MEASURED), on_disk(vectors, folder), queries, folder)
    return [search_row(name, found[name].speed, f"recall@10 {found[name].recall:.3f}; {note}") for name in MEASURED]


def search_row(name: str, ratio: float | None, note: str) -> dict:
    id, goal = ("6", ">= 100 at recall@10 >= .95") if name == "ivfpq" else ("6p", "peer")
    title = f"search by captions: FAISS flat / {name if name == LEVER else f'engine {name}'}"
    return row(id, title, ratio, goal, note)


def on_disk(vectors: np.ndarray, folder: str) -> np.ndarray:
    """The vectors mapped from a file, as in an index."""
    path = os.path.join(folder, "embeddings.npy")
    np.save(path, vectors)
    return np.load(path, mmap_mode="r")


def main() -> None:
    if faiss is None:
        raise ValueError("FAISS is not installed: pip install faiss-cpu.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, LEVER], default=[*ENGINES, LEVER])
    parser.add_argument("--synthetic", action="store_true", help="made vectors instead of a trained model's")
    parser.add_argument("--plain", action="store_true", help="made vectors without structure")
    args = parser.parse_args()
    if args.synthetic or args.plain:
        vectors, queries = synthetic_vectors(args.num, DIM, args.queries, args.plain)
    else:
        vectors, queries = real_vectors(args.num, args.queries)
    print(f"{args.num:,} vectors of {DIM}, {args.queries} queries, FAISS {faiss.__version__}", flush=True)
    print("| engine | recall@10 | times as fast as exact | memory | building, in exact queries |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, figures in compare(args.engines, on_disk(vectors, folder), queries, folder).items():
            print(
                f"| {name} | {figures.recall:.3f} | {figures.speed:.1f} | {figures.memory:.3f} | "
                f"{figures.building:,.0f} |"
            )


if __name__ == "__main__":
    main()
