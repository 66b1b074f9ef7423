"""`SearchServer`: answers a browser and JSON over HTTP, with one index and its model in memory.

    GET  /                    the page with a form; ?text=, ?where=, ?top= search at once
    POST /                    the form, with an image perhaps
    GET  /search?text=...     JSON
    POST /search              JSON, or a form: text, image (base64 in JSON), image_weight, top, where

Requests may come from strangers. Bodies, texts and images have the bounds of the endpoint's handler. Each connection
carries one request, which has to arrive within `REQUEST_SECONDS`; there are `MAX_CONNECTIONS` at a time, and one of
them is computed at a time. Nothing is fetched, and no file is read: thumbnails come out of the index.
"""

import base64
import contextlib
import email.message
import email.parser
import ipaddress
import json
import socket
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image
from transformers.utils import logging

from ..data.messages import shown
from ..hub.handler import MAX_IMAGE_BYTES, RequestError, check_texts, decode_image, load_image
from .index import SearchIndex, state_notes
from .options import MAX_TOP
from .page import results_page, search_form
from .rows import CONTENT, FIXED_COLUMNS

logger = logging.get_logger(__name__)

FIELDS = ("text", "image", "image_weight", "top", "where")
MAX_BODY_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 2**20  # an image in base64, and the rest
MAX_CONNECTIONS = 16
MAX_FIELDS = 32
MAX_HEAD_BYTES = 4_096  # of one part of a form
IDLE_SECONDS = 10.0  # without a byte
REQUEST_SECONDS = 60.0  # for the whole request
BLANK = {"text": "", "where": "", "top": "12"}


@dataclass(frozen=True)
class Query:
    """A checked request; the arguments of `SearchIndex.search`, with the image still encoded."""

    text: str | None
    image: str | bytes | None
    image_weight: float
    top: int
    where: tuple[str, ...]


class Refusal(Exception):
    """An answer other than results: a status, and one sentence for whoever has asked."""

    def __init__(self, status: HTTPStatus, sentence: str):
        super().__init__(sentence)
        self.status = status


class SearchServer(ThreadingHTTPServer):
    """
    Listens at an address from construction on, and answers once it has an index (`answer_from`).

    Args:
        host: An address of this machine, or a name of one.
        port: 0 for any that is free.

    Raises `ValueError` for an address that is in use or not this machine's.
    """

    daemon_threads = True

    def __init__(self, host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), SearchHandler)
        except OSError as error:
            raise ValueError(
                f"Cannot listen at {host}, port {port} ({error.strerror or error}): give another --port, or the "
                "--host of this machine."
            ) from error
        self.index: SearchIndex | None = None
        self.name = ""
        self.computing = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.is_loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def server_bind(self) -> None:
        """As a TCP server does: an HTTP server also asks the network for its name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def answer_from(self, index: SearchIndex, name: str) -> None:
        """Answer from this index; `name` is what messages call it."""
        self.index, self.name = index, name

    def process_request(self, request, client_address) -> None:
        """Give the connection a thread; where all are taken, refuse it."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is no error; others are logged."""
        logger.info("A connection ended early.", exc_info=True)

    def search(self, query: Query) -> tuple[list[dict], list[str]]:
        """The hits for a query, and notes for whoever has asked."""
        assert self.index is not None
        with self.computing:  # also while an image is decoded, so that many large ones do not fill the memory
            image = None if query.image is None else _open_image(query.image)
            hits = self.index.search(
                query.text, image, image_weight=query.image_weight, top=query.top, where=list(query.where)
            )
            notes = state_notes(self.index.store, self.name)
            if query.text is not None and (note := self.index.words_note(query.text)):
                notes.append(note)
        return hits, notes


