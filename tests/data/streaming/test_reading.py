"""Going on in a stream: the samples that would have come, from any place, and without reading what was read before."""

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_files import write_shards

from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.data.streaming.reading import Consumer, EndlessReader, PassReader, split_shards


@given(
    num_shards=st.integers(1, 12),
    samples=st.integers(0, 7),
    num_consumers=st.integers(1, 9),
)
@settings(deadline=None)
def test_consumers_share_everything_and_nothing_twice(num_shards, samples, num_consumers):
    taken = [
        (shard, sample)
        for consumer in range(num_consumers)
        for shard, part, num_parts in split_shards(list(range(num_shards)), consumer, num_consumers)
        for sample in range(part, samples, num_parts)
    ]
    assert Counter(taken) == Counter(itertools.product(range(num_shards), range(samples)))


def twin(samples: list[int], buffer_size: int, rng: random.Random) -> list[int]:
    """The shuffle as one would write it without a state."""
    waiting, drawn = [], []
    for sample in samples:
        if len(waiting) < buffer_size:
            waiting.append(sample)
        elif buffer_size == 0:
            drawn.append(sample)
        else:
            place = rng.randrange(buffer_size)
            drawn.append(waiting[place])
            waiting[place] = sample
    rng.shuffle(waiting)
    return drawn + waiting


@pytest.mark.parametrize("buffer_size", [0, 1, 3, 50])
def test_a_pass_is_shuffled_as_its_twin_is(tmp_path, buffer_size):
    write_shards(tmp_path, [7, 5, 4])
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=buffer_size, seed=3)
    firsts, sizes = [0, 7, 12], [7, 5, 4]
    read = [number for shard in pairs.shard_order(2) for number in range(firsts[shard], firsts[shard] + sizes[shard])]
    got = [int(sample.captions[0].split()[-1]) for sample in PassReader(pairs, 2, Consumer(0, 1))]
    assert got == twin(read, buffer_size, random.Random("3/2/0"))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stopped_at=st.integers(0, 60),
    buffer_size=st.integers(0, 9),
    consumer=st.sampled_from([(0, 1), (1, 2), (2, 3), (4, 7)]),
)
def test_from_any_place_comes_what_would_have_come(tmp_path, stopped_at, buffer_size, consumer):
    """Passes of 17 samples, shared by up to 7 consumers, with a shard that breaks and a row without a caption."""
    if not (tmp_path / "train-000.tar").exists():
        for path, cut in zip(write_shards(tmp_path, [6, 5, 4, 9]), (0, 700, 0, 1500), strict=True):
            path.write_bytes(path.read_bytes()[: -cut or None].replace(b"caption 3", b"\xff" * 9))
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=buffer_size, seed=1)
    reader = EndlessReader(pairs, Consumer(*consumer))
    for _ in range(stopped_at):
        next(reader)
    state = json.loads(json.dumps(reader.state_dict()))
    expected = list(itertools.islice(reader, 40))
    other = EndlessReader(
        open_stream(str(tmp_path), "train", shuffle_buffer=buffer_size, seed=1), Consumer(*consumer), state
    )
    assert list(itertools.islice(other, 40)) == expected
    assert other.state_dict() == reader.state_dict()


def test_going_on_reads_a_few_shards_and_not_what_was_before(tmp_path):
    """50 shards of 20 samples and a buffer of 10, stopped behind 800 samples: what waits is in the last shards."""
    write_shards(tmp_path, [20] * 50)
    pairs = open_stream(str(tmp_path), "train", shuffle_buffer=10)
    reader = EndlessReader(pairs, Consumer(0, 1))
    for _ in range(800):
        next(reader)
    state, opened = reader.state_dict(), []
    read = pairs._shards.read
    pairs._shards.read = lambda shard: opened.append(shard) or read(shard)
    other = EndlessReader(pairs, Consumer(0, 1), state)
    next(other)
    assert 1 <= len(opened) <= 6
    assert len(json.dumps(state)) < 10_000
    next(reader)
    assert list(itertools.islice(other, 100)) == list(itertools.islice(reader, 100))
