"""Programs that run in forks of one process which has imported the libraries: the imports, which take seconds, once.

A program sees its own command line, folder, output and exit status, as one started by a shell does.
"""

import faulthandler
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from programs import describe

PRELOADED = (
    "modeling_cots",
    "modeling_cots.scripts.factory",
    "modeling_cots.search.cli",
    "modeling_cots.training.trainer",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run_preloaded(arguments: list[str], folder: Path, environment: dict[str, str], timeout: float) -> None:
    """
    Run `python ARGUMENTS` (`SCRIPT.py ...`, `-m MODULE ...` or `-c CODE`) in `folder`.

    Raises `AssertionError` with the output where it fails, and where it takes `timeout` seconds.
    """
    log = folder / "program.log"
    program = _context.Process(target=_run, args=(arguments, str(folder), environment, str(log)))
    program.start()
    program.join(timeout)
    if program.is_alive():
        program.kill()
        program.join()
    if program.exitcode != 0:
        raise AssertionError(describe(["python", *arguments], f"ended with {program.exitcode}", log.read_text(), ""))


def _run(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    faulthandler.enable()
    os.chdir(folder)
    os.environ.update(environment)
    kind, *rest = arguments
    sys.orig_argv = ["python", *arguments]
    if kind == "-c":
        sys.argv = ["-c"]
        exec(compile(rest[0], "<page>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")
