"""Programs that tests start: what one said is shown when it fails, and nothing that it started outlives it."""

import os
import subprocess
import sys

import psutil

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node")
MAX_SHOWN = 6_000  # characters of an output


def run_python(*arguments: str, check: bool = True, timeout: float = 600, env=None, **options):
    """
    Run `python ARGUMENTS`; returns the `CompletedProcess` with its output and errors.

    Raises `AssertionError` with both where it fails (unless not to be checked) and where it takes `timeout` seconds.
    """
    # A crash outside Python says where it was.
    env = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_with_children(process)
        output, errors = process.communicate()
        raise AssertionError(describe(command, f"took {timeout} seconds", output, errors)) from None
    if check and process.returncode != 0:
        raise AssertionError(describe(command, f"ended with {process.returncode}", output, errors))
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def kill_with_children(process: subprocess.Popen) -> None:
    """torchrun gives its processes their own sessions: killing it alone would leave them at work."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        member.kill()
    psutil.wait_procs(family[1:], timeout=60)


def describe(command: list[str], what: str, output: str, errors: str) -> str:
    return f"{what}: {' '.join(command)}\n--- output\n{output[-MAX_SHOWN:]}\n--- errors\n{errors[-MAX_SHOWN:]}"
