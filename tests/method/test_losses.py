"""The four losses against slow twins in float64, one number at a time, and the properties that the method rests on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_cots.method.global_batch import GlobalBatch
from modeling_cots.method.losses import (
    EXCLUDED_LOGIT,
    excluded_candidates,
    masked_token_loss,
    momentum_contrastive_loss,
    queue_logits,
    task_kl_loss,
)

B, C, D = 5, 11, 8
TEMPERATURE = 0.05


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Embeddings of 5 pairs and 11 candidates, the last three of which are not filled yet."""
    return {
        "image_embeds": unit(B, D, seed=1),
        "text_embeds": unit(B, D, seed=2),
        "momentum_image_embeds": unit(B, D, seed=3),
        "momentum_text_embeds": unit(B, D, seed=4),
        "image_queue": unit(C, D, seed=5),
        "text_queue": unit(C, D, seed=6),
        "pair_ids": torch.arange(B),
        "caption_ids": torch.tensor([50, 51, 52, 53, -1]),
        "queue_ids": torch.tensor([7, 8, 1, 9, 10, 4, 4, 11, -1, -1, -1]),
        "queue_caption_ids": torch.tensor([60, 50, 61, 62, 53, 63, 64, -1, -1, -1, -1]),
        "filled": torch.arange(C) < 8,
        "keep": torch.tensor([True, True, False, True, True]),
    }


def pairs_of(batch: dict) -> GlobalBatch:
    keys = batch["momentum_image_embeds"], batch["momentum_text_embeds"]
    return GlobalBatch(*keys, batch["pair_ids"], batch["caption_ids"], torch.ones(B, dtype=torch.bool))


def queue_of(batch: dict) -> GlobalBatch:
    keys = batch["image_queue"], batch["text_queue"]
    return GlobalBatch(*keys, batch["queue_ids"], batch["queue_caption_ids"], batch["filled"])


def rows(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    excluded = excluded_candidates(pairs_of(batch), queue_of(batch))
    i2t = queue_logits(
        batch["image_embeds"], batch["momentum_text_embeds"], batch["text_queue"], excluded, TEMPERATURE
    )
    t2i = queue_logits(
        batch["text_embeds"], batch["momentum_image_embeds"], batch["image_queue"], excluded, TEMPERATURE
    )
    return i2t, t2i


def slow_row(query, positive, queue, allowed) -> dict[int, float]:
    """Probability of every candidate that counts; key -1 is the pair itself."""
    scores = {-1: math.fsum((query * positive).tolist()) / TEMPERATURE}
    for j in allowed:
        scores[j] = math.fsum((query * queue[j]).tolist()) / TEMPERATURE
    total = math.fsum(math.exp(score) for score in scores.values())
    return {j: math.exp(score) / total for j, score in scores.items()}


def slow_rows(batch: dict, i: int) -> tuple[dict[int, float], dict[int, float]]:
    b = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    allowed = [
        j
        for j in range(C)
        if b["filled"][j]
        and b["queue_ids"][j] != b["pair_ids"][i]
        and (b["queue_caption_ids"][j] != b["caption_ids"][i] or b["caption_ids"][i] == -1)
    ]
    p = slow_row(b["image_embeds"][i], b["momentum_text_embeds"][i], b["text_queue"], allowed)
    q = slow_row(b["text_embeds"][i], b["momentum_image_embeds"][i], b["image_queue"], allowed)
    return p, q


def test_contrastive_and_kl_losses_equal_their_slow_twins(batch):
    i2t, t2i = rows(batch)
    expected = {"i2t": [], "t2i": [], "kl": []}
    for i in batch["keep"].nonzero().flatten().tolist():
        p, q = slow_rows(batch, i)
        expected["i2t"].append(-math.log(p[-1]))
        expected["t2i"].append(-math.log(q[-1]))
        kl_qp = math.fsum(q[j] * math.log(q[j] / p[j]) for j in p)
        kl_pq = math.fsum(p[j] * math.log(p[j] / q[j]) for j in p)
        expected["kl"].append(kl_qp + kl_pq)
    expected = {name: math.fsum(values) / len(values) for name, values in expected.items()}
    keep = batch["keep"]
    assert momentum_contrastive_loss(i2t, keep, keep.sum()).item() == pytest.approx(expected["i2t"], rel=1e-5)
    assert momentum_contrastive_loss(t2i, keep, keep.sum()).item() == pytest.approx(expected["t2i"], rel=1e-5)
    assert task_kl_loss(i2t, t2i, keep, keep.sum()).item() == pytest.approx(expected["kl"], rel=1e-5)


def test_unfilled_entries_never_count(batch):
    batch["image_embeds"].requires_grad_(True)
    results = []
    for filler in (0.0, 1.0, 100.0):
        for queue in ("image_queue", "text_queue"):
            batch[queue][8:] = filler
        i2t, t2i = rows(batch)
        loss = momentum_contrastive_loss(i2t, batch["keep"], 4) + task_kl_loss(i2t, t2i, batch["keep"], 4)
        (gradient,) = torch.autograd.grad(loss, batch["image_embeds"])
        results.append((loss.detach(), gradient))
    assert torch.isfinite(results[0][1]).all()
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=0)


