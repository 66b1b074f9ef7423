"""Pairs that never end: a stream over shards, split among processes and workers, shuffled, pass after pass.

Nothing is downloaded, unpacked or indexed first. How shards are found and read is in names.py, shards.py
and tar.py, what a row holds in rows.py. `datasets` itself splits by process and by worker too, but its
iterator ends for good at the first bad file, and shards fewer than workers leave workers idle.
"""

import copy
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from ..items import EpochSeeds
from ..rows import BadRowError, cached_tokens, read_row
from ..skip_report import StreamReport
from .names import display_name
from .shards import FileShards, RowShards, open_shards

MAX_EMPTY_PASSES = 20
MAX_TRIED_ROWS = 200


class Sample(NamedTuple):
    """An encoded image with its captions and any cached tokens, and the shard and key that it was read from."""

    name: str
    image: bytes
    captions: list[str]
    tokens: dict


class StreamingPairs(IterableDataset):
    """
    One pass over the pairs of a stream: the part of this process and data loader worker.

    Items are those of `open_pairs`, but that "pair_id" is made of the image's bytes (see `pair_id_of`), so that
    equal images are never negatives of each other, wherever they stand.

    Args:
        shards: Where they are.
        image_column, caption_column: See `read_row`.
        shuffle_buffer: So many samples of each worker wait encoded in memory, from which a random one is taken next;
            the order of shards is drawn anew in every pass. With 0 everything comes as it is written.
        seed: Of both, and of what is drawn for each item in training.
    """

    modality = "image"

    def __init__(
        self,
        shards: FileShards | RowShards,
        image_column: str | None = None,
        caption_column: str | None = None,
        *,
        shuffle_buffer: int = 1000,
        seed: int = 0,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be 0 or more samples, got {shuffle_buffer}.")
        self._shards, self._columns = shards, (image_column, caption_column)
        self._shuffle_buffer, self._seed = shuffle_buffer, seed
        self._process_index, self._num_processes = 0, 1
        self._epoch = EpochSeeds(seed)
        self.report = StreamReport()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def split_by_process(self, process_index: int, num_processes: int) -> "StreamingPairs":
        """The part of one of several processes; all parts together are the whole, and none overlap."""
        part = copy.copy(self)
        part._process_index, part._num_processes = process_index, num_processes
        part.report = StreamReport()
        return part

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and every item's seed anew from the next iteration on, in running workers too."""
        self._epoch.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        epoch = self._epoch.epoch
        seeds = self.item_seeds(epoch)
        for sample in self.read_pass(epoch):
            yield to_item(sample, seeds)

    def item_seeds(self, epoch: int) -> EpochSeeds:
        """What seeds the items of pass number `epoch`."""
        seeds = EpochSeeds(self._seed)
        seeds.set_epoch(epoch)
        return seeds

    def read_pass(self, epoch: int) -> Iterator[Sample]:
        """The samples of pass number `epoch` for this process and worker, shuffled."""
        worker_id, num_workers = _worker()
        consumer = self._process_index + self._num_processes * worker_id
        shards = list(range(self.num_shards))
        if self._shuffle_buffer > 0:
            random.Random(f"{self._seed}/{epoch}").shuffle(shards)
        samples = self._read_parts(split_shards(shards, consumer, self._num_processes * num_workers))
        return shuffled(samples, self._shuffle_buffer, random.Random(f"{self._seed}/{epoch}/{consumer}"))

    def iter_captions(self) -> Iterator[str]:
        """All captions of all shards, in their order; it reads everything."""
        for shard in range(self.num_shards):
            for sample in self._read_shard(shard):
                if sample is not None:
                    yield from sample.captions

    def first_item(self) -> dict:
        """The first pair as it is written. Raises `ValueError` if no shard has one among its first rows."""
        for shard in range(self.num_shards):
            for sample in itertools.islice(self._read_shard(shard), MAX_TRIED_ROWS):
                if sample is not None:
                    return to_item(sample, self.item_seeds(0))
        raise ValueError(f"None of the {self.num_shards} shards gives a pair. {self.report.last}.")

    def _read_parts(self, parts: list[tuple[int, int, int]]) -> Iterator[Sample]:
        for shard, part, num_parts in parts:
            for sample in itertools.islice(self._read_shard(shard), part, None, num_parts):
                if sample is not None:
                    yield sample

    def _read_shard(self, shard: int) -> Iterator[Sample | None]:
        """All samples of a shard up to where it breaks; `None` in the place of one that is refused."""
        rows = self._shards.read(shard, self.report)
        num_read = 0
        while True:
            try:
                key, row = next(rows)
            except StopIteration:
                return
            except MemoryError:
                raise
            except Exception as error:  # every protocol and format has its own, and one bad shard must not end a run
                self.report.add_shard(self._shards.name(shard), error, num_read)
                return
            num_read += 1
            name = f"{self._shards.name(shard)}/{key}"
            try:
                yield Sample(name, *read_row(row, *self._columns), cached_tokens(row))
            except BadRowError as error:
                self.report.add_sample(name, str(error))
                yield None


class EndlessPairs(IterableDataset):
    """
    Pass after pass over a stream, each in a new order, for training by steps.

    Processes and workers begin their next pass on their own, so that none waits at the end of a pass for another that
    has more to read.

    Args:
        pairs: The part of this process.
        batch_size: Items that the data loader puts into a batch.
    """

    def __init__(self, pairs: StreamingPairs, batch_size: int):
        self.pairs, self.batch_size = pairs, batch_size
        self._num_skipped_batches = 0

    def skip(self, num_batches: int) -> None:
        """From the next iteration on give `None` for the items of so many batches of this process: no work is done."""
        self._num_skipped_batches = num_batches

    def __iter__(self) -> Iterator[dict | None]:
        worker_id, num_workers = _worker()
        # Batch b is made by worker b modulo their number.
        to_skip = len(range(worker_id, self._num_skipped_batches, num_workers)) * self.batch_size
        num_empty = 0
        for epoch in itertools.count():
            num_empty += 1
            seeds = self.pairs.item_seeds(epoch)
            for sample in self.pairs.read_pass(epoch):
                num_empty = 0
                if to_skip > 0:
                    to_skip -= 1
                    yield None
                else:
                    yield to_item(sample, seeds)
            if num_empty == MAX_EMPTY_PASSES:
                raise ValueError(
                    f"Data loader worker {worker_id} found no pair in {num_empty} passes over its part of the data: "
                    f"there are fewer pairs than workers, or the shards cannot be read. {self.pairs.report.last}"
                )


class SkippingCollator:
    """Passes batches on to `collate`; one of nothing but skipped items becomes an empty dict."""

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, items: list[dict | None]) -> dict:
        return {} if items[0] is None else self.collate(items)  # type: ignore[arg-type]


