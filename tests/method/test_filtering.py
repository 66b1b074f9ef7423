"""The adaptive momentum filter against the statistics module, and what must not move its decisions."""

import statistics

import pytest
import torch

from modeling_cots.method.filtering import adaptive_momentum_filter, filter_threshold


@pytest.fixture
def queue_scores() -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4


def test_threshold_equals_a_slow_twin(queue_scores):
    values = queue_scores.double().tolist()
    expected = statistics.fmean(values) - 2 * statistics.pstdev(values)
    assert filter_threshold(queue_scores, 2).item() == pytest.approx(expected, rel=1e-5)


def test_drops_exactly_the_pairs_below_the_threshold(queue_scores):
    threshold = filter_threshold(queue_scores, 2)
    scores = torch.stack([threshold - 0.01, threshold, threshold + 0.01, torch.tensor(-1.0), torch.tensor(1.0)])
    keep, used = adaptive_momentum_filter(scores, queue_scores, 2)
    assert keep.tolist() == [False, True, True, False, True]
    assert used == threshold


def test_is_idle_until_the_queue_is_full():
    keep, threshold = adaptive_momentum_filter(torch.tensor([-1.0, 0.0, 1.0]), None, 2)
    assert keep.all()
    assert threshold == -torch.inf


def test_decisions_do_not_depend_on_the_scale_and_place_of_the_scores(queue_scores):
    scores = torch.linspace(0, 0.8, 20)
    keep, _ = adaptive_momentum_filter(scores, queue_scores, 2)
    moved, _ = adaptive_momentum_filter(scores * 0.5 - 0.3, queue_scores * 0.5 - 0.3, 2)
    assert 0 < keep.sum() < 20
    assert torch.equal(keep, moved)


def test_a_larger_k_never_drops_more(queue_scores):
    scores = torch.linspace(-0.2, 0.8, 40)
    kept = [adaptive_momentum_filter(scores, queue_scores, k)[0] for k in (0, 1, 2, 3)]
    for fewer, more in zip(kept, kept[1:], strict=False):
        assert (more | ~fewer).all()
        assert more.sum() > fewer.sum()


@pytest.mark.parametrize("num_std", [0, 0.5, 2])
@pytest.mark.parametrize("size", [7, 300, 1444])
def test_equal_scores_are_all_kept(size, num_std):
    """A collapsed model scores every pair alike; a mean rounded up would drop every batch and training would stop."""
    for score in torch.rand(20, generator=torch.Generator().manual_seed(0)):
        keep, threshold = adaptive_momentum_filter(score.expand(3), score.repeat(size), num_std)
        assert keep.all()
        assert threshold == score


def test_a_diverged_model_is_not_hidden(queue_scores):
    """Scores that are NaN stay in the losses, which then are NaN too; dropped, they would make a loss of 0."""
    scores = torch.tensor([float("nan"), -1.0])
    assert adaptive_momentum_filter(scores, queue_scores, 2)[0].tolist() == [True, False]
    assert adaptive_momentum_filter(scores, None, 2)[0].tolist() == [True, True]


def test_statistics_of_half_precision_scores_are_taken_in_float32(queue_scores):
    half = queue_scores.to(torch.bfloat16)
    keep, threshold = adaptive_momentum_filter(half, half, 2)
    assert threshold.dtype == torch.float32
    assert threshold == filter_threshold(half.float(), 2)
    assert torch.equal(keep, half.float() >= threshold)
