"""The handler of Inference Endpoints, which stands in a model repository as `handler.py` and answers requests.

It answers three kinds of requests: how well labels fit an image (zero-shot classification), the embedding of an image,
and embeddings of texts. Requests come from strangers. A payload is checked before it is used. An image is limited in
bytes and pixels. A URL is fetched only from public addresses: its host name is resolved once, all addresses are
checked, and the connection goes to one of them, again for every redirect. A request that fails is answered with
`{"error": ...}`. This file imports nothing from the package: it is loaded by its path. On a machine without a GPU a
repository with ONNX files is run by onnxruntime, and torch is not imported.
"""

import base64
import contextlib
import http.client
import importlib.util
import io
import ipaddress
import logging
import math
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

logger = logging.getLogger(__name__)

GPU = "/dev/nvidia0"  # there, torch's float16 and batches are faster than what onnxruntime does on the CPU
FIELDS = ("image", "text", "candidate_labels", "hypothesis_template")
MAX_TEXTS = 256
MAX_TEXT_LENGTH = 10_000  # characters; the tokenizer cuts at far fewer
MAX_IMAGE_BYTES = 20 * 2**20
MAX_IMAGE_PIXELS = 50_000_000
MAX_IMAGE_SIDE = 2**16 - 1  # the processor's limit: resizing what is longer makes gigabytes
FETCH_SECONDS = 10.0  # for connecting, all redirects and the whole body together
MAX_REDIRECTS = 3
# Common formats only: other decoders of Pillow run programs (EPS) or are little tested.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
DEFAULT_PORTS = {"http": 80, "https": 443}
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# All of IANA's special-purpose registries, of IPv6 what lies in 2000::/3, also where the registries say "globally
# reachable": no image is served from there. Python's own `is_global` knows those of its release date only.
SPECIAL_BLOCKS = tuple(
    map(
        ipaddress.ip_network,
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
        "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
        "203.0.113.0/24 240.0.0.0/4 2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20".split(),
    )
)
HEADERS = {"User-Agent": "cots-handler", "Accept": "image/jpeg, image/png, image/webp", "Connection": "close"}
URL_SAFE = "/%:@!$&'()*+,;=~?"
INTERNAL_ERROR = "internal error: the request could not be answered"
SURROGATES = re.compile("[\ud800-\udfff]")  # characters that JSON can hold and UTF-8 cannot


class RequestError(ValueError):
    """A refused request, with a message for its sender."""


@dataclass(frozen=True)
class Query:
    """
    A checked request.

    Args:
        image: An image, its URL, or its content in base64. `None` if the request has texts only.
        texts: Texts to embed or, with an image, to compare it with.
        labels: The name of each text in the answer to a classification; empty for other requests.
        is_batch: Whether the request has a list of texts, so that the answer is a list of embeddings.
    """

    image: Image.Image | str | None = None
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    is_batch: bool = False


@dataclass(frozen=True)
class Request:
    """
    A request that has been read.

    Args:
        query: What it asks; `None` if it is refused.
        pixel_values: Its image (1, 3, H, W); `None` without one.
        error: Why it is refused.
    """

    query: Query | None = None
    pixel_values: Any = None
    error: str | None = None


def parse_payload(data: Any) -> Query:
    """
    Check a request body.

    `inputs` is an image, a text, a list of texts, or a dict with `image` or `text`. A bare string is an image if it
    comes with labels or is a URL, else a text. `candidate_labels` (a list, or a string with commas) and
    `hypothesis_template` stand in `parameters` or in the dict.

    Raises [`RequestError`] for everything else.
    """
    if not isinstance(data, dict) or "inputs" not in data:
        raise RequestError("the request must be an object with the field 'inputs'")
    fields = _as_fields(data["inputs"], data.get("parameters"))
    image, text, labels, template = (fields.pop(name, None) for name in FIELDS)
    if fields:
        raise RequestError(f"unknown field {min(map(repr, fields))[:50]}; known are {', '.join(FIELDS)}")
    if (image is None) == (text is None):
        raise RequestError("the request must have either an image or a text; labels go into 'candidate_labels'")
    if labels is None and template is not None:
        raise RequestError("'hypothesis_template' needs 'candidate_labels'")
    if image is None:
        if labels is not None:
            raise RequestError("'candidate_labels' need an image")
        return Query(texts=check_texts("text", text), is_batch=isinstance(text, list))
    if not isinstance(image, Image.Image | str):
        raise RequestError("'image' must be a string: base64, or a URL of scheme http, https or data")
    if labels is None:
        return Query(image)
    labels = labels.split(",") if isinstance(labels, str) else labels
    labels = tuple(label.strip() for label in check_texts("candidate_labels", labels))
    return Query(image, _fill_in(template, labels), labels)


