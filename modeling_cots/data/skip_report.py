"""Reports what is left out of the data: logs each name once, up to a hundred names, and counts all of a stream."""

from collections.abc import Sequence

import torch
from transformers.utils import logging

from .messages import printable, shorten

logger = logging.get_logger(__name__)

MAX_WORKERS = 256
MAX_REPORTED_NAMES = 100
SHARDS, SAMPLES = 0, 1


def and_more(names: Sequence[object], limit: int) -> str:
    """The first `limit` names, separated by commas, and the number of the others: "a, b and 3 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shorten(str(name)) for name in names[:limit]) + more


class NamedOnce:
    """
    Logs one warning for each name, for up to a hundred names.

    Args:
        further: The last warning, which says that there are more names.
    """

    def __init__(self, further: str):
        self.further = further
        self.names: set[str] = set()

    def warn(self, name: str, message: str) -> None:
        """Log `message`, unless this name or a hundred names have had a warning."""
        if name in self.names or len(self.names) >= MAX_REPORTED_NAMES:
            return
        self.names.add(name)
        logger.warning(printable(message))
        if len(self.names) == MAX_REPORTED_NAMES:
            logger.warning(self.further)


class SkipReport:
    """
    Names images or videos that cannot be read. The trainer's log counts them.

    Args:
        kind: "image" or "video", for the messages.
    """

    def __init__(self, kind: str = "image"):
        self.kind = kind
        self._named = NamedOnce(f"Further {kind}s that cannot be read are counted, but no longer named.")

    def add(self, name: str, error: Exception) -> None:
        """Report an image or video by its name."""
        message = f"Skipped the {self.kind} {shorten(name)}, which cannot be read ({shorten(str(error))})."
        self._named.warn(name, message)


class StreamReport:
    """
    Counts shards that broke and samples that were refused, in memory that all data loader workers share.

    A shard or sample counts again in every pass over the data. Each process that meets it names it once.
    """

    def __init__(self):
        # Each worker has a column: two processes that add to the same number at a time lose counts.
        self._counts = torch.zeros(2, MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._named = NamedOnce("Further shards and samples that are left out are counted, but no longer named.")
        self.last = ""

    @property
    def skipped_shards(self) -> int:
        """Number of shards that could not be read to their end."""
        return int(self._counts[SHARDS].sum())

    @property
    def skipped_samples(self) -> int:
        """Number of samples without image or caption, and of refused files in shards."""
        return int(self._counts[SAMPLES].sum())

    def add_shard(self, name: str, error: Exception, num_read: int) -> None:
        """Report a shard that broke after `num_read` of its samples."""
        reason = shorten(str(error)).rstrip(".") or "no reason given"
        self._add(
            SHARDS,
            f"Skipped the shard {shorten(name)} after {num_read} samples: {type(error).__name__}: {reason}",
            name,
        )

    def add_sample(self, name: str, reason: str) -> None:
        """Report a sample, or a file in a shard, that is left out."""
        self._add(SAMPLES, f"Skipped {shorten(name)}: {shorten(reason)}", name)

    def own(self) -> list[int]:
        """What this data loader worker has counted: shards and samples."""
        return self._counts[:, _column()].tolist()

    def put_own(self, counts: list[int]) -> None:
        """Go on from what this worker had counted."""
        self._counts[:, _column()] = torch.tensor(counts)

    def _add(self, kind: int, message: str, name: str) -> None:
        self._counts[kind, _column()] += 1
        self.last = message
        self._named.warn(name, f"{message}.")


def _column() -> int:
    worker = torch.utils.data.get_worker_info()
    return 0 if worker is None else worker.id % MAX_WORKERS
