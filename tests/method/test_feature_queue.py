"""The paired queues against a deque, under any sequence of pushes."""

from collections import deque

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_cots.method.feature_queue import PairQueue
from modeling_cots.method.global_batch import GlobalBatch

D = 3


def pairs(first: int, count: int) -> tuple[torch.Tensor, ...]:
    """`count` pairs whose every entry tells their number, from `first`."""
    numbers = torch.arange(first, first + count)
    embeds = numbers.float().unsqueeze(1).expand(count, D)
    return embeds + 0.25, embeds + 0.5, numbers.float() + 0.75, numbers


def contents(queue: PairQueue) -> list[int]:
    """Numbers of the pairs in the queue, lowest (oldest) first; every buffer must tell the same."""
    ids = queue.pair_ids[queue.filled]
    assert torch.equal(queue.image_embeds[queue.filled], (ids.float() + 0.25).unsqueeze(1).expand(-1, D))
    assert torch.equal(queue.text_embeds[queue.filled], (ids.float() + 0.5).unsqueeze(1).expand(-1, D))
    assert torch.equal(queue.scores[queue.filled], ids.float() + 0.75)
    return sorted(ids.tolist())


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=8))
def test_any_sequence_of_pushes_equals_a_deque(size, batches):
    queue, twin, pushed = PairQueue(size, D), deque(maxlen=size), 0
    for count in batches:
        queue.push(*pairs(pushed, count))
        twin.extend(range(pushed, pushed + count))
        pushed += count
        assert contents(queue) == list(twin)
        assert queue.is_full == (len(twin) == size)
        assert queue.fill == len(twin) / size


def test_wraps_around_at_1444_by_48():
    """1444 mod 48 = 4: the 31st batch of the paper's fine-tuning lies across the end."""
    queue = PairQueue(1444, D)
    for step in range(31):
        queue.push(*pairs(48 * step, 48))
    assert contents(queue) == list(range(48 * 31 - 1444, 48 * 31))
    assert queue.pair_ids[1443] == 1443
    assert queue.pair_ids[0] == 1444
    for step in range(31, 100):
        queue.push(*pairs(48 * step, 48))
    assert contents(queue) == list(range(4800 - 1444, 4800))


def test_keeps_the_last_of_a_batch_larger_than_itself_where_single_pushes_would():
    one_by_one, at_once = PairQueue(5, D), PairQueue(5, D)
    for number in range(13):
        one_by_one.push(*pairs(number, 1))
    at_once.push(*pairs(0, 13))
    assert torch.equal(one_by_one.pair_ids, at_once.pair_ids)
    assert contents(at_once) == [8, 9, 10, 11, 12]


def test_holds_copies_outside_the_graph():
    queue = PairQueue(4, D)
    image_embeds = torch.ones(2, D, requires_grad=True)
    queue.push(image_embeds, image_embeds * 2, torch.ones(2), torch.arange(2))
    with torch.no_grad():
        image_embeds.fill_(9)
    assert not queue.image_embeds.requires_grad
    assert (queue.image_embeds[:2] == 1).all()


def test_state_round_trips_through_safetensors(tmp_path):
    queue = PairQueue(5, D)
    queue.push(*pairs(0, 7))
    counter = queue.get_extra_state()
    assert (counter.shape, counter.dtype, counter.item()) == ((), torch.int64, 7)
    safetensors.torch.save_file(queue.state_dict(), tmp_path / "queue.safetensors")
    restored = PairQueue(5, D)
    restored.load_state_dict(safetensors.torch.load_file(tmp_path / "queue.safetensors"))
    for one in (queue, restored):
        one.push(*pairs(7, 1))
    assert torch.equal(restored.pair_ids, queue.pair_ids)
    assert contents(restored) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("size", [0, -1])
def test_refuses_to_hold_nothing(size):
    with pytest.raises(ValueError, match="at least 1"):
        PairQueue(size, D)


def test_starts_empty_and_in_a_known_state():
    """Never uninitialized memory: what is not filled yet still meets the queries before it is masked out."""
    queue = PairQueue(4, D)
    assert not queue.filled.any() and not queue.is_full and queue.fill == 0
    for buffer in (queue.image_embeds, queue.text_embeds, queue.scores):
        assert (buffer == 0).all()
    queue.push(*pairs(0, 1))
    assert queue.filled.tolist() == [True, False, False, False]
    assert queue.fill == 0.25
    assert queue.pair_ids.tolist() == [0, -1, -1, -1]


def test_holds_half_precision_embeddings_in_float32():
    queue = PairQueue(2, D)
    image_embeds, text_embeds, scores, pair_ids = pairs(0, 1)
    queue.push(image_embeds.to(torch.bfloat16), text_embeds.to(torch.float16), scores.to(torch.bfloat16), pair_ids)
    assert queue.image_embeds.dtype == queue.text_embeds.dtype == queue.scores.dtype == torch.float32
    assert contents(queue) == [0]


def test_candidates_are_copies_to_which_a_batch_is_joined():
    queue = PairQueue(5, D)
    queue.push(*pairs(0, 3), torch.tensor([20, 21, 22]))
    images, texts, _, ids = pairs(7, 2)
    batch = GlobalBatch(images, texts, ids, ids + 20, torch.tensor([True, False]))
    queued = queue.candidates()
    both = queued.joined_with(batch)
    queue.push(*pairs(3, 5))  # in place, as it is after every batch
    for name, value in vars(queued).items():
        assert len(value) == 5 and torch.equal(getattr(both, name)[:5], value)
        assert torch.equal(getattr(both, name)[5:], getattr(batch, name))
    assert both.valid.tolist() == [True, True, True, False, False, True, False]
    kept = both[both.valid]
    assert kept.pair_ids.tolist() == [0, 1, 2, 7] and kept.caption_ids.tolist() == [20, 21, 22, 27]
    assert kept.image_embeds[:, 0].tolist() == [0.25, 1.25, 2.25, 7.25]
    assert kept.text_embeds[:, 0].tolist() == [0.5, 1.5, 2.5, 7.5]


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_age_counts_the_pairs_that_came_later(size, batches):
    queue, pushed = PairQueue(size, D), 0
    for count in batches:
        queue.push(*pairs(pushed, count))
        pushed += count
        ages = queue.age[queue.filled]
        assert ages.tolist() == [pushed - 1 - number for number in queue.pair_ids[queue.filled].tolist()]


def test_captions_that_nobody_numbered_are_equal_to_none():
    queue = PairQueue(3, D)
    queue.push(*pairs(0, 2))
    assert queue.caption_ids.tolist() == [-1, -1, -1]