def _fill_in(template: Any, labels: tuple[str, ...]) -> tuple[str, ...]:
    template = "This is a photo of {}." if template is None else template  # as the pipeline of the same task
    (template,) = check_texts("hypothesis_template", template if isinstance(template, str) else None)
    if template.count("{}") != 1:
        raise RequestError("'hypothesis_template' must have the place of the label, {}, once")
    return tuple(template.replace("{}", label) for label in labels)


def _as_fields(inputs: Any, parameters: Any) -> dict:
    parameters = {} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise RequestError("'parameters' must be an object")
    if isinstance(inputs, str):
        has_labels = parameters.get("candidate_labels") is not None
        is_image = has_labels or re.match(r"(data:image/|https?://)\S+$", inputs, re.IGNORECASE)
        inputs = {"image" if is_image else "text": inputs}
    elif isinstance(inputs, Image.Image):
        inputs = {"image": inputs}
    elif isinstance(inputs, list):
        inputs = {"text": inputs}
    elif not isinstance(inputs, dict):
        raise RequestError("'inputs' must be a string, a list of strings, or an object with 'image' or 'text'")
    if inputs.keys() & parameters.keys():
        raise RequestError("a field stands both in 'inputs' and in 'parameters'")
    return {**inputs, **parameters}


def check_texts(name: str, texts: Any) -> tuple[str, ...]:
    """One or several texts of a request as a tuple. Raises [`RequestError`] for other values, and for texts of any
    other number or length, without a word, or that are not valid Unicode; `name` is their field."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"'{name}' must be a string or a list of strings")
    if not 1 <= len(texts) <= MAX_TEXTS or max(map(len, texts)) > MAX_TEXT_LENGTH:
        raise RequestError(f"'{name}' must be 1 to {MAX_TEXTS} strings of at most {MAX_TEXT_LENGTH} characters")
    for text in texts:
        if not text.strip() or SURROGATES.search(text):
            raise RequestError(f"'{name}' has a string that is empty or not valid Unicode")
    return tuple(texts)


def load_image(source: Image.Image | str) -> Image.Image:
    """
    A decoded image, of the mode and the orientation that it is stored in: the processor turns it into RGB, upright.

    Args:
        source: A PIL image, an http, https or data URL, or base64. Never a path: no file of this machine is opened.

    Raises [`RequestError`] for any other scheme, an address that is not public, too many bytes or pixels, a source
    that takes too long, and what is not an image.
    """
    if isinstance(source, Image.Image):
        return decode_image(source)
    scheme = re.match(r"\s*([a-z][a-z0-9+.-]*):", source[:100], re.IGNORECASE)  # no base64 has a colon
    if scheme is None:
        return decode_image(_decode_base64(source))
    if scheme[1].lower() == "data":
        header, _, content = source.partition(",")
        if not header.lower().endswith(";base64"):
            raise RequestError("a data URL must be of base64: data:image/png;base64,...")
        return decode_image(_decode_base64(content))
    return decode_image(fetch(source))


def _decode_base64(text: str) -> bytes:
    too_large = RequestError(f"the image is larger than {MAX_IMAGE_BYTES} bytes")
    if len(text) > 2 * MAX_IMAGE_BYTES:  # not even decoded: base64 takes four characters for three bytes
        raise too_large
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise RequestError("the image is neither a URL nor valid base64") from error
    if len(content) > MAX_IMAGE_BYTES:
        raise too_large
    return content


def decode_image(source: Image.Image | bytes) -> Image.Image:
    """An image, or the content of its file, decoded as `load_image` does. Raises [`RequestError`]."""
    try:
        image = Image.open(io.BytesIO(source), formats=IMAGE_FORMATS) if isinstance(source, bytes) else source
        width, height = image.size
        is_bounded = width * height <= MAX_IMAGE_PIXELS and max(width, height) <= MAX_IMAGE_SIDE
        if is_bounded:  # known before anything is decoded
            image.load()
            return image
    except Image.DecompressionBombError:
        pass
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        formats = ", ".join(IMAGE_FORMATS)
        raise RequestError(f"the image cannot be read: it is damaged, or none of {formats}") from error
    raise RequestError(
        f"the image has more than {MAX_IMAGE_PIXELS} pixels, or a side of more than {MAX_IMAGE_SIDE} pixels"
    )


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: not to this machine, its network or a tunnel there."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    is_unicast = not ip.is_multicast if ip.version == 4 else ip in GLOBAL_UNICAST
    return is_unicast and ip.is_global and not any(ip in block for block in SPECIAL_BLOCKS)


def fetch(url: str) -> bytes:
    """
    The body behind an http or https URL, of at most `MAX_IMAGE_BYTES`, within `FETCH_SECONDS`.

    Directly, not through a proxy, which would resolve names on its own. The time for resolving the name is up to the
    system's resolver. Raises [`RequestError`].
    """
    deadline = time.monotonic() + FETCH_SECONDS
    try:
        body = _follow(url, deadline)
    except RequestError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: what is no URL
        if time.monotonic() < deadline and not isinstance(error, TimeoutError):
            raise RequestError("the image cannot be fetched from its URL") from error
        body = None
    if body is None or time.monotonic() >= deadline:  # cut short by the deadline, a body may look complete
        raise RequestError(f"fetching the image took longer than {FETCH_SECONDS:g} seconds")
    return body


def _follow(url: str, deadline: float) -> bytes:
    for _ in range(1 + MAX_REDIRECTS):
        parts = urlsplit(url)
        if parts.scheme not in DEFAULT_PORTS:
            raise RequestError(f"a URL of scheme {parts.scheme[:20]!r} is refused: only http, https and data are read")
        if not parts.hostname or "@" in parts.netloc:
            raise RequestError("the URL of the image has no host, or a user")
        host, port = parts.hostname.encode("idna").decode(), parts.port or DEFAULT_PORTS[parts.scheme]
        with _connected(parts.scheme, host, port, deadline) as connection:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", quote(target, safe=URL_SAFE), headers=HEADERS)
            with connection.getresponse() as response:
                if response.status not in (301, 302, 303, 307, 308):
                    return _read(response)
                url = urljoin(url, response.getheader("Location", ""))
    raise RequestError(f"the URL of the image redirects more than {MAX_REDIRECTS} times")


def _read(response: http.client.HTTPResponse) -> bytes:
    if response.status != 200:
        raise RequestError(f"the URL of the image answers with status {response.status}")
    body = response.read(MAX_IMAGE_BYTES + 1)
    if len(body) > MAX_IMAGE_BYTES:
        raise RequestError(f"the image is larger than {MAX_IMAGE_BYTES} bytes")
    return body


@contextlib.contextmanager
def _connected(scheme: str, host: str, port: int, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to a checked address of `host`, closed at the deadline whatever the host does."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_connect(host, port, deadline))
        if scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
            stack.enter_context(sock)
        # A socket's timeout starts again with every byte, so that a slow host could go on forever.
        watchdog = threading.Timer(deadline - time.monotonic(), _shut_down, [sock])
        watchdog.daemon = True
        watchdog.start()
        stack.callback(watchdog.cancel)
        if scheme == "https":
            sock.do_handshake()  # type: ignore[attr-defined]
        connection = http.client.HTTPConnection(host, port)
        connection.sock, connection.default_port = sock, DEFAULT_PORTS[scheme]
        yield connection


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(str(socket_address[0])) for *_, socket_address in addresses):
        raise RequestError("the host in the URL of the image has an address that is not public")
    error: OSError | None = None
    for family, kind, protocol, _, socket_address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            sock.connect(socket_address)
            return sock
        except OSError as failure:
            sock.close()
            error = failure
    raise error or OSError("no address")


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class EndpointHandler:
    """
    Answers requests; Inference Endpoints load and call it.

    Args:
        path: Folder of the model repository. Its own code is trusted, as this file is part of it.
    """

    def __init__(self, path: str = ""):
        load = load_onnx if runs_onnx(path) else load_torch
        self.model, self.processor, self.device = load(path)

    def __call__(self, data: Any) -> list | dict[str, str]:
        """
        Answer a request body (see `parse_payload`).

        Returns a list of `{"label", "score"}`, best first, for an image with labels; one embedding, a list of floats
        of unit length, for an image or a text; a list of embeddings for a list of texts; else `{"error": message}`.
        """
        return self.answer([self.read(data)])[0]

    def read(self, data: Any) -> Request:
        """Check a request body, and load and prepare its image."""
        try:
            query = parse_payload(data)
            if query.image is None:
                return Request(query)
            image = load_image(query.image)
            try:
                return Request(query, self.processor(images=[image], return_tensors="pt")["pixel_values"])
            except ValueError as error:
                raise RequestError("the image cannot be turned into RGB") from error
        except RequestError as error:
            return Request(error=str(error))
        except Exception:
            logger.exception("A request failed.")
            return Request(error=INTERNAL_ERROR)

    def answer(self, requests: list[Request]) -> list:
        """
        What `__call__` returns for each of several requests.

        All images go through the model together, and so do all texts. If that fails, each request is answered alone.
        """
        try:
            return self._answer(requests)
        except Exception:
            if len(requests) > 1:
                return [self.answer([request])[0] for request in requests]
            logger.exception("A request failed.")
            return [{"error": INTERNAL_ERROR}]

    def _answer(self, requests: list[Request]) -> list:
        answers: list = [{"error": request.error} for request in requests]
        queries = {number: request.query for number, request in enumerate(requests) if request.query is not None}
        images = [number for number, query in queries.items() if query.image is not None and not query.labels]
        texts = [number for number, query in queries.items() if query.image is None]
        for number, query in queries.items():
            if query.labels:
                answers[number] = self._classify(query, requests[number].pixel_values)
        if images:
            pixel_values = self._join([requests[number].pixel_values for number in images])
            for number, embed in zip(
                images, self._run(self.model.encode_image, pixel_values=pixel_values), strict=True
            ):
                answers[number] = embed.tolist()
        embeds = self._embed_texts([text for number in texts for text in queries[number].texts])
        for number in texts:
            of_query = [next(embeds) for _ in queries[number].texts]
            answers[number] = of_query if queries[number].is_batch else of_query[0]
        return answers

    def _classify(self, query: Query, pixel_values) -> list[dict]:
        inputs = {**self._tokens_of(query.texts), "pixel_values": pixel_values}
        logits = self._run(self.model, **inputs).logits_per_image[0].tolist()
        weights = [math.exp(logit - max(logits)) for logit in logits]
        scores = [weight / sum(weights) for weight in weights]
        ranked = sorted(zip(query.labels, scores, strict=True), key=lambda pair: -pair[1])
        return [{"label": label, "score": score} for label, score in ranked]

    def _embed_texts(self, texts: list[str]) -> Iterator[list[float]]:
        for start in range(0, len(texts), MAX_TEXTS):
            yield from self._run(self.model.encode_text, **self._tokens_of(texts[start : start + MAX_TEXTS])).tolist()

    def _tokens_of(self, texts: Sequence[str]) -> dict:
        return dict(self.processor(text=list(texts), padding=True, truncation=True, return_tensors="pt"))

    def _join(self, pixel_values: list):
        """Images (1, 3, H, W) as one batch (B, 3, H, W)."""
        if self.device is None:
            import numpy

            return numpy.concatenate(pixel_values)
        import torch

        return torch.cat(pixel_values)

    def _run(self, encode: Callable, **inputs):
        """What a function of the model gives for what the processor has made."""
        if self.device is None:
            return encode(**inputs)
        import torch

        with torch.inference_mode():
            return encode(**{name: tensor.to(self.device) for name, tensor in inputs.items()})


def runs_onnx(path: str) -> bool:
    """Whether a repository has ONNX files with the code that runs them, and this machine onnxruntime and no GPU."""
    files = (Path(path) / "onnx" / "text_model.onnx", Path(path) / "onnx_cots.py")
    is_installed = importlib.util.find_spec("onnxruntime") is not None
    return all(file.is_file() for file in files) and is_installed and not os.path.exists(GPU)


def load_onnx(path: str) -> tuple:
    """The ONNX files, what prepares their inputs, and `None` for the device: arrays are moved to none."""
    spec = importlib.util.spec_from_file_location("onnx_cots", Path(path) / "onnx_cots.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)
    model = module.COTSOnnxModel(path)

    def processor(text=None, images=None, **options) -> dict:
        inputs = {} if text is None else model.tokenize(text)
        return inputs if images is None else {**inputs, "pixel_values": model.prepare_images(images)}

    return model, processor, None


def load_torch(path: str) -> tuple:
    """The model, on the GPU if there is one, its processor, and that device."""
    import torch
    from transformers import AutoModel, AutoProcessor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
    return model, AutoProcessor.from_pretrained(path, trust_remote_code=True), device
