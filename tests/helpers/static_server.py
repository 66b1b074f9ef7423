"""A static web server on the loopback, as a Space or any other host of files is one; what it serves can be damaged."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loopback import serve


class StaticSite:
    """
    A folder as a web site.

    Attributes:
        url: Its address.
        replaced: By path, what is served in the place of a file; `None` for a file that is not there.
        gates: By path, an event that the server waits for before it sends a file.
        is_down: Whether it breaks off every connection.
        requests: The paths that were asked for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = ""
        self.replaced: dict[str, bytes | None] = {}
        self.gates: dict[str, threading.Event] = {}
        self.is_down = False
        self.requests: list[str] = []


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, site: StaticSite, *args):
        self.site = site
        super().__init__(*args, directory=str(site.folder))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        self.site.requests.append(path)
        if self.site.is_down:
            self.close_connection = True
            return
        if path in self.site.gates:
            self.site.gates[path].wait(60)
        content = self.site.replaced.get(path, b"")
        if content is None:
            self.send_error(404)
        elif content:
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(path))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            super().do_GET()

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serve_static(folder: Path) -> Iterator[StaticSite]:
    """Serve a folder for as long as a test needs it."""
    site = StaticSite(folder)
    with serve(functools.partial(_Handler, site)) as site.url:
        yield site
