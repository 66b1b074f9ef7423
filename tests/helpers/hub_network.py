"""HTTP on the loopback with a wire that can be cut: the part of the test hub that knows nothing of models.

A [`Server`] answers requests through a function; all servers of one [`Network`] share its faults and its record.
"""

import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

PIECE = 16384


@dataclass(frozen=True)
class Request:
    """One request, its body complete. `path` is still quoted; header names are in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """Status, headers and the whole content, of which a HEAD request gets the length and a range request a part."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""


@dataclass
class Fault:
    """Breaks the connection whose request matches `during` once `bytes_left` of its bodies have passed."""

    during: re.Pattern
    bytes_left: int
    for_good: bool


class ConnectionCut(ConnectionError):
    """The wire broke while this request was on it."""


class Network:
    """The wire between clients and servers."""

    def __init__(self):
        self.servers: list[Server] = []
        self.requests: list[Request] = []  # what arrived, without bodies; also requests that were cut
        self.is_down = False
        self._fault: Fault | None = None
        self._lost_answer: re.Pattern | None = None
        self._lock = threading.Lock()

    def vanish_after(self, num_bytes: int, during: str) -> None:
        """
        Cut the next matching connection in the middle, and refuse every one after it until [`come_back`].

        Args:
            num_bytes: How much of the bodies of matching requests and of their answers passes before that.
            during: Regular expression that the start of "METHOD /path" matches, such as "PUT" or "POST .*/commit/".
        """
        self._fault = Fault(re.compile(during), num_bytes, for_good=True)

    def hiccup_after(self, num_bytes: int, during: str) -> None:
        """As [`vanish_after`], for one connection only."""
        self._fault = Fault(re.compile(during), num_bytes, for_good=False)

    def lose_answer(self, to: str) -> None:
        """Carry out the next matching request, but cut its connection before the answer."""
        self._lost_answer = re.compile(to)

    def go_down(self) -> None:
        """Refuse every connection until [`come_back`]."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self.is_down = True
        for server in self.servers:
            server.close()

    def come_back(self) -> None:
        with self._lock:
            if self.is_down:
                self.is_down = False
                for server in self.servers:
                    server.open()

    def reset_(self) -> None:
        """Whole again, and without a past."""
        self._fault = self._lost_answer = None
        self.come_back()
        self.requests.clear()

    def carry(self, line: str, num_bytes: int) -> int:
        """How many of the next `num_bytes` of a request ("METHOD /path") or its answer get through."""
        with self._lock:
            fault = self._fault
            if self.is_down:
                return 0
            if fault is None or not fault.during.match(line):
                return num_bytes
            if num_bytes <= fault.bytes_left:
                fault.bytes_left -= num_bytes
                return num_bytes
            self._fault = None
            if fault.for_good:
                self._close()
            return fault.bytes_left

    def loses_answer(self, line: str) -> bool:
        with self._lock:
            lost = self._lost_answer is not None and self._lost_answer.match(line) is not None
            if lost:
                self._lost_answer = None
            return lost


class Server(ThreadingHTTPServer):
    """A server on a port of the loopback that it keeps; `answer` maps a [`Request`] to an [`Answer`]."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, network: Network, answer: Callable[[Request], Answer]):
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()
        self.network, self.answer = network, answer
        self.url = f"http://127.0.0.1:{self.server_port}"
        network.servers.append(self)

    def open(self) -> None:
        """Serve, in its own thread."""
        self.server_activate()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Refuse connections: a socket that is bound but does not listen holds the port."""
        self.shutdown()
        self._thread.join()
        self.socket.close()
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def exchange(self) -> None:
        network = self.server.network
        self.line = f"{self.command} {self.path}"
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        network.requests.append(Request(self.command, url.path, query, headers, b""))
        try:
            if network.is_down:  # a connection that was open before
                raise ConnectionCut
            body = b"".join(self.pieces_of_body())
            self.send(self.server.answer(Request(self.command, url.path, query, headers, body)))
        except ConnectionError:  # cut by the test, or hung up by the client: nobody is left to be told
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = exchange

    def pieces_of_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield from self.receive(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self.receive(int(self.headers.get("Content-Length", 0)))

    def receive(self, size: int):
        while size:
            piece = self.rfile.read(min(size, PIECE))
            if not piece or self.server.network.carry(self.line, len(piece)) < len(piece):
                raise ConnectionCut
            size -= len(piece)
            yield piece

    def send(self, answer: Answer) -> None:
        content = answer.content
        if (part := self.headers.get("Range")) is not None and answer.status == 200:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", part).groups()
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
            answer.status = 206 if start < len(content) else 416
            answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content = content[start:stop]
        if self.server.network.loses_answer(self.line):
            raise ConnectionCut
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            passed = self.server.network.carry(self.line, len(content))
            self.wfile.write(content[:passed])
            if passed < len(content):
                raise ConnectionCut

    def log_message(self, *args) -> None:
        """Quiet: `Network.requests` is the record."""
