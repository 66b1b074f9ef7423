"""What the items of every data set have: seeds, names and captions as tensors, and the modality of the data set.

The random draws for an item depend only on the data set's seed, the epoch and the item's index.
"""

import functools
import hashlib
import random
import unicodedata

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

NAME_BYTES = 120


class EpochSeeds:
    """
    Gives each item of a data set a fresh seed every epoch.

    The epoch is kept in shared memory, so that the persistent workers of a data loader see `set_epoch`, too. They hold
    copies of the data set.

    Args:
        seed: The data set's seed.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch last set, 0 at first."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Change every item's seed, in running workers too."""
        self._epoch.fill_(epoch)

    def __call__(self, index: int | str) -> int:
        """The seed of item `index` in this epoch, in [0, 2**63): a hash, so that neighbors are not alike."""
        digest = hashlib.blake2b(f"{self.seed}/{self.epoch}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def modality_of(dataset) -> str:
    """
    "image" or "video": what the captions of a data set describe.

    Data sets of this package have it as an attribute, which is found through wrappers: those with a `dataset`, such as
    `torch.utils.data.Subset`, and those with a list of `datasets`, of which the first counts. A table of `datasets`
    shows it by its columns, so that no video is decoded. Of any other map-style data set the first item is read.
    """
    inner = dataset
    while inner is not None and not hasattr(inner, "modality"):
        parts = getattr(inner, "datasets", None)
        inner = parts[0] if isinstance(parts, list | tuple) and parts else getattr(inner, "dataset", None)
    if inner is not None:
        return inner.modality
    if dataset is None or isinstance(dataset, IterableDataset) or len(dataset) == 0:
        return "image"
    table = dataset
    while isinstance(table, Subset):
        table = table.dataset
    columns = getattr(table, "column_names", None)
    return "video" if "video" in (dataset[0] if columns is None else columns) else "image"


def encode_names(names: list[str]) -> torch.Tensor:
    """Names as a tensor (B, 120) uint8, which goes to the device with its batch. A long name keeps its end."""
    encoded = np.zeros((len(names), NAME_BYTES), dtype=np.uint8)
    for row, name in zip(encoded, names, strict=True):
        characters = name.encode("utf-8", errors="replace")[-NAME_BYTES:]
        row[: len(characters)] = np.frombuffer(characters, dtype=np.uint8)
    return torch.from_numpy(encoded)


def decode_name(row: torch.Tensor) -> str:
    """The name in a row (120,), on the CPU, of the tensor of `encode_names`."""
    return bytes(row.tolist()).rstrip(b"\0").decode("utf-8", errors="ignore")


def caption_ids(captions: list[str]) -> torch.Tensor:
    """
    A number for each caption, (B,) int64 in [0, 2**63), equal for captions of equal text.

    Case, Unicode form, white space, and punctuation at the ends make no difference. It is a hash, and so the same in
    every process and every run.
    """
    return torch.tensor([_caption_id(caption) for caption in captions], dtype=torch.int64)


@functools.lru_cache(maxsize=2**16)  # captions come back in every epoch
def _caption_id(caption: str) -> int:
    words = unicodedata.normalize("NFKC", caption).casefold().split()
    text = " ".join(words)
    first, last = 0, len(text)
    while first < last and not _is_content(text[first]):
        first += 1
    while last > first and not _is_content(text[last - 1]):
        last -= 1
    text = text[first:last] or text  # a caption of punctuation alone is equal to itself
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1


def _is_content(letter: str) -> bool:
    return not letter.isspace() and not unicodedata.category(letter).startswith("P")


class SampleRandomness:
    """
    Seeds `random`, numpy and torch for one sample after the other, and restores their states at the end of the block.

    Draws for a sample then depend neither on its batch nor on workers, processes or the step where a run was resumed.
    A sample without a seed draws from the states that are restored, and moves them on.

        with SampleRandomness() as seed_for:
            for item in items:
                seed_for(item.get("seed"))
    """

    def __enter__(self) -> "SampleRandomness":
        self._states: tuple | None = None  # while nothing is seeded, they are those of the generators
        return self

    def __call__(self, seed: int | None) -> None:
        """What is drawn from here on is drawn for the sample with this seed."""
        if seed is None:
            self._restore()
            return
        if self._states is None:
            self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)

    def __exit__(self, *error) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._states is not None:
            random.setstate(self._states[0])
            np.random.set_state(self._states[1])
            torch.set_rng_state(self._states[2])
            self._states = None
