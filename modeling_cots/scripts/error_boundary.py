"""`run_script`: where the errors of a program end, in one sentence; the traceback comes with `--debug`."""

import os
import signal
import sys
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from transformers.debug_utils import DebugOption

from ..hub_push import HubPushError
from ..training.finite_check import NonFiniteLossError

GO_ON_TRAINING = "With --resume_from_checkpoint latest a training goes on from its newest checkpoint."
# What a user, a disk, a network or a device can be the reason of. Other errors are faults of the program: Python tells
# of them with their traceback.
EXPECTED = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,
    torch.OutOfMemoryError,
    SafetensorError,
    HubPushError,
    NonFiniteLossError,
)


def run_script(main: Callable[[], None], *, go_on: str | None = None) -> None:
    """
    Call `main`; an error that its user can act on, or a request to stop, ends the program with one sentence.

    `--debug` on the command line shows the traceback as well; it is taken away before `main` reads the options. With
    the name of a feature it is an option of transformers, and stays.

    Args:
        main: Reads `sys.argv`.
        go_on: A sentence that says how to go on after a stop.
    """
    is_debugging = _take_debug(sys.argv)
    _tell_of_termination(f"Stopped by SIGTERM. {go_on or ''}".rstrip())
    try:
        main()
    except KeyboardInterrupt:
        if is_debugging:
            raise
        print(f"Stopped by SIGINT. {go_on or ''}".rstrip(), file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if is_debugging or not (isinstance(error, EXPECTED) or str(error).startswith("DataLoader worker")):
            raise
        raise SystemExit(f"{describe(error)} (--debug shows where.)") from None


def _tell_of_termination(sentence: str) -> None:
    """
    Print a sentence before SIGTERM ends the process, as it would without.

    No exception is raised for it: Python drops those that fall into a fork or into the end of an object. What is being
    written is then left behind as by a kill, which all of our files are made for.
    """
    pid = os.getpid()

    def tell(number: int, frame) -> None:
        if os.getpid() == pid:  # a fork has inherited this
            os.write(2, f"{sentence}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, tell)


def describe(error: BaseException) -> str:
    """One line that names the kind of error and says what it says."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        text = error.strerror + ("" if error.filename is None else f": {error.filename}")
    if isinstance(error, torch.OutOfMemoryError):
        text = f"The memory of the device is full, use smaller batches. {text}"
    return f"{type(error).__name__}: {text or 'no more is known'}"


def _take_debug(argv: list[str]) -> bool:
    """Remove `--debug` from the words of a command line; whether it was there."""
    features = {option.value for option in DebugOption}
    places = [
        place for place, word in enumerate(argv) if word == "--debug" and not features & {*argv[place + 1 : place + 2]}
    ]
    for place in reversed(places):
        del argv[place]
    return bool(places)
