"""Which queued keys count: the drift against a slow twin, the rule step by step, and why it is needed."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_cots.method.fresh_keys import SMOOTHING, FreshKeys, key_drift, mean_drift, pass_gradient
from modeling_cots.method.losses import momentum_contrastive_loss


def update(keys: FreshKeys, drift: float, num_pairs: int = 4, queue_size: int = 10) -> int:
    keys.update_(torch.tensor(drift), 0.1, num_pairs, queue_size)
    return int(keys.num_fresh)


def test_drift_equals_its_slow_twin():
    generator = torch.Generator().manual_seed(0)
    queued, fresh = (torch.randn(4, size, generator=generator) for size in (6, 3))
    of_queue, of_batch = (torch.rand(4, size, generator=generator) < 0.6 for size in (6, 3))
    of_queue[1], of_batch[2] = False, False  # two queries that have nothing to compare
    differences, variances = [], []
    for row in range(4):
        old = [value for value, counts in zip(queued[row].tolist(), of_queue[row].tolist(), strict=True) if counts]
        new = [value for value, counts in zip(fresh[row].tolist(), of_batch[row].tolist(), strict=True) if counts]
        if old and new:
            mean = math.fsum(new) / len(new)
            differences.append(mean - math.fsum(old) / len(old))
            variances.append(math.fsum((value - mean) ** 2 for value in new) / len(new))
    sums = key_drift(queued, fresh, of_queue, of_batch)
    assert sums.tolist() == pytest.approx([math.fsum(differences), math.fsum(variances), 2], rel=1e-5)
    deviation = math.sqrt(math.fsum(variances) / 2)
    expected = abs(math.fsum(differences) / 2) / min(1.0, deviation)
    assert mean_drift(sums).item() == pytest.approx(expected, rel=1e-5)


def test_drift_is_in_nats_or_in_deviations_of_logits_that_hardly_spread():
    assert mean_drift(torch.tensor([0.4, 50.0, 2.0])).item() == pytest.approx(0.2)  # deviation 5
    assert mean_drift(torch.tensor([0.4, 0.08, 2.0])).item() == pytest.approx(1.0)  # deviation 0.2
    assert mean_drift(torch.tensor([0.0, 0.0, 0.0])).isnan()
    assert mean_drift(torch.tensor([0.0, 0.0, 2.0])) == 0


def test_keys_become_more_by_a_batch_and_fewer_by_half():
    keys = FreshKeys()
    assert [update(keys, 0.01) for _ in range(4)] == [4, 8, 10, 10]
    assert update(keys, 2.0) == 5  # the smoothed drift is 0.209
    assert keys.drift.item() == pytest.approx(SMOOTHING * 0.01 + (1 - SMOOTHING) * 2.0, abs=1e-6)
    assert update(keys, 0.0) == 2  # still 0.188


def test_a_batch_with_nothing_to_compare_changes_nothing():
    keys = FreshKeys()
    assert update(keys, math.nan) == 0 and keys.drift.item() == -1
    update(keys, 0.02)
    assert update(keys, math.nan) == 4 and keys.drift.item() == pytest.approx(0.02)


def test_the_newest_keys_count_and_one_batch_more_is_measured():
    keys, age = FreshKeys(), torch.tensor([3, 2, 1, 0, 6, 5, 4])
    assert not keys.is_fresh(age).any()
    assert keys.is_measured(age, 2).tolist() == [False, False, True, True, False, False, False]
    update(keys, 0.0, num_pairs=3)
    assert keys.is_fresh(age).tolist() == [False, True, True, True, False, False, False]
    assert keys.is_measured(age, 2).tolist() == [True, True, True, True, False, False, True]


def test_keys_of_earlier_weights_push_all_queries_the_way_the_embeddings_have_moved():
    """The mechanism: the mean gradient is the displacement of the stale keys, and with fresh keys there is none."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(64, 16, generator=generator) * 0.3
    movement = F.normalize(torch.randn(16, generator=generator), dim=0)
    excluded = torch.eye(64, dtype=torch.bool)
    pushes = {}
    for name, candidates in {"fresh": keys, "stale": keys - 0.5 * movement}.items():
        queries = keys.clone().requires_grad_(True)
        logits = torch.cat([(queries * keys).sum(dim=1, keepdim=True), queries @ candidates.t()], dim=1)
        logits[:, 1:] = logits[:, 1:].masked_fill(excluded, -1e9)
        momentum_contrastive_loss(logits, torch.ones(64, dtype=torch.bool), 64).backward()
        step = -queries.grad.sum(dim=0)  # where a step of gradient descent takes the mean of the queries
        pushes[name] = torch.dot(step, movement).item()
    assert abs(pushes["fresh"]) < 0.02
    assert pushes["stale"] > 0.4


def test_keys_keep_their_values_and_pass_a_share_of_the_gradient():
    keys, embeds = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    passed = pass_gradient(keys, embeds, 0.25)
    assert torch.equal(passed, keys)
    passed.backward(torch.ones(3, 4))
    assert torch.equal(embeds.grad, torch.full((3, 4), 0.25))


def test_the_share_of_the_queue_that_counts():
    keys = FreshKeys()
    assert keys.share(10) == 0
    update(keys, 0.0)
    assert keys.share(10).item() == pytest.approx(0.4)
