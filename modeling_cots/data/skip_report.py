"""What a stream had to leave out: named once in the log of the process that met it, and counted for all workers."""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_WORKERS = 256
MAX_REPORTED_NAMES = 100
SHARDS, SAMPLES = 0, 1


class StreamReport:
    """
    Counts shards that were given up and samples that were refused, in memory that data loader workers share.

    A shard or sample counts again in every pass over the data; its name is logged once, and up to a hundred names.
    """

    def __init__(self):
        # A column a worker, as two that add to one number at a time lose counts.
        self._counts = torch.zeros(2, MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._named: set[str] = set()
        self.last = ""

    @property
    def skipped_shards(self) -> int:
        """Shards of which at least a part could not be read."""
        return int(self._counts[SHARDS].sum())

    @property
    def skipped_samples(self) -> int:
        """Samples without image or caption, and members of shards that are refused."""
        return int(self._counts[SAMPLES].sum())

    def add_shard(self, name: str, error: Exception, num_read: int) -> None:
        """Report a shard that broke after `num_read` of its samples."""
        reason = str(error).rstrip(".") or "no reason given"
        self._add(SHARDS, f"Skipped the shard {name} after {num_read} samples: {type(error).__name__}: {reason}", name)

    def add_sample(self, name: str, reason: str) -> None:
        """Report a sample, or a member of a shard, that is left out."""
        self._add(SAMPLES, f"Skipped {name}: {reason}", name)

    def _add(self, kind: int, message: str, name: str) -> None:
        worker = torch.utils.data.get_worker_info()
        self._counts[kind, 0 if worker is None else worker.id % MAX_WORKERS] += 1
        self.last = message
        if name in self._named or len(self._named) >= MAX_REPORTED_NAMES:
            return
        self._named.add(name)
        logger.warning(f"{message}.")
        if len(self._named) == MAX_REPORTED_NAMES:
            logger.warning("Further shards and samples that are left out are counted, but no longer named.")


class SkipReport:
    """Names every image that cannot be read, once each and up to a hundred; the trainer's log counts all.

    Args:
        kind: What is skipped, in the messages.
    """

    def __init__(self, kind: str = "image"):
        self.kind = kind
        self.names: set[str] = set()

    def add(self, name: str, error: Exception) -> None:
        """Report the one called `name`."""
        if name in self.names or len(self.names) >= MAX_REPORTED_NAMES:
            return
        self.names.add(name)
        logger.warning(f"Skipped the {self.kind} {name}, which cannot be read ({error}).")
        if len(self.names) == MAX_REPORTED_NAMES:
            logger.warning(f"Further {self.kind}s that cannot be read are counted, but no longer named.")