class SearchHandler(BaseHTTPRequestHandler):
    """One request of a [`SearchServer`]."""

    server: SearchServer
    server_version, sys_version = "cots-search", ""
    timeout = IDLE_SECONDS

    def handle(self) -> None:
        # A socket's timeout starts again with every byte, so that a slow client could go on forever.
        self.watchdog = threading.Timer(REQUEST_SECONDS, _shut_down, [self.connection])
        self.watchdog.daemon = True
        self.watchdog.start()
        try:
            super().handle()
        finally:
            self.watchdog.cancel()

    def do_GET(self) -> None:
        self._answer(self._fields_of_address)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._fields_of_body)

    def _refuse_method(self) -> None:
        def refuse() -> dict:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} is refused: use GET or POST.")

        self._answer(refuse)

    do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def _answer(self, read_fields: Callable[[], dict[str, Any]]) -> None:
        """Answer a request whose fields `read_fields` reads: a page for /, JSON for /search."""
        path, fields = "", {}
        try:
            path = urlsplit(self.path).path
            if path not in ("/", "/search"):
                raise Refusal(HTTPStatus.NOT_FOUND, "There is nothing here: the page is at /, and JSON at /search.")
            self._check_host()
            fields = read_fields()
            self.watchdog.cancel()
            if path == "/" and not any(fields.get(name) for name in ("text", "image")) and self.command != "POST":
                self._send_page(HTTPStatus.OK, fields)
                return
            query = check_fields(fields)
            hits, notes = self.server.search(query)
        except Refusal as refusal:
            self._send_refusal(refusal.status, str(refusal), path, fields)
        except ValueError as error:
            self._send_refusal(HTTPStatus.BAD_REQUEST, str(error), path, fields)
        except (OSError, TimeoutError):
            raise
        except Exception:
            logger.exception("A request failed.")
            sentence = "The request could not be answered; the server's own messages say why."
            self._send_refusal(HTTPStatus.INTERNAL_SERVER_ERROR, sentence, path, fields)
        else:
            if path == "/":
                self._send_page(HTTPStatus.OK, fields, hits, notes)
            else:
                self._send_json(HTTPStatus.OK, {"hits": [as_json(hit) for hit in hits], "notes": notes})

    def _check_host(self) -> None:
        """Refuse the name of another host, by which a page in this machine's browser could ask in its stead."""
        host = urlsplit(f"//{self.headers.get('Host', 'localhost')}").hostname or ""
        if self.server.is_loopback and host not in ("localhost", "127.0.0.1", "::1", self.server.server_name):
            raise Refusal(HTTPStatus.FORBIDDEN, f"This server is at {self.server.address}, and has no other name.")

    def _fields_of_address(self) -> dict:
        return parse_form(urlsplit(self.path).query)

    def _fields_of_body(self) -> dict:
        kind = self.headers.get_content_type()
        body = self._read_body()
        if kind == "application/json":
            return parse_json(body)
        if kind == "multipart/form-data":
            return parse_multipart(body, self.headers.get("Content-Type", ""))
        if kind == "application/x-www-form-urlencoded":
            return parse_form(body.decode("latin-1"))
        raise Refusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"A body of type {shown(kind)} is refused: send application/json or multipart/form-data.",
        )

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "The request needs a body and its Content-Length.")
        if len(length) > 12 or int(length) > MAX_BODY_BYTES:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The body is larger than {MAX_BODY_BYTES:,} bytes, as it says."
            )
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "The body did not come in time.") from None
        if len(body) < int(length):
            raise Refusal(HTTPStatus.BAD_REQUEST, "The body is shorter than its Content-Length.")
        self.has_read_body = True
        return body

    has_read_body = False

    def _send_page(
        self, status: HTTPStatus, fields: dict, hits: list[dict] | None = None, notes: list[str] | None = None
    ) -> None:
        assert self.server.index is not None
        values = {name: _shown_value(fields.get(name), blank) for name, blank in BLANK.items()}
        title = "Search" if hits is None else f"Images for {_asked(fields)}"
        note = f"{len(self.server.index):,} images" if hits is None else f"{len(hits)} of {len(self.server.index):,}"
        page = results_page(title, hits, " ".join([f"{note}.", *(notes or [])]), form=search_form(**values))
        self._send(status, "text/html; charset=utf-8", page.encode("utf-8"))

    def _send_json(self, status: HTTPStatus, content: dict) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send_refusal(self, status: HTTPStatus, sentence: str, path: str, fields: dict) -> None:
        if path == "/" and self.server.index is not None and self.command in ("GET", "POST"):
            values = {name: _shown_value(fields.get(name), blank) for name, blank in BLANK.items()}
            page = results_page("Search", None, sentence, form=search_form(**values))
            self._send(status, "text/html; charset=utf-8", page.encode("utf-8"))
        else:
            self._send_json(status, {"error": sentence})

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'; form-action 'self'")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD, POST")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        has_body = any(self.headers.get(name, "0") != "0" for name in ("Content-Length", "Transfer-Encoding"))
        if has_body and not self.has_read_body:
            self._drain()

    def _drain(self) -> None:
        """Read what a refused client still sends: closing before would take our answer away from it."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(2**16):
                pass

    def send_error(self, code, message=None, explain=None) -> None:
        """The answer to a request that is no HTTP, as JSON."""
        self.headers = getattr(self, "headers", None) or email.message.Message()
        status = HTTPStatus(code)
        self._send_json(status, {"error": f"{message or status.phrase}."})

    def log_message(self, format: str, *args) -> None:
        logger.info(format, *args)


def parse_form(text: str) -> dict[str, Any]:
    """The fields of an address or of a form without files. Raises `RequestError`."""
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise RequestError(f"The form cannot be read: {error}.") from error
    return {name: values if name == "where" else values[-1] for name, values in fields.items()}


def parse_json(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object. Raises `RequestError` for anything else."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("The body is not JSON.") from error
    if not isinstance(fields, dict):
        raise RequestError('The body must be a JSON object, such as {"text": "a dog in the snow"}.')
    return fields


def parse_multipart(body: bytes, content_type: str) -> dict[str, Any]:
    """
    The fields of a form, the image as bytes. Raises `RequestError` for a body of another form.

    Split by bytes: Python's parser of mail works line by line, and takes any nesting.
    """
    header = email.message.Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary("")
    if not boundary:
        raise RequestError("The form has no boundary in its Content-Type.")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"), MAX_FIELDS)
    if not parts or not parts[-1].startswith(b"--"):
        raise RequestError(f"The form is cut short, or has more than {MAX_FIELDS - 2} fields.")
    fields: dict[str, Any] = {}
    for part in parts[:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD_BYTES:
            raise RequestError("A part of the form has too long a head.")
        headers = email.parser.BytesHeaderParser().parsebytes(head.lstrip(b"\r\n"))
        name = headers.get_param("name", header="content-disposition")
        if name == "image":
            fields["image"] = content or None
        elif name == "where":
            fields.setdefault("where", []).append(content.decode("utf-8", "replace"))
        elif isinstance(name, str):
            fields[name] = content.decode("utf-8", "replace")
        else:
            raise RequestError("A part of the form has no name.")
    return fields


def check_fields(fields: dict[str, Any]) -> Query:
    """The query that the fields of a request mean. Raises `RequestError` where they mean none."""
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise RequestError(f"There is no field {shown(unknown[0])}; there are {', '.join(FIELDS)}.")
    text, image = fields.get("text"), fields.get("image")
    if isinstance(text, str) and not text.strip():
        text = None
    if text is None and not image:
        raise RequestError("Give a text, an image or both to search for.")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'text' must be a string, got {shown(text)}.")
    if image is not None and not isinstance(image, str | bytes):
        raise RequestError("'image' must be a string: the file in base64.")
    where = fields.get("where") or []
    where = [where] if isinstance(where, str) else where
    if not isinstance(where, list) or not all(isinstance(condition, str) for condition in where):
        raise RequestError("'where' must be a condition such as 'year >= 2020', or a list of conditions.")
    if len(where) > MAX_FIELDS:
        raise RequestError(f"'where' has {len(where)} conditions; at most {MAX_FIELDS} are taken.")
    return Query(
        text=None if text is None else _as_sentence(check_texts, "text", text)[0],
        image=image or None,
        image_weight=_number(fields, "image_weight", 0.5, 0, 1, float),
        top=_number(fields, "top", 12, 1, MAX_TOP, int),
        where=tuple(condition for condition in where if condition.strip()),
    )


def _number(fields: dict, name: str, default, least, most, kind: type):
    """A number between two bounds, written as a number or as a text."""
    value = fields.get(name)
    if value is None or value == "":
        return default
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and least <= kind(value) <= most:
            if kind(value) == float(value):
                return kind(value)
    except (ValueError, OverflowError):
        pass
    raise RequestError(f"{name!r} must be a number from {least} to {most:,}, got {shown(value)}.")


def _open_image(image: str | bytes) -> Image.Image:
    """An uploaded image within the handler's bounds; of a text, base64 or a data URL alone."""
    if isinstance(image, str):
        if image.lstrip()[:5].lower().startswith(("http:", "https", "file:", "ftp:")):
            raise RequestError("'image' is an address, and this server fetches none: send the file in base64.")
        return _as_sentence(load_image, image)
    if len(image) > MAX_IMAGE_BYTES:
        raise RequestError(f"The image is larger than {MAX_IMAGE_BYTES:,} bytes.")
    return _as_sentence(decode_image, image)


def _as_sentence(function, *args):
    """Call a function of the handler, whose messages are parts of a sentence."""
    try:
        return function(*args)
    except RequestError as error:
        raise RequestError(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error


def as_json(hit: dict) -> dict:
    """A hit as JSON holds it: the thumbnail as JPEG in base64, and the metadata by themselves."""
    own = ("name", "source", "captions", "score", "copies")
    thumbnail = hit["thumbnail"]
    return {
        **{name: hit[name] for name in own},
        "metadata": {
            name: value
            for name, value in hit.items()
            if name not in (*own, *FIXED_COLUMNS, CONTENT) and value is not None
        },
        "thumbnail": base64.b64encode(thumbnail["bytes"]).decode() if thumbnail and thumbnail["bytes"] else None,
    }


def _asked(fields: dict) -> str:
    text = fields.get("text")
    asked = [f"“{text}”"] if isinstance(text, str) and text.strip() else []
    return " and ".join([*asked, *(["the uploaded image"] if fields.get("image") else [])])


def _shown_value(value, blank: str) -> str:
    """The value of a field as the form shows it again."""
    if isinstance(value, list):
        value = next((each for each in value if isinstance(each, str)), blank)
    return value if isinstance(value, str) else blank if value is None else str(value)


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
