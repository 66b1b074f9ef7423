"""The adaptive momentum filter against the statistics module, and what must not move its decisions."""

import statistics

import pytest
import torch

from modeling_cots.method.filtering import filter_threshold, keep_above, mixture_threshold


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
    assert keep_above(scores, threshold).tolist() == [False, True, True, False, True]


def test_decisions_do_not_depend_on_the_scale_and_place_of_the_scores(queue_scores):
    scores = torch.linspace(0, 0.8, 20)
    keep = keep_above(scores, filter_threshold(queue_scores, 2))
    moved = keep_above(scores * 0.5 - 0.3, filter_threshold(queue_scores * 0.5 - 0.3, 2))
    assert 0 < keep.sum() < 20
    assert torch.equal(keep, moved)


def test_a_larger_k_never_drops_more(queue_scores):
    scores = torch.linspace(-0.2, 0.8, 40)
    kept = [keep_above(scores, filter_threshold(queue_scores, k)) for k in (0, 1, 2, 3)]
    for fewer, more in zip(kept, kept[1:], strict=False):
        assert (more | ~fewer).all()
        assert more.sum() > fewer.sum()


@pytest.mark.parametrize("num_std", [0, 0.5, 2])
@pytest.mark.parametrize("size", [7, 300, 1444])
def test_equal_scores_are_all_kept(size, num_std):
    """A collapsed model scores every pair alike; a mean rounded up would drop every batch and training would stop."""
    for score in torch.rand(20, generator=torch.Generator().manual_seed(0)):
        threshold = filter_threshold(score.repeat(size), num_std)
        assert keep_above(score.expand(3), threshold).all()
        assert threshold == score


def test_a_diverged_model_is_not_hidden(queue_scores):
    """Scores that are NaN stay in the losses, which then are NaN too; dropped, they would make a loss of 0."""
    scores = torch.tensor([float("nan"), -1.0])
    assert keep_above(scores, filter_threshold(queue_scores, 2)).tolist() == [True, False]
    assert keep_above(scores, -torch.inf).tolist() == [True, True]


def test_statistics_of_half_precision_scores_are_taken_in_float32(queue_scores):
    half = queue_scores.to(torch.bfloat16)
    threshold = filter_threshold(half, 2)
    assert threshold.dtype == torch.float32
    assert threshold == filter_threshold(half.float(), 2)
    assert torch.equal(keep_above(half, threshold), half.float() >= threshold)


def make_scores(noise_share: float, size: int = 4_000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of pairs around 0.5 and of unrelated ones around 0, which of them are noise, and unrelated ones alone."""
    generator = torch.Generator().manual_seed(1)
    is_noise = torch.arange(size) < noise_share * size
    scores = torch.where(is_noise, 0.0, 0.5) + 0.12 * torch.randn(size, generator=generator)
    return scores, is_noise, 0.12 * torch.randn(size, generator=generator)


@pytest.mark.parametrize("noise_share", [0.05, 0.2, 0.4, 0.8])
def test_mixture_finds_the_noise_whatever_its_share(noise_share):
    scores, is_noise, unpaired = make_scores(noise_share)
    keep = keep_above(scores, mixture_threshold(scores, unpaired))
    assert keep[~is_noise].float().mean() > 0.95
    assert keep[is_noise].float().mean() < 0.15


def test_mixture_drops_next_to_nothing_where_there_is_no_noise():
    scores, _, unpaired = make_scores(0.0)
    assert keep_above(scores, mixture_threshold(scores, unpaired)).float().mean() > 0.998
    skewed = 0.5 - 0.1 * torch.empty(4_000).exponential_(generator=torch.Generator().manual_seed(2))
    kept = keep_above(skewed, mixture_threshold(skewed, unpaired)).float().mean()
    assert kept > max(0.95, keep_above(skewed, filter_threshold(skewed, 2)).float().mean())


def test_mixture_threshold_equals_a_slow_twin():
    """The threshold of EM in Python floats, one score at a time."""
    scores, _, unpaired = make_scores(0.3, size=300)
    values, noise = scores.double().tolist(), statistics.NormalDist.from_samples(unpaired.double().tolist())
    noise = statistics.NormalDist(noise.mean, statistics.pstdev(unpaired.double().tolist()))
    clean, share = statistics.NormalDist(sorted(values)[149], statistics.pstdev(values)), 0.5
    for _ in range(50):
        weights = [share * noise.pdf(v) / (share * noise.pdf(v) + (1 - share) * clean.pdf(v)) for v in values]
        share = statistics.fmean(weights)
        kept = [1 - weight for weight in weights]
        mean = sum(k * v for k, v in zip(kept, values, strict=True)) / sum(kept)
        variance = sum(k * (v - mean) ** 2 for k, v in zip(kept, values, strict=True)) / sum(kept)
        clean = statistics.NormalDist(mean, variance**0.5)
    low, high = noise.mean, clean.mean  # bisection: noise is likelier at the lower end
    for _ in range(60):
        middle = (low + high) / 2
        is_noise = share * noise.pdf(middle) > (1 - share) * clean.pdf(middle)
        low, high = (middle, high) if is_noise else (low, middle)
    assert mixture_threshold(scores, unpaired).item() == pytest.approx(low, abs=2e-3)


def test_mixture_keeps_all_where_pairs_score_as_unrelated_ones_do():
    """A model that knows nothing yet, one that has collapsed, and pairs below the unrelated ones."""
    _, _, unpaired = make_scores(0.0, size=500)
    for scores in (unpaired.roll(1), torch.full((500,), 0.3), unpaired - 0.5):
        other = torch.full((500,), 0.3) if scores.std() == 0 else unpaired
        assert keep_above(scores, mixture_threshold(scores, other)).float().mean() > 0.5
    assert keep_above(torch.full((3,), 0.3), mixture_threshold(torch.full((9,), 0.3), torch.full((9,), 0.3))).all()
