"""Other approximate indexes beside ours in `search.py`: FAISS' own, usearch's HNSW, the graph of Intel's SVS.

Each peer holds what it searches in memory, and has one setting that trades recall for speed. Graphs take minutes to
build, so that they are kept in the folder of the vectors and read again. Peers are built in all threads, and searched
in one.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import optional

faiss, usearch, svs = optional("faiss"), optional("usearch.index"), optional("svs")

REFINED = "IVF1024,PQ128x4fsr,RFlat"  # 4-bit codes of residuals; rescores from vectors held in memory
LINKS, BUILD = 32, 100  # of HNSW: links of a node in each layer but the lowest, which has twice as many
# Candidates kept on the way through a graph: 10 to 1,024, each an eighth to a fifth more than the one before.
GRAPH_SETTINGS = (10, *(2**power * part // 8 for power in range(4, 10) for part in range(8, 16)), 1024)
REFINED_SETTINGS = [(nprobe, factor) for factor in (10, 20, 40) for nprobe in (4, 8, 12, 16, 20, 24, 32, 48, 64)]


@dataclass
class Peer:
    """
    One index of another library.

    Args:
        settings: What is tried, cheapest first where there is one order.
        search: Takes a query (1, d), the number of results and a setting; returns their positions.
        num_bytes: What it keeps in memory.
        name: The library's name of the setting.
    """

    settings: list
    search: Callable[[np.ndarray, int, Any], np.ndarray]
    num_bytes: int
    name: str


def refined(stored: np.ndarray, path: Path) -> Peer:
    """FAISS' inverted lists of 4-bit codes, and its own refinement; settings are nprobe and candidates a result."""
    dim = stored.shape[1]
    if not path.exists():
        num_lists = max(1, min(1024, len(stored) // 39))
        name = REFINED.replace("1024", str(num_lists)).replace("128", str(dim // 2))
        index = faiss.index_factory(dim, name, faiss.METRIC_INNER_PRODUCT)
        index.train(np.ascontiguousarray(stored[:: max(1, len(stored) // 250_000)]))
        _write(index, stored, path)
    index = faiss.read_index(str(path))

    def search(query: np.ndarray, top: int, setting: tuple[int, int]) -> np.ndarray:
        base = faiss.SearchParametersIVF(nprobe=setting[0])
        parameters = faiss.IndexRefineSearchParameters(k_factor=setting[1], base_index_params=base)
        return index.search(query, top, params=parameters)[1][0]

    return Peer(REFINED_SETTINGS, search, path.stat().st_size, "nprobe and candidates a result")


def faiss_hnsw(stored: np.ndarray, path: Path) -> Peer:
    """FAISS' HNSW over float32; the setting is efSearch."""
    if not path.exists():
        index = faiss.IndexHNSWFlat(stored.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD
        _write(index, stored, path)
    index = faiss.read_index(str(path))

    def search(query: np.ndarray, top: int, setting: int) -> np.ndarray:
        return index.search(query, top, params=faiss.SearchParametersHNSW(efSearch=setting))[1][0]

    return Peer(list(GRAPH_SETTINGS), search, path.stat().st_size, "efSearch")


def usearch_hnsw(stored: np.ndarray, path: Path) -> Peer:
    """The HNSW of usearch over float16; the setting is its expansion."""
    if not path.exists():
        index = usearch.Index(ndim=stored.shape[1], metric="ip", dtype="f16", connectivity=LINKS, expansion_add=BUILD)
        index.add(np.arange(len(stored)), np.asarray(stored), threads=_num_threads())
        index.save(str(path))
    index = usearch.Index.restore(str(path))

    def search(query: np.ndarray, top: int, setting: int) -> np.ndarray:
        index.expansion_search = setting
        return index.search(query[0], top, threads=1).keys

    return Peer(list(GRAPH_SETTINGS), search, path.stat().st_size, "expansion")


def svs_vamana(stored: np.ndarray, path: Path) -> Peer:
    """The graph of Intel's SVS over float16; its compression LVQ runs on Intel's processors alone."""
    folders = [path / name for name in ("config", "graph", "data")]
    if not path.exists():
        parameters = svs.VamanaBuildParameters(alpha=0.95, graph_max_degree=2 * LINKS, window_size=BUILD)
        vectors = np.asarray(stored).astype(np.float16)
        index = svs.Vamana.build(parameters, vectors, svs.DistanceType.MIP, num_threads=_num_threads())
        partial = path.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        index.save(*(str(partial / folder.name) for folder in folders))
        partial.rename(path)
    config, graph, data = map(str, folders)
    loader = svs.VectorDataLoader(data, svs.DataType.float16, dims=stored.shape[1])
    index = svs.Vamana(config, svs.GraphLoader(graph), loader, svs.DistanceType.MIP, num_threads=1)

    def search(query: np.ndarray, top: int, setting: int) -> np.ndarray:
        index.search_window_size = max(setting, top)
        return index.search(query, top)[0][0]

    num_bytes = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return Peer(list(GRAPH_SETTINGS), search, num_bytes, "search window")


# The title of a row: the library, its package, and how it is built in a file or folder of this name.
PEERS = {
    REFINED: (faiss, "faiss-cpu", refined, "refined.faiss"),
    "HNSW of FAISS": (faiss, "faiss-cpu", faiss_hnsw, "hnsw.faiss"),
    "HNSW of usearch, float16": (usearch, "usearch", usearch_hnsw, "usearch.index"),
    "Vamana of Intel SVS, float16": (svs, "scalable-vs", svs_vamana, "svs"),
}


def _write(index, stored: np.ndarray, path: Path) -> None:
    faiss.omp_set_num_threads(_num_threads())
    for start in range(0, len(stored), 50_000):
        index.add(np.ascontiguousarray(stored[start : start + 50_000]))
    faiss.omp_set_num_threads(1)
    partial = path.with_suffix(".partial")
    faiss.write_index(index, str(partial))
    partial.rename(path)


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))