def test_other_captions_of_the_same_image_are_no_negatives(batch):
    excluded = excluded_candidates(pairs_of(batch), queue_of(batch), equal_captions=False)
    assert excluded[1].nonzero().flatten().tolist() == [2, 8, 9, 10]
    assert excluded[4].nonzero().flatten().tolist() == [5, 6, 8, 9, 10]
    for temperature in (TEMPERATURE, 100.0):
        logits = queue_logits(
            batch["image_embeds"], batch["momentum_text_embeds"], batch["text_queue"], excluded, temperature
        )
        probabilities = logits.softmax(dim=1)[:, 1:]
        assert (probabilities[excluded] == 0).all()
        assert (probabilities[~excluded] > 0).all()


def test_pairs_with_equal_captions_are_no_negatives(batch):
    excluded = excluded_candidates(pairs_of(batch), queue_of(batch))
    assert excluded[0].nonzero().flatten().tolist() == [1, 8, 9, 10]  # caption 50 is queued with another image
    assert excluded[3].nonzero().flatten().tolist() == [4, 8, 9, 10]
    assert excluded[1].nonzero().flatten().tolist() == [2, 8, 9, 10]  # its own image alone
    assert not excluded[4][7]  # a caption that nobody numbered is equal to none, not even to another such
    for name in ("i2t", "t2i"):
        logits = dict(zip(("i2t", "t2i"), rows(batch), strict=True))[name]
        assert logits.softmax(dim=1)[0, 2] == 0  # in both directions, and so in KL, which takes the same logits


def test_kl_is_zero_on_equal_rows_symmetric_and_never_negative(batch):
    i2t, t2i = rows(batch)
    keep = batch["keep"]
    assert task_kl_loss(i2t, i2t, keep, 4).item() == 0
    # The same class probabilities, from logits that differ by a constant a row.
    assert task_kl_loss(i2t, i2t + torch.arange(B).unsqueeze(1), keep, 4).item() == pytest.approx(0, abs=1e-5)
    forward, backward = task_kl_loss(i2t, t2i, keep, 4), task_kl_loss(t2i, i2t, keep, 4)
    assert forward.item() == pytest.approx(backward.item(), rel=1e-6)
    assert forward > 0.1


