"""Streams pairs from shards, split among processes and workers, shuffled, pass after pass without an end.

Nothing is downloaded, unpacked or indexed first. names.py, shards.py and tar.py find and read shards, and rows.py
reads rows. The streams of `datasets` do not suffice: their iterator ends for good at the first bad file, and some
workers idle where there are fewer shards than workers.
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
from ..rows import BadRowError, Columns, cached_tokens, image_columns, read_row
from ..skip_report import StreamReport
from .names import public_name
from .shards import FileShards, RowShards, open_shards

MAX_EMPTY_PASSES = 20
MAX_TRIED_ROWS = 200


class Sample(NamedTuple):
    """An encoded image with its captions and any cached image tokens. Its name is its shard and its key."""

    name: str
    image: bytes
    captions: list[str]
    tokens: dict


class StreamingPairs(IterableDataset):
    """
    One pass over the pairs of a stream: the part that this process and data loader worker reads.

    Items are those of `open_pairs`, except that "pair_id" is computed from the image's bytes (see `pair_id_of`). Equal
    images are thus never negatives of each other, whatever shards they are in.

    Args:
        shards: The shards to read.
        columns: Where images and captions are.
        shuffle_buffer: Number of encoded samples that each worker keeps in memory, from which it draws the next one.
            The order of shards is also drawn anew in every pass. With 0 all samples come in the order of the files.
        seed: Seed of the order, and of the random draws for each item in training.
    """

    modality = "image"

    def __init__(
        self,
        shards: FileShards | RowShards,
        columns: Columns,
        *,
        shuffle_buffer: int = 1000,
        seed: int = 0,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be 0 or more samples, got {shuffle_buffer}.")
        self._shards, self._columns = shards, columns
        self._shuffle_buffer, self._seed = shuffle_buffer, seed
        self._process_index, self._num_processes = 0, 1
        self._epoch = EpochSeeds(seed)
        self.report = StreamReport()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def split_by_process(self, process_index: int, num_processes: int) -> "StreamingPairs":
        """The part of one of several processes. The parts do not overlap, and together are the whole stream."""
        part = copy.copy(self)
        part._process_index, part._num_processes = process_index, num_processes
        part.report = StreamReport()
        return part

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the items' seeds anew from the next iteration on, in running workers, too."""
        self._epoch.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        epoch = self._epoch.epoch
        seeds = self.item_seeds(epoch)
        for sample in self.read_pass(epoch):
            yield to_item(sample, seeds)

    def item_seeds(self, epoch: int) -> EpochSeeds:
        """The seeds of the items in pass number `epoch`."""
        seeds = EpochSeeds(self._seed)
        seeds.set_epoch(epoch)
        return seeds

    def read_pass(self, epoch: int) -> Iterator[Sample]:
        """The samples of this process and worker in pass number `epoch`, shuffled."""
        worker_id, num_workers = _worker()
        consumer = self._process_index + self._num_processes * worker_id
        shards = list(range(self.num_shards))
        if self._shuffle_buffer > 0:
            random.Random(f"{self._seed}/{epoch}").shuffle(shards)
        samples = self._read_parts(split_shards(shards, consumer, self._num_processes * num_workers))
        return shuffled(samples, self._shuffle_buffer, random.Random(f"{self._seed}/{epoch}/{consumer}"))

    def iter_captions(self) -> Iterator[str]:
        """All captions of all shards, in their order. This reads all shards to their end."""
        for shard in range(self.num_shards):
            for sample in self._read_shard(shard):
                if sample is not None:
                    yield from sample.captions

    def first_item(self) -> dict:
        """The first pair in the order of the files. Raises `ValueError` if no shard has one among its first rows."""
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
        """The samples of a shard, up to its end or to where it breaks. A refused sample is `None`."""
        rows = self._shards.read(shard)
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
                if isinstance(row, BadRowError):
                    raise row
                media, captions = read_row(row, self._columns)
                image = media["bytes"]
                if image is None:
                    image = self._shards.read_file(shard, media["path"])
                yield Sample(name, image, captions, cached_tokens(row))
            except BadRowError as error:
                self.report.add_sample(name, str(error))
                yield None


class EndlessPairs(IterableDataset):
    """
    Repeats the passes over a stream without an end, each in a new order, for training by steps.

    Each process and worker begins its next pass on its own: none waits at the end of a pass for others that have more
    to read.

    Args:
        pairs: The part of the stream that this process reads.
        batch_size: Items that the data loader puts into a batch.
    """

    def __init__(self, pairs: StreamingPairs, batch_size: int):
        self.pairs, self.batch_size = pairs, batch_size
        self._num_skipped_batches = 0

    def skip(self, num_batches: int) -> None:
        """Make the next iteration give `None` for the items of the first `num_batches` batches of this process."""
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
    """Calls `collate` for a batch. A batch of skipped items becomes an empty dict."""

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
    dataset_config: str | None = None,
    revision: str | None = None,
) -> StreamingPairs:
    """
    Open a stream of pairs, which has no length.

    Args:
        dataset: Paths or addresses (https://, s3:// and whatever else fsspec knows) of WebDataset .tar, .parquet,
            .jsonl, .json or .csv files, with braces ("{000..009}") and stars; a folder of such files, also as
            img2dataset writes it; or a Hub id.
        split: Its name, in a Hub data set or in the file names of a folder or glob. A list in braces and an address
            name the files of the split, whatever it is called.
        image_column, caption_column: See `open_pairs`.
        shuffle_buffer, seed: See [`StreamingPairs`].
        dataset_config, revision: Configuration and version of a Hub id, see `load_rows`.

    Raises `ValueError` for data that does not exist, cannot be streamed, or gives no pair.
    """
    if "[" in split:
        raise ValueError(f"A stream has no length to cut {split!r} from; give the name of the split alone.")
    columns = image_columns(image_column, caption_column)
    shards = open_shards(dataset, split, columns, dataset_config, revision)
    pairs = StreamingPairs(shards, columns, shuffle_buffer=shuffle_buffer, seed=seed)
    pairs.first_item()
    pairs.name = os.path.basename(os.path.normpath(dataset)) if os.path.exists(dataset) else public_name(dataset)
    return pairs


def split_shards(shards: list[int], consumer: int, num_consumers: int) -> list[tuple[int, int, int]]:
    """
    The part of one of several consumers, as triples (shard, k, n): every n-th sample of the shard, from the k-th on.

    Each consumer gets equally many whole shards. All consumers share the remaining shards, which are fewer than they.
    """
    num_whole = len(shards) // num_consumers * num_consumers
    parts = [(shard, 0, 1) for shard in shards[consumer:num_whole:num_consumers]]
    if shared := shards[num_whole:]:
        place, part = consumer % len(shared), consumer // len(shared)
        parts.append((shared[place], part, len(range(place, num_consumers, len(shared)))))
    return parts


def shuffled(samples: Iterator, buffer_size: int, rng: random.Random) -> Iterator:
    """Shuffle samples: each is drawn from a buffer of `buffer_size`. With 0 or 1 the order stays."""
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
    """An id in [0, 2**63) of an encoded image: the first 8 bytes of its BLAKE2b digest, without the lowest bit."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1


def to_item(sample: Sample, seeds: EpochSeeds) -> dict:
    """The item of `StreamingPairs` for a sample."""
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
