"""What every data set of pairs gives its items: seeds, and names that travel through a batch.

What a sample draws depends on the data set's seed, the epoch and its index, and on nothing else.
"""

import hashlib
import random
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import IterableDataset, Subset

NAME_BYTES = 120


class EpochSeeds:
    """
    Gives each item of a data set a fresh seed every epoch.

    The epoch lies in shared memory, so that a data loader's persistent workers, which hold copies of the data set,
    see `set_epoch` too.

    Args:
        seed: The data set's own seed.
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
    """(B, 120) uint8, so that names of samples go wherever a batch goes; of long names the end stays."""
    encoded = np.zeros((len(names), NAME_BYTES), dtype=np.uint8)
    for row, name in zip(encoded, names, strict=True):
        characters = name.encode("utf-8", errors="replace")[-NAME_BYTES:]
        row[: len(characters)] = np.frombuffer(characters, dtype=np.uint8)
    return torch.from_numpy(encoded)


def decode_name(row: torch.Tensor) -> str:
    """The name in one row, (120,) on the CPU, of `encode_names`."""
    return bytes(row.tolist()).rstrip(b"\0").decode("utf-8", errors="ignore")


@contextmanager
def sample_randomness(seed: int | None):
    """Draw from generators that depend on `seed` alone, and leave the ambient ones (random, numpy, torch) untouched.

    What is drawn for a sample then does not depend on its batch, on workers, processes, or on where a run was resumed.
    """
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
