"""Python processes that pay for no imports: a server imports once, and each process is a fork of it.

Importing torch and transformers takes four seconds of computing, more than most tests of a process do themselves.

    server = ForkServer("transformers.pipelines")  # a fresh interpreter
    server.run_python("script.py", "--option", "1")  # as `programs.run_python`
    server.stage("modeling_cots").start(function_of_a_test_file, 1).result()  # a fork that imports more, and forks

`bare_server`, `server_without_package` and `server_with_package` are those of the whole test run; they are offline.
"""

import atexit
import contextlib
import gc
import importlib
import importlib.util
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType

from programs import describe

TRANSFORMERS = ("torch", "transformers.pipelines", "transformers.models.auto.modeling_auto")


class ClientError(Exception):
    """An exception in a fork: the name of its class and its message; `traceback` is the fork's."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class ForkServer:
    """
    A process that forks for every call.

    Args:
        imports: Modules that all forks share.
        environment: That of the process, by default the caller's. What libraries read while they are imported is
            decided by it.
    """

    def __init__(self, *imports: str, environment: dict[str, str] | None = None):
        command = [sys.executable, __file__, *imports]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self._address = self._process.stdout.readline().strip()
        if not self._address:
            raise ClientError("The server of forks did not start")

    def stage(self, *imports: str) -> "ForkServer":
        """A fork that has imported more and forks in its turn; it ends with this server."""
        stage = object.__new__(ForkServer)
        stage._process, stage._address = None, self._ask("stage", imports).result()
        return stage

    def start(self, function: Callable, *args, **kwargs) -> "Call":
        """Begin to call a function of a test file; its module is imported for all later forks too."""
        return self._ask("call", function.__code__.co_filename, function.__name__, args, kwargs)

    def start_python(self, *arguments, environment=None, cwd=None, output=os.devnull, errors=os.devnull) -> "Call":
        """Begin `python ARGUMENTS` (`-c CODE` or a script); the call's result is the exit status."""
        call = self._ask("python", [str(word) for word in arguments], environment, cwd, str(output), str(errors))
        call.wait = lambda: self._ask("wait", call.pid).result()
        return call

    def run_python(self, *arguments, check: bool = True, timeout: float = 600, environment=None, cwd=None):
        """
        What `programs.run_python` does, in a fork.

        Args:
            environment: Variables to set beside those of the server.
        """
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder, "output"), Path(folder, "errors")
            call = self.start_python(*arguments, environment=environment, cwd=cwd, output=output, errors=errors)
            try:
                status = call.result(timeout)
            except ClientError as error:
                status = str(error)
            said = [path.read_text() if path.exists() else "" for path in (output, errors)]
        command = ["python", *map(str, arguments)]
        if isinstance(status, str) or (check and status != 0):
            raise AssertionError(describe(command, f"ended with {status}", *said))
        return subprocess.CompletedProcess(command, status, *said)

    def close(self) -> None:
        """End the server and its stages; of a stage, nothing."""
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()

    def _ask(self, *request) -> "Call":
        connection = Client(self._address)
        connection.send(request)
        return Call(connection)


class Call:
    """
    A call under way in a fork, a process with the id `pid`.

    `wait` is called when it has answered or died: a program has ended once its process has, with its locks on files.
    """

    def __init__(self, connection: Connection):
        self._connection = connection
        self.wait: Callable[[], None] = lambda: None
        self.pid = connection.recv()

    def result(self, timeout: float | None = None):
        with self._connection:
            if not self._connection.poll(timeout):
                os.kill(self.pid, signal.SIGKILL)
                raise ClientError(f"The fork took {timeout} seconds")
            try:
                result, error = self._connection.recv()
            except EOFError:
                error = ("The client died", "")
        self.wait()
        if error is not None:
            raise ClientError(*error)
        return result


# --- the servers of the test run


@cache
def bare_server() -> ForkServer:
    """torch and transformers, and nothing else: what `import modeling_cots` finds at least."""
    home = tempfile.mkdtemp(prefix="cots-forks-")
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": home, "HF_MODULES_CACHE": f"{home}/modules"}
    server = ForkServer(*TRANSFORMERS, environment={**os.environ, **settings})
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    atexit.register(server.close)
    return server


@cache
def server_without_package() -> ForkServer:
    return bare_server().stage("sentence_transformers")


@cache
def server_with_package() -> ForkServer:
    return bare_server().stage("modeling_cots.training.trainer", "modeling_cots.search.index")


# --- in the server and its forks


def load(path: str) -> ModuleType:
    """The module of a file: pytest gives test files names by which nobody else could import them."""
    if path not in sys.modules:
        spec = importlib.util.spec_from_file_location(path, path)
        sys.modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path])
    return sys.modules[path]


def answer_call(path: str, name: str, args: tuple, kwargs: dict) -> tuple:
    try:
        return getattr(load(path), name)(*args, **kwargs), None
    except Exception as error:
        return None, (f"{type(error).__name__}: {error}", traceback.format_exc())


def answer_python(arguments: list[str], environment: dict | None, cwd, output: str, errors: str) -> tuple:
    os.environ.update(environment or {})
    for path, number in ((os.devnull, 0), (output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(cwd or os.getcwd())
    status = 1
    try:
        if arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    return status, None


def serve(announce: Callable) -> None:
    """Fork for every request, until SIGTERM or the parent's end."""
    parent, children = os.getppid(), set()

    def end(*_) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)
        for child in children:
            os.waitpid(child, 0)
        sys.exit()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGALRM, lambda *_: os.getppid() == parent or end())  # the tests were killed
    signal.setitimer(signal.ITIMER_REAL, 5, 5)
    with tempfile.TemporaryDirectory(prefix="cots-") as folder, Listener(f"{folder}/socket") as listener:
        announce(listener.address)
        while True:
            with listener.accept() as connection:
                kind, *request = connection.recv()
                if kind == "wait":
                    wait_for(children, *request)
                    connection.send(os.getpid())
                    connection.send((None, None))
                    continue
                if kind == "call":
                    with contextlib.suppress(Exception):  # what is wrong with it, the fork will say
                        load(request[0])
                gc.freeze()  # or the forks' collections would go through, and so copy, all that was imported
                children -= {child for child in children if os.waitpid(child, os.WNOHANG)[0] == child}
                child = os.fork()
                if child != 0:
                    children.add(child)
                    continue
                try:
                    serve_fork(connection, kind, request)
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(0)


def wait_for(children: set[int], child: int) -> None:
    if child in children:
        os.waitpid(child, 0)
        children.remove(child)


def serve_fork(connection: Connection, kind: str, request: list) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection.send(os.getpid())
    if kind == "stage":
        import_all(*request)
        serve(lambda address: connection.send((address, None)))
    connection.send((answer_call if kind == "call" else answer_python)(*request))


def import_all(names) -> None:
    for name in names:
        importlib.import_module(name)


if __name__ == "__main__":
    import_all(sys.argv[1:])
    try:
        serve(lambda address: print(address, flush=True))
    finally:
        os._exit(0)  # some libraries complain of an interpreter that shuts down
