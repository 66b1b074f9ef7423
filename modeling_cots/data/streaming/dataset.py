"""Streams pairs from shards, split among processes and workers, shuffled, pass after pass without an end.

Nothing is downloaded, unpacked or indexed first. names.py, shards.py and tar.py find and read shards, rows.py reads
rows, reading.py shuffles and goes on where a run was, and mixture.py mixes several streams. The streams of `datasets`
do not suffice: their iterator ends for good at the first bad file, some workers idle where there are fewer shards than
workers, and what waits in their shuffle buffer is lost when a run goes on.
"""

import copy
import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from ..formats import rows_until_broken
from ..items import EpochSeeds
from ..rows import BadRowError, Columns, cached_tokens, image_columns, read_row
from ..skip_report import StreamReport
from .names import public_name
from .reading import Consumer, EndlessReader, PassReader, Reader
from .shards import FileShards, RowShards, open_shards
from .token_table import TokenTable

MAX_TRIED_ROWS = 200
READER_STATE = "reader_state"  # in a batch: where the worker was behind it, as JSON


class Sample(NamedTuple):
    """An encoded image with its captions and any cached image tokens. Its name is its shard and its key."""

    name: str
    image: bytes
    captions: list[str]
    tokens: dict
    pair_id: int


class PairStream(IterableDataset):
    """
    What training needs of a stream of pairs, [`StreamingPairs`] or `MixedPairs`.

    Attributes:
        name: For the model card.
        report: What had to be left out.
    """

    modality = "image"
    name = ""
    report: StreamReport
    process_index, num_processes = 0, 1

    def split_by_process(self, process_index: int, num_processes: int) -> "PairStream":
        """The part of one of several processes. The parts do not overlap, and together are the whole stream."""
        part = copy.copy(self)
        part.process_index, part.num_processes = process_index, num_processes
        part.report = StreamReport()
        return part

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the items' seeds of a single pass anew."""

    def first_item(self) -> dict:
        """An item of the stream, to look at. Raises `ValueError` if there is none."""
        raise NotImplementedError

    def iter_captions(self) -> Iterator[str]:
        """All captions, to train a tokenizer on."""
        raise NotImplementedError

    def read_endless(self, consumer: Consumer, state: dict[str, Any] | None = None) -> Reader:
        """The items of a consumer without an end, from where `state` says."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on where it was, in plain values; see docs/data.md."""
        raise NotImplementedError


class StreamingPairs(PairStream):
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
        tokens: Image tokens that are not in the shards. A pair without any is left out and counted.
    """

    def __init__(
        self,
        shards: FileShards | RowShards,
        columns: Columns,
        *,
        shuffle_buffer: int = 1000,
        seed: int = 0,
        tokens: TokenTable | None = None,
    ):
        if shuffle_buffer < 0:
            raise ValueError(f"shuffle_buffer must be 0 or more samples, got {shuffle_buffer}.")
        self._shards, self._columns, self._tokens = shards, columns, tokens
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self._epoch = EpochSeeds(seed)
        self.report = StreamReport()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order and the items' seeds anew from the next iteration on, in running workers, too."""
        self._epoch.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        epoch = self._epoch.epoch
        return map(self.item_maker(epoch), PassReader(self, epoch, consumer_of(self)))

    def read_endless(self, consumer: Consumer, state: dict[str, Any] | None = None) -> EndlessReader:
        return EndlessReader(self, consumer, state)

    def identity(self) -> dict[str, Any]:
        names = "\n".join(self._shards.name(shard) for shard in range(self.num_shards))
        return {
            "shards": hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest(),
            "data_seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
        }

    def shard_order(self, epoch: int) -> list[int]:
        """The numbers of the shards, in the order of pass number `epoch`."""
        shards = list(range(self.num_shards))
        if self.shuffle_buffer > 0:
            random.Random(f"{self.seed}/{epoch}").shuffle(shards)
        return shards

    def item_maker(self, epoch: int) -> Callable[[Sample], dict]:
        """Makes items of samples in pass number `epoch`."""
        seeds = EpochSeeds(self.seed)
        seeds.set_epoch(epoch)
        return lambda sample: to_item(sample, seeds)

    def iter_captions(self) -> Iterator[str]:
        """All captions of all shards, in their order. This reads all shards to their end."""
        for shard in range(self.num_shards):
            for sample in self.read_shard(shard):
                if sample is not None:
                    yield from sample.captions

    def first_item(self) -> dict:
        """The first pair in the order of the files. Raises `ValueError` if no shard has one among its first rows."""
        for shard in range(self.num_shards):
            for sample in itertools.islice(self.read_shard(shard), MAX_TRIED_ROWS):
                if sample is not None:
                    return self.item_maker(0)(sample)
        raise ValueError(f"None of the {self.num_shards} shards gives a pair. {self.report.last}.")

    def read_shard(self, shard: int, is_wanted: Callable[[int], bool] = lambda row: True) -> Iterator[Sample | None]:
        """The samples of a shard, up to its end or to where it breaks. One refused, or not wanted, is `None`."""
        report = partial(self.report.add_shard, self._shards.name(shard))  # one bad shard must not end a run
        for number, (key, row) in enumerate(rows_until_broken(self._shards.read(shard), report)):
            yield self._read_sample(shard, key, row) if is_wanted(number) else None

    def _read_sample(self, shard: int, key: str, row: dict | BadRowError) -> Sample | None:
        name = f"{self._shards.name(shard)}/{key}"
        try:
            if isinstance(row, BadRowError):
                raise row
            media, captions = read_row(row, self._columns)
            image = media["bytes"]
            if image is None:
                image = self._shards.read_file(shard, media["path"])
            pair_id = pair_id_of(image)
            tokens = cached_tokens(row) if self._tokens is None else self._tokens.find(name, pair_id)
            return Sample(name, image, captions, tokens, pair_id)
        except BadRowError as error:
            self.report.add_sample(name, str(error))
            return None


