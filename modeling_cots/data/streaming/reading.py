"""Reads the part of a stream that one consumer has, and goes on from where an earlier reader was.

A consumer is one data loader worker of one process. Its place has a state of a few kilobytes: the number of the pass,
the shard and the row in it, the random generator, and of each sample in the shuffle buffer its shard and row. To go
on, the samples of the buffer are read again from their shards, a few of the last ones, and nothing before.
"""

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from .dataset import Sample, StreamingPairs

MAX_EMPTY_PASSES = 20


class Consumer(NamedTuple):
    """One of all data loader workers of all processes: its number, and how many there are."""

    number: int
    count: int


class Reader(Protocol):
    """The items of a consumer without an end, and where it is, in plain lists, texts and numbers."""

    def __iter__(self) -> Iterator[dict]: ...

    def __next__(self) -> dict: ...

    def state_dict(self) -> dict[str, Any]: ...


class Waiting(NamedTuple):
    """A sample of the shuffle buffer: the part of the pass and the row in its shard that it was read from."""

    part: int
    row: int
    sample: "Sample"


class PassReader:
    """
    The samples of a consumer in one pass, shuffled: each is drawn from a buffer. With 0 or 1 places the order stays.

    Args:
        pairs: The stream.
        epoch: Number of the pass.
        consumer: Whose part it is.
        state: Of an earlier reader of the same pass, to go on where it was.
    """

    def __init__(self, pairs: "StreamingPairs", epoch: int, consumer: Consumer, state: dict[str, Any] | None = None):
        self._pairs, self._parts = pairs, split_shards(pairs.shard_order(epoch), *consumer)
        self._rng = random.Random(f"{pairs.seed}/{epoch}/{consumer.number}")
        self._waiting: list[Waiting] = []
        self._part, self._row, self._is_drained = 0, 0, False
        if state is not None:
            version, numbers, gauss = state["rng"]
            self._rng.setstate((version, tuple(numbers), gauss))
            self._part, self._row, self._is_drained = state["part"], state["row"], state["is_drained"]
            self._waiting = self._read_waiting(state["waiting"])
        self._samples = self._read_on(self._part, self._row)

    def state_dict(self) -> dict[str, Any]:
        """Where the reader is, in plain lists and numbers."""
        return {
            "part": self._part,
            "row": self._row,
            "is_drained": self._is_drained,
            "rng": list(self._rng.getstate()),
            "waiting": [[each.part, each.row] for each in self._waiting],
        }

    def __iter__(self) -> Iterator["Sample"]:
        return self

    def __next__(self) -> "Sample":
        size = self._pairs.shuffle_buffer
        for new in () if self._is_drained else self._samples:
            if len(self._waiting) < size:
                self._waiting.append(new)
                continue
            if size == 0:
                return new.sample
            place = self._rng.randrange(size)
            drawn, self._waiting[place] = self._waiting[place], new
            return drawn.sample
        if not self._is_drained:
            self._is_drained = True
            self._rng.shuffle(self._waiting)
            self._waiting.reverse()
        if not self._waiting:
            raise StopIteration
        return self._waiting.pop().sample

    def _read_on(self, first_part: int, first_row: int) -> Iterator[Waiting]:
        for part in range(first_part, len(self._parts)):
            shard, offset, step = self._parts[part]
            start = first_row if part == first_part else 0

            def is_wanted(row: int, start=start, offset=offset, step=step) -> bool:
                return row >= start and row % step == offset

            for row, sample in enumerate(self._pairs.read_shard(shard, is_wanted)):
                if sample is not None:
                    self._part, self._row = part, row + 1
                    yield Waiting(part, row, sample)

    def _read_waiting(self, places: list[list[int]]) -> list[Waiting]:
        """The samples at these places, in their order; one that cannot be read any more is left out."""
        found: dict[tuple[int, int], Sample] = {}
        for part in sorted({part for part, _ in places}):
            rows = {row for each, row in places if each == part}
            samples = self._pairs.read_shard(self._parts[part][0], rows.__contains__)
            last = max(rows)
            for row, sample in enumerate(samples):
                if sample is not None:
                    found[part, row] = sample
                if row == last:
                    break
        return [Waiting(part, row, found[part, row]) for part, row in places if (part, row) in found]


class EndlessReader:
    """
    The items of a consumer in pass after pass, each in a new order.

    Args:
        pairs: The stream.
        consumer: Whose part it is.
        state: Of an earlier reader, to go on where it was.
    """

    def __init__(self, pairs: "StreamingPairs", consumer: Consumer, state: dict[str, Any] | None = None):
        self._pairs, self._consumer = pairs, consumer
        # Passes that were begun since the last sample.
        self._epoch, self._num_empty = (0, 1) if state is None else (state["epoch"], state["num_empty"])
        self._open(None if state is None else state["pass"])

    def _open(self, state: dict[str, Any] | None = None) -> None:
        self._pass = PassReader(self._pairs, self._epoch, self._consumer, state)
        self._to_item: Callable[[Sample], dict] = self._pairs.item_maker(self._epoch)

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        while True:
            sample = next(self._pass, None)
            if sample is not None:
                self._num_empty = 0
                return self._to_item(sample)
            if self._num_empty >= MAX_EMPTY_PASSES:
                raise ValueError(
                    f"Data loader worker {self._consumer.number} of {self._consumer.count} found no pair in "
                    f"{MAX_EMPTY_PASSES} passes over its part of {self._pairs.name}: there are fewer pairs than "
                    f"workers, or the shards cannot be read. {self._pairs.report.last}"
                )
            self._epoch, self._num_empty = self._epoch + 1, self._num_empty + 1
            self._open()

    def state_dict(self) -> dict[str, Any]:
        """Where the reader is, in plain lists and numbers."""
        return {"epoch": self._epoch, "num_empty": self._num_empty, "pass": self._pass.state_dict()}


def split_shards(shards: list[int], number: int, count: int) -> list[tuple[int, int, int]]:
    """
    The part of one of several consumers, as triples (shard, k, n): every n-th sample of the shard, from the k-th on.

    Each consumer gets equally many whole shards. All consumers share the remaining shards, which are fewer than they.
    """
    num_whole = len(shards) // count * count
    parts = [(shard, 0, 1) for shard in shards[number:num_whole:count]]
    if shared := shards[num_whole:]:
        place, part = number % len(shared), number // len(shared)
        parts.append((shared[place], part, len(range(place, count, len(shared)))))
    return parts
