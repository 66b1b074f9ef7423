"""Choose what a search with codes costs: the cheapest nprobe and number of candidates that reach a target of recall.

Every nprobe needs some number of candidates for the target, or never reaches it; of these pairs the fastest one wins.
Recall is the share of the ten best vectors, by their exact scores, that a search returns among its ten.
"""

import math
import statistics
import time
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .faiss_vectors import FaissVectors
from .index_types import TUNED_TOP, SearchEffort

KEPT = 100  # nearest vectors of a query that are looked at, for those whose scores equal the tenth best
SAME_SCORE = 1e-6  # scores of copies differ by rounding
MAX_CANDIDATES = 2_000  # more are tried only where no nprobe reaches the target with these
TOO_SLOW = 1.5  # times the fastest pair's cost, from where a larger nprobe is not tried
ROWS_PER_STEP = 16_384


class Tuned(NamedTuple):
    """The chosen effort, and its recall on the sample."""

    effort: SearchEffort
    recall: float


class Sample(NamedTuple):
    """
    The queries that a choice is made for.

    Args:
        queries: (Q, d) float32 of unit length.
        own: (Q,) positions of the queries themselves among the vectors, which are not to be found; -1 for others.
    """

    queries: np.ndarray
    own: np.ndarray


def choose_effort(vectors: FaissVectors, sample: Sample, allowed: np.ndarray, target: float) -> Tuned:
    """
    The cheapest nprobe and number of candidates by which the sample reaches the target.

    Args:
        vectors: An index of codes.
        sample: Queries as users ask them.
        allowed: (N,) boolean, the rows that may be found.
        target: Share of the ten best that are to be found, above 0 and at most 1.
    """
    nearest = nearest_of(vectors, sample, allowed)
    num_allowed = int(np.count_nonzero(allowed))
    mask = None if num_allowed == len(allowed) else allowed
    best: Tuned | None = None
    least = math.inf
    for nprobe in tqdm(nprobes_of(vectors), desc="Choosing nprobe and candidates", unit="nprobe", leave=False):
        effort = _enough_candidates(vectors, sample, nearest, mask, nprobe, min(MAX_CANDIDATES, num_allowed), target)
        if effort is None:
            continue
        seconds = _seconds_of(vectors, sample, mask, effort.effort)
        if seconds < least:
            best, least = effort, seconds
        elif seconds > TOO_SLOW * least:
            break
    if best is None:  # all lists, and as many candidates as it takes; all of them are exact
        best = _enough_candidates(vectors, sample, nearest, mask, nprobes_of(vectors)[-1], num_allowed, target)
    assert best is not None
    return best


def nprobes_of(vectors: FaissVectors) -> list[int]:
    """What is tried: 1, 2, 3, 4, 6, 8, 12, ... and all lists; [0] for codes without lists."""
    num_lists = vectors.num_lists
    if num_lists == 0:
        return [0]
    steps = {round(2**power * part) for power in range(num_lists.bit_length()) for part in (1, 1.5)}
    return [*sorted(step for step in steps if step < num_lists), num_lists]


def nearest_of(vectors: FaissVectors, sample: Sample, allowed: np.ndarray) -> list[np.ndarray]:
    """For each query the positions of the ten vectors with the best exact scores, and of those that equal the last."""
    scores = np.zeros((len(sample.queries), 0), np.float32)
    positions = np.zeros((len(sample.queries), 0), np.int64)
    for start in range(0, len(allowed), ROWS_PER_STEP):
        inside = np.arange(start, min(start + ROWS_PER_STEP, len(allowed)))
        new = sample.queries @ vectors.fetch(slice(start, start + len(inside))).T
        new[:, ~allowed[inside]] = -np.inf
        new[sample.own[:, None] == inside] = -np.inf
        scores = np.concatenate([scores, new], axis=1)
        positions = np.concatenate([positions, np.broadcast_to(inside, new.shape)], axis=1)
        if scores.shape[1] > KEPT:
            kept = np.argpartition(-scores, KEPT - 1, axis=1)[:, :KEPT]
            scores, positions = (np.take_along_axis(each, kept, axis=1) for each in (scores, positions))
    last = -np.sort(-scores, axis=1)[:, min(TUNED_TOP, scores.shape[1]) - 1, None]
    is_near = (scores >= last - SAME_SCORE) & np.isfinite(scores)
    return [row[near] for row, near in zip(positions, is_near, strict=True)]


def _enough_candidates(
    vectors: FaissVectors, sample: Sample, nearest: list[np.ndarray], allowed, nprobe: int, most: int, target: float
) -> Tuned | None:
    """The fewest candidates, at most `most`, by which this nprobe reaches the target; `None` if it does not."""
    ranks = _ranks(vectors, sample, nearest, allowed, nprobe, most)
    needed = ranks[max(math.ceil(target * len(ranks) - 1e-9), 1) - 1]
    if needed == math.inf:
        return None
    candidates = max(int(needed) + 1, TUNED_TOP)
    while True:  # codes of equal scores come in another order where fewer are asked for
        ranks = _ranks(vectors, sample, nearest, allowed, nprobe, candidates)
        recall = sum(rank < math.inf for rank in ranks) / len(ranks)
        if recall >= target - 1e-9 or candidates >= most:
            return Tuned(SearchEffort(nprobe, candidates), recall)
        candidates = min(candidates + max(1, candidates // 20), most)


def _ranks(
    vectors: FaissVectors, sample: Sample, nearest: list[np.ndarray], allowed, nprobe: int, num: int
) -> list[float]:
    """The places of all nearest vectors among so many candidates, in order; infinite where they are not proposed."""
    ranks: list[float] = []
    for query, near in zip(sample.queries, nearest, strict=True):
        (found,) = vectors.propose(query[None], num, allowed, nprobe)
        hits = np.flatnonzero(np.isin(found, near))[:TUNED_TOP].tolist()
        ranks += hits + [math.inf] * (min(TUNED_TOP, len(near)) - len(hits))
    return sorted(ranks)


def _seconds_of(vectors: FaissVectors, sample: Sample, allowed: np.ndarray | None, effort: SearchEffort) -> float:
    """The median processor time of a query."""
    tuned = vectors.over(vectors.fetch, effort)
    seconds = []
    for query in sample.queries:
        begin = time.process_time()
        tuned.search_codes(query[None], TUNED_TOP, allowed)
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)