class EndlessPairs(IterableDataset):
    """
    Repeats the passes over a stream without an end, each in a new order, for training by steps.

    Each process and worker begins its next pass on its own: none waits at the end of a pass for others that have more
    to read. The last item of each batch brings along where its worker is (`READER_STATE`).

    Args:
        pairs: The part of the stream that this process reads.
        batch_size: Items that the data loader puts into a batch.
    """

    def __init__(self, pairs: PairStream, batch_size: int):
        self.pairs, self.batch_size = pairs, batch_size
        self._num_skipped, self._num_given, self._states = 0, 0, {}

    def go_on(self, num_skipped: int, num_given: int, states: dict[int, dict]) -> None:
        """
        Make the next iteration go on behind the batches that this process was given before.

        Args:
            num_skipped: Batches of `None` that come first, for a loop that throws so many away.
            num_given: Batches that were given.
            states: By the number of a worker, where it was behind the last one that was its own; one that is missing
                gave none.
        """
        self._num_skipped, self._num_given, self._states = num_skipped, num_given, states

    def __iter__(self) -> Iterator[dict | None]:
        worker_id, num_workers = _worker()
        # Batch b is made by worker b modulo their number.
        for _ in range(len(range(worker_id, self._num_skipped, num_workers)) * self.batch_size):
            yield None
        role = (worker_id + self._num_given - self._num_skipped) % num_workers
        state = self._states.get(role, {})
        consumer = consumer_of(self.pairs, role)
        reader = self.pairs.read_endless(consumer, state.get("reader"))
        if state:
            self.pairs.report.put_own(
                state["skipped"]
            )  # what was counted while places were found again does not count
        for number, item in enumerate(reader, start=1):
            if number % self.batch_size == 0:
                state = {"worker": role, "skipped": self.pairs.report.own(), "reader": reader.state_dict()}
                item[READER_STATE] = json.dumps(state, separators=(",", ":"))
            yield item


class SkippingCollator:
    """Calls `collate` for a batch, and keeps its `READER_STATE`. A batch of skipped items becomes an empty dict."""

    def __init__(self, collate: Callable[[list[dict]], dict]):
        self.collate = collate

    def __call__(self, items: list[dict | None]) -> dict:
        if items[0] is None:
            return {}
        state = items[-1].pop(READER_STATE)
        return {**self.collate(items), READER_STATE: state}  # type: ignore[arg-type]


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
    image_tokens: str | None = None,
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
        image_tokens: A folder of image tokens beside the shards, see [`TokenTable`].

    Raises `ValueError` for data that does not exist, cannot be streamed, or gives no pair.
    """
    if "[" in split:
        raise ValueError(f"A stream has no length to cut {split!r} from; give the name of the split alone.")
    columns = image_columns(image_column, caption_column)
    shards = open_shards(dataset, split, columns, dataset_config, revision)
    tokens = None if image_tokens is None else TokenTable(image_tokens)
    pairs = StreamingPairs(shards, columns, shuffle_buffer=shuffle_buffer, seed=seed, tokens=tokens)
    pairs.first_item()
    pairs.name = os.path.basename(os.path.normpath(dataset)) if os.path.exists(dataset) else public_name(dataset)
    return pairs


def pair_id_of(image: bytes) -> int:
    """An id in [0, 2**63) of an encoded image: the first 8 bytes of its BLAKE2b digest, without the lowest bit."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1


def to_item(sample: Sample, seeds: EpochSeeds) -> dict:
    """The item of `StreamingPairs` for a sample."""
    return {
        "image": {"bytes": sample.image, "path": None},
        "captions": sample.captions,
        "pair_id": sample.pair_id,
        "name": sample.name,
        "seed": seeds(sample.name),
        **sample.tokens,
    }


def consumer_of(pairs: PairStream, worker_id: int | None = None) -> Consumer:
    """This process and this worker, or the one with the given number, among all of them."""
    own, num_workers = _worker()
    number = pairs.process_index + pairs.num_processes * (own if worker_id is None else worker_id)
    return Consumer(number, pairs.num_processes * num_workers)


def _worker() -> tuple[int, int]:
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)