def test_kl_gradient_moves_both_directions_and_equals_its_closed_form(batch):
    """With p the softmax of row a: d L / d a_k = p_k (log p_k - log q_k - KL(p || q)) + p_k - q_k, and likewise q."""
    both = [row.detach().requires_grad_(True) for row in rows(batch)]
    task_kl_loss(*both, batch["keep"], 4).backward()
    for row, other in (both, both[::-1]):
        p, q = row.detach().double().softmax(dim=1), other.detach().double().softmax(dim=1)
        ratio = torch.where(p > 0, p / q, 1.0).log()
        divergence = (p * ratio).sum(dim=1, keepdim=True)
        expected = (p * (ratio - divergence) + p - q) / 4
        expected[~batch["keep"]] = 0
        torch.testing.assert_close(row.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_filtered_pairs_get_no_gradient(batch):
    batch["image_embeds"].requires_grad_(True)
    i2t, t2i = rows(batch)
    (momentum_contrastive_loss(i2t, batch["keep"], 4) + task_kl_loss(i2t, t2i, batch["keep"], 4)).backward()
    has_gradient = batch["image_embeds"].grad.abs().sum(dim=1) > 0
    assert torch.equal(has_gradient, batch["keep"])


def test_nothing_kept_is_zero_and_not_nan(batch):
    batch["image_embeds"].requires_grad_(True)
    i2t, t2i = rows(batch)
    none = torch.zeros(B, dtype=torch.bool)
    loss = momentum_contrastive_loss(i2t, none, none.sum()) + task_kl_loss(i2t, t2i, none, none.sum())
    loss.backward()
    assert loss.item() == 0
    assert batch["image_embeds"].grad.abs().sum() == 0
    assert masked_token_loss(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), none[:0], 0).item() == 0


@pytest.mark.parametrize("num_processes", [2, 3])
def test_mean_of_the_processes_is_the_mean_over_all_pairs(batch, num_processes):
    """However unevenly the kept pairs lie: dividing by the global count over the number of processes makes it so."""
    i2t, _ = rows(batch)
    keep = batch["keep"]
    whole = momentum_contrastive_loss(i2t, keep, keep.sum())
    shares = [
        momentum_contrastive_loss(i2t[r::num_processes], keep[r::num_processes], keep.sum() / num_processes)
        for r in range(num_processes)
    ]
    assert torch.stack(shares).mean().item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_single_pair_kept_by_all_processes_counts_as_one(batch):
    """Then each process divides by less than 1."""
    i2t, _ = rows(batch)
    keep = torch.arange(B) == 3
    whole = momentum_contrastive_loss(i2t, keep, 1)
    shares = [momentum_contrastive_loss(i2t[r::2], keep[r::2], keep.sum() / 2) for r in range(2)]
    assert torch.stack(shares).mean().item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("queue_size", [1444, 12_800])
def test_chance_level_at_initialization(queue_size):
    """A model that tells nothing apart gives flat rows: ln(1 + N_Q), 7.276 and 9.457."""
    same = unit(1, D).expand(queue_size, D)
    logits = queue_logits(same[:4], same[:4], same, torch.zeros(4, queue_size, dtype=torch.bool), TEMPERATURE)
    loss = momentum_contrastive_loss(logits, torch.ones(4, dtype=torch.bool), 4)
    assert loss.item() == pytest.approx(math.log(1 + queue_size), abs=1e-3)


def test_token_loss_equals_a_loop_and_its_chance_level():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 13, generator=generator)
    targets = torch.tensor([0, 3, 12, 5, 5, 1])
    keep = torch.tensor([True, False, True, True, False, True])
    expected = [
        -math.log(math.exp(logits[m, targets[m]].double()) / math.fsum(math.exp(x) for x in logits[m].double()))
        for m in range(6)
        if keep[m]
    ]
    loss = masked_token_loss(logits, targets, keep, keep.sum())
    assert loss.item() == pytest.approx(math.fsum(expected) / 4, rel=1e-5)
    for vocab_size in (8192, 30_522):
        flat = masked_token_loss(torch.zeros(2, vocab_size), torch.tensor([0, 1]), keep[2:4], 2)
        assert flat.item() == pytest.approx(math.log(vocab_size), rel=1e-6)


