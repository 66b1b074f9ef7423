"""What is said of a run that learns nothing, and that nothing is said of one that learns."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_cots.evaluation.retrieval_metrics import retrieval_metrics
from modeling_cots.training.learning_watch import is_recall_chance, loss_warnings, recall_warning

CHANCE = 2 * math.log(1 + 100)
STEPS = 1_000


def line(step: int, share: float = 1.0, kl: float = 1e-5, grad_norm: float = 1.0) -> dict[str, float]:
    each = share * CHANCE / 2
    return {
        "step": step,
        "loss_i2t": each,
        "loss_t2i": each,
        "loss_kl": kl,
        "chance_loss": CHANCE,
        "grad_norm": grad_norm,
    }


def kinds_at(lines: list[dict]) -> list[set[str]]:
    """The kinds of warnings at each line of a run."""
    return [set(loss_warnings(lines[: number + 1], STEPS)) for number in range(len(lines))]


def test_flat_distributions_are_a_collapse_after_a_fifth_of_the_run():
    said = kinds_at([line(step) for step in range(50, 400, 50)])
    assert said == [set()] * 3 + [{"flat"}] * 4
    assert "collapsed" in loss_warnings([line(150), line(200)], STEPS)["flat"]


def test_a_run_with_few_lines_of_logs_is_watched_too():
    """Two lines are enough, the first of them from the beginning of the run."""
    assert kinds_at([line(10), line(900)]) == [set(), {"flat"}]


def test_losses_at_chance_for_a_quarter_of_the_run_are_no_learning():
    said = kinds_at([line(step, kl=0.1) for step in range(50, 600, 50)])
    assert said == [set()] * 6 + [{"chance"}] * 5
    late = [line(step, share=0.9, kl=0.1) for step in range(50, 500, 50)]
    assert kinds_at([*late, line(550, kl=0.1), line(600, kl=0.1)])[-1] == set()  # not for a quarter yet


@pytest.mark.parametrize("share", [0.9, 0.5, 0.05])
def test_nothing_is_said_of_losses_below_chance(share):
    assert kinds_at([line(step, share=share) for step in range(50, 1_001, 50)]) == [set()] * 20


def test_a_gradient_of_nothing_is_said_whatever_the_loss_is():
    lines = [line(50, share=0.5), line(100, share=0.5, grad_norm=1e-9), line(150, share=0.5, grad_norm=0.0)]
    assert kinds_at(lines) == [set(), set(), {"gradient"}]
    assert kinds_at([{**each, "grad_norm": 0.1} for each in lines])[-1] == set()
    del lines[1]["grad_norm"]  # a run that clips no gradients logs no norm
    assert kinds_at(lines)[-1] == set()


def measured(embeds: torch.Tensor, texts: torch.Tensor, captions: int) -> dict[str, float]:
    ids = torch.arange(len(embeds))
    return retrieval_metrics(
        F.normalize(embeds, dim=1), F.normalize(texts, dim=1), ids, ids.repeat_interleave(captions)
    )


@pytest.mark.parametrize(("num_images", "captions"), [(20, 1), (200, 1), (200, 5), (1_000, 5)])
def test_random_embeddings_are_at_chance_and_weakly_related_ones_are_not(num_images, captions):
    generator = torch.Generator().manual_seed(num_images + captions)
    at_chance = 0
    for _ in range(20):
        images = torch.randn(num_images, 16, generator=generator)
        texts = torch.randn(num_images * captions, 16, generator=generator)
        at_chance += is_recall_chance(measured(images, texts, captions), num_images, num_images * captions)
    assert at_chance >= 19
    related = texts + images.repeat_interleave(captions, dim=0)
    assert is_recall_chance(measured(images, related, captions), num_images, num_images * captions) is False


def test_equal_embeddings_are_at_chance():
    assert is_recall_chance(measured(torch.ones(50, 4), torch.ones(50, 4), 1), 50, 50) is True


def test_a_handful_of_images_tells_nothing():
    assert is_recall_chance({}, 19, 19) is None


def test_the_sentence_says_what_the_losses_make_of_it():
    metrics = {"t2i_recall_at_10": 5.0, "i2t_recall_at_10": 4.5}
    assert "keys of earlier steps" in recall_warning(metrics, 200, line(100, share=0.5))
    assert "learned nothing" in recall_warning(metrics, 200, line(100))
    assert "learned nothing" in recall_warning(metrics, 200, None)
    assert "after a tenth of the run" in recall_warning(metrics, 200, line(100), is_early=True)