def open_stream(
    dataset: str,
    split: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    shuffle_buffer: int = 1000,
    seed: int = 0,
) -> StreamingPairs:
    """
    Open pairs to be read as they come, without a length.

    Args:
        dataset: Paths or addresses (https://, s3:// and whatever else fsspec knows) of WebDataset .tar or of .parquet
            shards, with braces ("{000..009}") and stars; a folder of such files; or a Hub id.
        split: Its name: of a Hub data set, or as files of a folder or glob carry it. A list in braces and an address
            are the split itself.
        image_column, caption_column: See `read_row`.
        shuffle_buffer, seed: See [`StreamingPairs`].

    Raises `ValueError` for what is not there, cannot be streamed, or gives no pair.
    """
    if "[" in split:
        raise ValueError(f"A stream has no length to cut {split!r} from; give the name of the split alone.")
    shards = open_shards(dataset, split, image_column, caption_column)
    pairs = StreamingPairs(shards, image_column, caption_column, shuffle_buffer=shuffle_buffer, seed=seed)
    pairs.first_item()
    pairs.name = os.path.basename(os.path.normpath(dataset)) if os.path.exists(dataset) else display_name(dataset)
    return pairs


def split_shards(shards: list[int], consumer: int, num_consumers: int) -> list[tuple[int, int, int]]:
    """
    The part of one of several consumers: (shard, k, n) for every n-th sample of the shard from the k-th.

    Each consumer gets equally many whole shards; what then remains, fewer shards than consumers, is shared among all.
    """
    num_whole = len(shards) // num_consumers * num_consumers
    parts = [(shard, 0, 1) for shard in shards[consumer:num_whole:num_consumers]]
    if shared := shards[num_whole:]:
        place, part = consumer % len(shared), consumer // len(shared)
        parts.append((shared[place], part, len(range(place, num_consumers, len(shared)))))
    return parts


def shuffled(samples: Iterator, buffer_size: int, rng: random.Random) -> Iterator:
    """All of `samples`, each taken at random from `buffer_size` that wait; with 0 or 1 in their order."""
    waiting = []
    for sample in samples:
        if len(waiting) < buffer_size:
            waiting.append(sample)
            continue
        place = rng.randrange(buffer_size) if buffer_size else None
        if place is None:
            yield sample
        else:
            yield waiting[place]
            waiting[place] = sample
    rng.shuffle(waiting)
    yield from waiting


def pair_id_of(image: bytes) -> int:
    """A number in [0, 2**63) made of an encoded image: the first 8 bytes of its BLAKE2b digest, without the sign."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1


def to_item(sample: Sample, seeds: EpochSeeds) -> dict:
    """What `StreamingPairs` gives for a sample."""
    return {
        "image": {"bytes": sample.image, "path": None},
        "captions": sample.captions,
        "pair_id": pair_id_of(sample.image),
        "name": sample.name,
        "seed": seeds(sample.name),
        **sample.tokens,
    }


def _worker() -> tuple[int, int]:
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)
