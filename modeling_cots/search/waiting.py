"""Waits for the main process of several without a collective, which would end by its timeout meanwhile.

The main process lists all images and builds the index, which takes hours where there are many. It tells by a key in
the store that joins the processes of torch.distributed. The others look for the key again and again, without a limit.
"""

import itertools
import time

SECONDS = 0.2  # between two looks
DONE, FAILED = b"done", b"failed"
_runs = itertools.count()


def new_moments(*names: str) -> tuple[str, ...]:
    """Keys that no earlier call gave; all processes call this equally often."""
    run = next(_runs)
    return tuple(f"cots_search/{run}/{name}" for name in names)


def tell(moment: str, result: bytes = DONE) -> None:
    """In the main process: that it has come to a moment, or never will."""
    _store().set(moment, result)


def wait_for(moment: str) -> None:
    """In another process: wait until the main one tells. Raises `ValueError` where that has failed."""
    store = _store()
    while not store.check([moment]):
        time.sleep(SECONDS)
    if store.get(moment) != DONE:
        raise ValueError("The main process has failed; its own message says why.")


def _store():
    # torch names the store that it makes for the processes in no public function; test_index.py runs two processes.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
