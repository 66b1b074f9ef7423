"""`run_script`: where the errors of a program end, in one sentence; the traceback comes with `--debug`.

Nothing heavy is imported, so that a program's help and its refusals need not wait for torch.
"""

import errno
import os
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

# In the `go_on` of `run_script`, {command} is the command line that was given.
GO_ON_TRAINING = "To go on: {command} --resume_from_checkpoint latest"
START_AGAIN = "To start again: {command}"
# What a user, a disk, a network or a device can be the reason of; the last ones, by the names of their classes or of
# classes that they inherit from. Other errors are faults of the program.
EXPECTED = (ValueError, OSError, ImportError, MemoryError)
EXPECTED_NAMES = {
    "OutOfMemoryError",  # torch
    "DistNetworkError",
    "DistStoreError",
    "SafetensorError",
    "HTTPError",  # httpx and huggingface_hub
    "EntryNotFoundError",
    "DatasetsError",
    "ArrowException",
    "HubPushError",  # ours
    "NonFiniteLossError",
}
EXPECTED_WORDS = (
    "DataLoader worker",
    "can't allocate memory",
    "Found no NVIDIA driver",
    "CUDA enabled",
    "device string",
)
# Of transformers' own option `--debug`; a test compares them.
DEBUG_FEATURES = {"underflow_overflow", "tpu_metrics_debug"}
FULL_DISK = ("No space left on device", "os error 28")
SMALLEST_SPACE = 1 << 20  # bytes; a disk with less is full
INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def run_script(main: Callable[[], None], *, go_on: str = START_AGAIN) -> None:
    """
    Call `main`; whatever ends it too early ends the program with one sentence.

    `--debug` on the command line shows the traceback as well; it is taken away before `main` reads the options. With
    the name of a feature it is an option of transformers, and stays. Without it the traceback of a fault of the
    program is kept in a temporary file, which the sentence names.

    Args:
        main: Reads `sys.argv`.
        go_on: A sentence that says how to go on after a stop.
    """
    go_on = go_on.replace("{command}", _command(set(go_on.split())))
    is_debugging = _take_debug(sys.argv)
    _tell_of_termination(f"Stopped by SIGTERM. {go_on}")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        if is_debugging:
            raise
        if _is_first_process():
            print(f"\nStopped by SIGINT. {go_on}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of the output has read enough, as `head` does
        _drop_output()
        raise SystemExit(BROKEN_PIPE) from None
    except Exception as error:
        if is_debugging:
            raise
        _drop_output_if_full()
        raise SystemExit(f"{describe(error)} ({_where(error)})") from None


def describe(error: BaseException) -> str:
    """One line that names the kind of error and says what it says."""
    # An error in a worker of the data loader says the worker's traceback, which ends with the error itself.
    said = str(error).strip().splitlines()[-1:] if "Original Traceback" in str(error) else [str(error)]
    text = " ".join(" ".join(said).split()).removeprefix(f"{type(error).__name__}: ")
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        text = error.strerror + ("" if error.filename is None else f": {error.filename}")
    if "TransportError" in _names_of(error):
        text = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')} cannot be reached. {text}"
    if "OutOfMemoryError" in _names_of(error):
        text = f"The memory of the device is full, use smaller batches. {text}"
    if any(_says_full(each) for each in _chain(error)):
        text = f"The disk is full{_full_places(error)}. {text}"
    return f"{type(error).__name__}: {text or 'no more is known'}"


def _is_expected(error: BaseException) -> bool:
    return (
        isinstance(error, EXPECTED)
        or bool(EXPECTED_NAMES & _names_of(error))
        or any(word in str(error) for word in EXPECTED_WORDS)
    )


def _names_of(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _where(error: BaseException) -> str:
    """How to see the traceback; that of a fault of the program is kept, as it may take a day to make it again."""
    if _is_expected(error):
        return "--debug shows where."
    try:
        with tempfile.NamedTemporaryFile("w", prefix="traceback-", suffix=".txt", delete=False) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return "a fault of the program; --debug shows where."
    return f"a fault of the program; the traceback is in {file.name}, and --debug shows it."


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _says_full(error: BaseException) -> bool:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or any(words in str(error) for words in FULL_DISK)


def _full_places(error: BaseException) -> str:
    """Names the file that could not be written; where the system does not say it, the folders without any space."""
    full = [each for each in _chain(error) if isinstance(each, OSError) and _says_full(each)]
    named = [each.filename for each in full if each.filename is not None]
    if named:
        return f" ({named[0]})"
    places = [os.getcwd(), tempfile.gettempdir(), os.environ.get("HF_HOME", os.path.expanduser("~/.cache"))]
    places += [place for word in sys.argv[1:] for place in (word.rpartition("=")[2], os.path.dirname(word))]
    spent = sorted(place for place in places if os.path.exists(place) and _free_space(place) < SMALLEST_SPACE)
    one_a_disk = {os.stat(place).st_dev: place for place in spent}
    return f" ({', '.join(one_a_disk.values())})" if spent else ""


def _free_space(place: str) -> int:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return SMALLEST_SPACE


def _drop_output() -> None:
    """Let the rest of the output go nowhere: Python would fail at it once more on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _drop_output_if_full() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _command(replaced: set[str]) -> str:
    """The command line of this program, as its user would write it again, but for the options in `replaced`."""
    program, *given = sys.argv
    options = []
    for number, word in enumerate(given):
        is_value = number > 0 and given[number - 1] in replaced and not word.startswith("--")
        if word.partition("=")[0] not in replaced and not is_value:
            options.append(word)
    words = sys.orig_argv[1 : len(sys.orig_argv) - len(given)]
    if "-m" in words and sys.orig_argv[len(sys.orig_argv) - len(given) :] == given:
        start = ["python", "-m", words[words.index("-m") + 1]]
    else:
        start = ["python", program] if program.endswith(".py") else [Path(program).name]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by a launcher, whose own options are not known here
        return f"torchrun ... {shlex.join([program, *options])}"
    return shlex.join([*start, *options])


def _tell_of_termination(sentence: str) -> None:
    """
    Print a sentence before SIGTERM ends the process, as it would without.

    No exception is raised for it: Python drops those that fall into a fork or into the end of an object. What is being
    written is then left behind as by a kill, which all of our files are made for.
    """
    pid = os.getpid()

    def tell(number: int, frame) -> None:
        if os.getpid() == pid and _is_first_process():  # a fork has inherited this
            os.write(2, f"{sentence}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, tell)


def _take_debug(argv: list[str]) -> bool:
    """Remove `--debug` from the words of a command line; whether it was there."""
    places = [
        place
        for place, word in enumerate(argv)
        if word == "--debug" and not DEBUG_FEATURES & {*argv[place + 1 : place + 2]}
    ]
    for place in reversed(places):
        del argv[place]
    return bool(places)