def test_everything_stays_in_float32_under_autocast(batch):
    i2t, t2i = rows(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_i2t, autocast_t2i = rows(batch)
        loss = momentum_contrastive_loss(autocast_i2t, batch["keep"], 4)
        kl = task_kl_loss(autocast_i2t, autocast_t2i, batch["keep"], 4)
    assert autocast_i2t.dtype == loss.dtype == kl.dtype == torch.float32
    torch.testing.assert_close(autocast_i2t, i2t, rtol=0, atol=0)
    torch.testing.assert_close(kl, task_kl_loss(i2t, t2i, batch["keep"], 4), rtol=0, atol=0)


def test_contrastive_gradient_equals_its_closed_form(batch):
    """d L_I2T / d f_i = (sum_j p_ij k_j - k_i0) / (tau * number kept): a pull to the pair, a push from the rest."""
    batch["image_embeds"].requires_grad_(True)
    i2t, _ = rows(batch)
    momentum_contrastive_loss(i2t, batch["keep"], 4).backward()
    gradient = batch["image_embeds"].grad
    batch["image_embeds"] = batch["image_embeds"].detach()
    for i in batch["keep"].nonzero().flatten().tolist():
        p, _ = slow_rows(batch, i)
        own = batch["momentum_text_embeds"][i].double()
        expected = (p.pop(-1) - 1) * own
        for j, probability in p.items():
            expected = expected + probability * batch["text_queue"][j].double()
        torch.testing.assert_close(gradient[i].double(), expected / (4 * TEMPERATURE), rtol=1e-4, atol=1e-6)


def test_an_empty_queue_asks_nothing(batch):
    """Before the first push the pair is its only candidate: both losses are 0, and so is the gradient."""
    batch["filled"] = torch.zeros(C, dtype=torch.bool)
    batch["image_embeds"].requires_grad_(True)
    i2t, t2i = rows(batch)
    loss = momentum_contrastive_loss(i2t, batch["keep"], 4) + task_kl_loss(i2t, t2i, batch["keep"], 4)
    loss.backward()
    assert loss.item() == 0
    assert (batch["image_embeds"].grad == 0).all()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.01, 0.05, 1.0]),
    num_excluded=st.integers(0, 6),
)
def test_kl_of_any_rows_is_never_negative_and_its_gradient_finite(seed, temperature, num_excluded):
    """With similarities from -1 to 1 at temperature 0.01 most probabilities are 0 in float32."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.rand(2, 3, 7, generator=generator) * 2 - 1) / temperature
    logits[:, :, 7 - num_excluded :] = EXCLUDED_LOGIT
    i2t, t2i = logits.requires_grad_(True)
    keep = torch.ones(3, dtype=torch.bool)
    kl = task_kl_loss(i2t, t2i, keep, 3)
    (gradient,) = torch.autograd.grad(kl, logits)
    assert kl >= 0
    assert torch.isfinite(gradient).all()
    assert (gradient[:, :, 7 - num_excluded :] == 0).all()


def test_random_embeddings_start_near_chance():
    """Random unit vectors of 256 have similarities of standard deviation 1/16. At temperature 1 the spread of the
    candidates lifts the loss by (1/16)^2 / 2 = 0.002, and the mean of 64 pairs' own similarities has a standard
    error of 1/16 / 8 = 0.008: four of these are the tolerance."""
    logits = queue_logits(
        unit(64, 256, seed=1),
        unit(64, 256, seed=2),
        unit(1444, 256, seed=3),
        torch.zeros(64, 1444, dtype=torch.bool),
        temperature=1.0,
    )
    loss = momentum_contrastive_loss(logits, torch.ones(64, dtype=torch.bool), 64)
    assert loss.item() == pytest.approx(math.log(1 + 1444), abs=0.03)


def test_token_loss_of_half_precision_logits_is_taken_in_float32():
    """Heads give bfloat16 logits; the logarithm of a sum over 30,522 needs more than its 8 bits."""
    logits = torch.randn(4, 30_522, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets, keep = torch.arange(4), torch.tensor([True, True, False, True])
    expected = F.cross_entropy(logits.double()[keep], targets[keep])
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = masked_token_loss(logits, targets, keep, 3)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_half_precision_embeddings_are_compared_in_float32(batch):
    """A similarity rounded to bfloat16 and divided by 0.05 would be off by up to 0.08."""
    half = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in batch.items()}
    exact = {name: value.float() if value.is_floating_point() else value for name, value in half.items()}
    for got, expected in zip(rows(half), rows(exact), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
