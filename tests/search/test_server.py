"""`cots-search serve` over real HTTP: pages, JSON, uploads, and what strangers may send."""

import base64
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
import torch
from browser import open_browser, overflow, skip_without_browser
from forks import server_with_package
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from modeling_cots import COTSModel, ScenesDataset, SearchIndex

pytest.importorskip("faiss")

from modeling_cots.search import server as serving
from modeling_cots.search.server import MAX_BODY_BYTES, RequestError, SearchServer, check_fields, parse_multipart

BOUNDARY = "----a.boundary"


@pytest.fixture(scope="module")
def scenes():
    return [item["image"] for item in (ScenesDataset("train", 12, 32)[number] for number in range(12))]


@pytest.fixture
def index(tiny_config, tiny_processor, tmp_path):
    class Dated(ScenesDataset):
        def metadata(self, index):
            return {"year": 2000 + index, "<b>": "<i>"}

    torch.manual_seed(0)
    index = SearchIndex.create(tmp_path / "index", COTSModel(tiny_config), tiny_processor)
    index.add(Dated("train", 12, 32), source="scenes", progress=False)
    return index


@contextmanager
def serving_from(index, host="127.0.0.1"):
    server = SearchServer(host, 0)
    server.answer_from(index, "IDX")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(index):
    with serving_from(index) as server:
        yield server


def ask(server, method: str, path: str, body=None, **headers) -> tuple[int, dict | str, dict]:
    """The status, the answer (JSON as an object) and the headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    is_json = response.getheader("Content-Type") == "application/json" and content
    return response.status, json.loads(content) if is_json else content, dict(response.getheaders())


def ask_json(server, content) -> tuple[int, dict]:
    body = content if isinstance(content, bytes | str) else json.dumps(content)
    return ask(server, "POST", "/search", body, Content_Type="application/json")[:2]


def raw(server, content: bytes, half_close: bool = True) -> bytes:
    """The answer to bytes as they are."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(content)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError), connection.makefile("rb") as answer:
            return answer.read()
    return b""


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def form(**fields) -> bytes:
    parts = []
    for name, value in fields.items():
        is_file = isinstance(value, bytes)
        head = f'Content-Disposition: form-data; name="{name}"' + ('; filename="a.png"' if is_file else "")
        parts.append(f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + (value if is_file else value.encode()) + b"\r\n")
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def post_form(server, path: str, **fields):
    return ask(server, "POST", path, form(**fields), Content_Type=f"multipart/form-data; boundary={BOUNDARY}")


# --- answers


def test_answers_as_the_index_does(server, index, scenes):
    expected = [(hit["name"], hit["score"]) for hit in index.search("a dog", top=5)]
    status, found, headers = ask(server, "GET", "/search?text=a%20dog&top=5")
    assert status == 200 and [(hit["name"], hit["score"]) for hit in found["hits"]] == expected
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    hit = found["hits"][0]
    assert set(hit) == {"name", "source", "captions", "score", "copies", "metadata", "thumbnail"}
    assert set(hit["metadata"]) == {"year", "<b>"} and found["notes"] == []
    assert Image.open(io.BytesIO(base64.b64decode(hit["thumbnail"]))).size == (32, 32)

    image = base64.b64encode(png(scenes[7])).decode()
    for content in (image, f"data:image/png;base64,{image}"):
        status, found = ask_json(server, {"image": content, "top": 1})
        assert status == 200 and found["hits"][0]["name"] == "scenes: row 7"
    both = index.search("a red circle", scenes[7], image_weight=0.3, where="year >= 2004", top=9)
    query = {"text": "a red circle", "image": image, "image_weight": 0.3, "where": ["year >= 2004"], "top": 9}
    assert [hit["name"] for hit in ask_json(server, query)[1]["hits"]] == [hit["name"] for hit in both]
    status, found, _ = post_form(server, "/search", text="", image=png(scenes[3]), where="year < 2005", top="2")
    assert status == 200 and len(found["hits"]) == 2 and found["hits"][0]["name"] == "scenes: row 3"
    body = "text=a+red+circle&top=2&where=year+%3E+2004&where=year+%3C+2009"
    status, found, _ = ask(server, "POST", "/search", body, Content_Type="application/x-www-form-urlencoded")
    assert status == 200 and all(2004 < hit["metadata"]["year"] < 2009 for hit in found["hits"])
    assert ask_json(server, {"text": "a 犬"})[1]["notes"] == ["1 of 2 words is unknown to this model: 犬."]


def test_the_page_has_a_form_and_the_results(server, scenes):
    status, page, _ = ask(server, "GET", "/")
    assert status == 200 and "12 images." in page and "<form" in page and "<ol" not in page
    status, page, _ = ask(server, "GET", "/?text=" + quote('a "red" <circle>') + "&top=3")
    assert status == 200 and page.count("<figure") == 3 and "3 of 12." in page
    assert "&lt;circle&gt;" in page and "<circle>" not in page and "file://" not in page
    status, page, _ = post_form(server, "/", text="", image=png(scenes[5]), where="", top="2")
    assert status == 200 and "Images for the uploaded image" in page and page.index("row 5") < page.index("</figure>")
    status, page, _ = post_form(server, "/", text="a red circle", where="color == red", top="2")
    assert status == 400 and "no metadata &#x27;color&#x27;" in page and 'value="a red circle"' in page
    assert ask(server, "HEAD", "/?text=red")[:2] == (200, "")
    assert post_form(server, "/", text="", where="", top="2")[0] == 400


def test_what_others_write_is_found(server, index, tiny_processor, tmp_path):
    with SearchIndex(tmp_path / "index", index.model, tiny_processor) as other:
        other.delete(where="year < 2010")
    assert len(ask(server, "GET", "/search?text=red&top=12")[1]["hits"]) == 2
    with SearchIndex(tmp_path / "index", index.model, tiny_processor) as other:
        other.delete(where="year >= 2010")
    status, found, _ = ask(server, "GET", "/search?text=red")
    assert status == 200 and found["hits"] == [] and "has no images" in found["notes"][0]


def test_many_clients_at_once_get_their_own_answers(server, scenes):
    queries = [{"image": base64.b64encode(png(image)).decode(), "top": 1} for image in scenes]
    answers = [None] * len(queries)

    def run(number):
        answers[number] = ask_json(server, queries[number])[1]["hits"][0]["name"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [f"scenes: row {number}" for number in range(len(queries))]


# --- hostile requests


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        ({}, "Give a text, an image or both"),
        ({"text": "  "}, "Give a text, an image or both"),
        ({"text": 5}, "'text' must be a string"),
        ({"text": ["a"]}, "'text' must be a string"),
        ({"text": "a" * 20_000}, "at most 10000 characters"),
        ({"text": "a \udcff"}, "not valid Unicode"),
        ({"text": "dog.jpg"}, "which looks like a file"),
        ({"text": "a", "top": 0}, "'top' must be a number from 1 to 1,000"),
        ({"text": "a", "top": 10**9}, "'top' must be"),
        ({"text": "a", "top": 1.5}, "'top' must be"),
        ({"text": "a", "top": True}, "'top' must be"),
        (b'{"text": "a", "top": NaN}', "'top' must be"),
        (b'{"text": "a", "image_weight": Infinity}', "'image_weight' must be"),
        ({"text": "a", "image_weight": 2}, "'image_weight' must be a number from 0 to 1"),
        ({"text": "a", "where": 5}, "'where' must be a condition"),
        ({"text": "a", "where": ["red"]}, "A condition reads like"),
        ({"text": "a", "where": ["a == 1"] * 40}, "at most 32"),
        ({"text": "a", "where": "(" * 9_000 + " == 1"}, "no metadata"),
        ({"text": "a", "file": "/etc/passwd"}, "no field 'file'"),
        ({"image": "/etc/passwd"}, "neither a URL nor valid base64"),
        ({"image": "file:///etc/passwd"}, "fetches none"),
        ({"image": "http://127.0.0.1/a.png"}, "fetches none"),
        ({"image": "HTTPS://example.com/a.png"}, "fetches none"),
        ({"image": {"path": "/etc/passwd"}}, "'image' must be a string"),
        ({"image": base64.b64encode(b"no image").decode()}, "cannot be read"),
        ({"image": base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(90)).decode()}, "cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_that_means_nothing_is_refused_in_one_sentence(server, content, said):
    status, answer = ask_json(server, content)
    assert status == 400 and said in answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 700
    assert ask(server, "GET", "/search?text=red&top=1")[0] == 200


def bomb(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("content", [bomb(9_000, 9_000), bomb(65_536, 1), b"GIF89a" + bytes(20), b"\xff\xd8\xff\xe0"])
def test_bombs_and_broken_images_are_refused(server, content):
    status, page, _ = post_form(server, "/", text="", image=content, where="", top="")
    assert status == 400 and ("The image has more than" in page or "The image cannot be read" in page)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "said"),
    [
        ("GET", "/../../etc/passwd", {}, 404, "There is nothing here"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, 404, "There is nothing here"),
        ("GET", "//etc/passwd", {}, 404, "There is nothing here"),
        ("GET", "/index.json", {}, 404, "There is nothing here"),
        ("GET", "/search/", {}, 404, "There is nothing here"),
        ("POST", "/etc", {}, 404, "There is nothing here"),
        ("PUT", "/search", {}, 405, "PUT is refused"),
        ("DELETE", "/", {}, 405, "DELETE is refused"),
        ("OPTIONS", "/search", {}, 405, "OPTIONS is refused"),
        ("BREW", "/search", {}, 501, "Unsupported method"),
        ("POST", "/search", {"Content_Length": "9999999999"}, 413, "larger than"),
        ("POST", "/search", {"Content_Length": "-1"}, 411, "Content-Length"),
        ("POST", "/search", {"Content_Length": "1_000"}, 411, "Content-Length"),
        ("POST", "/search", {"Content_Type": "text/plain", "Content_Length": "0"}, 415, "type 'text/plain'"),
        ("GET", "/search?text=red", {"Host": "evil.example:80"}, 403, "has no other name"),
        ("GET", "/search?text=red", {"Host": "127.0.0.1.evil.example"}, 403, "has no other name"),
        ("GET", "/search?" + "&".join(["text=a"] * 40), {}, 400, "cannot be read"),
        ("GET", "/search?text=a&row_id=5", {}, 400, "no field 'row_id'"),
    ],
)
def test_other_places_methods_and_names_are_refused(server, method, path, headers, status, said):
    ended, answer, _ = ask(server, method, path, **headers)
    assert ended == status and said in (answer if isinstance(answer, str) else answer["error"])


def test_a_huge_body_is_refused_unread_and_its_sender_hears_of_it(server):
    status, answer = ask_json(server, b"x" * (MAX_BODY_BYTES + 1))
    assert status == 413 and answer["error"] == f"The body is larger than {MAX_BODY_BYTES:,} bytes, as it says."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no http at all\r\n\r\n", b"Bad request version"),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"Bad request syntax"),  # TLS
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % number for number in range(200)) + b"\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", b"431"),
        (b"POST /search HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"POST /search HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{", b"shorter than"),
        (b"POST / HTTP/1.1\r\nContent-Type: multipart/form-data\r\nContent-Length: 1\r\n\r\nx", b"no boundary"),
        (b"GET http://[ HTTP/1.1\r\n\r\n", b"HTTP/1.0 4"),
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b"HTTP/1.0 4"),
    ],
)
def test_what_is_no_request_is_refused(server, content, said):
    assert said in raw(server, content)
    assert ask(server, "GET", "/")[0] == 200


def test_slow_clients_are_cut_off(index, monkeypatch):
    monkeypatch.setattr(serving.SearchHandler, "timeout", 0.05)
    with serving_from(index) as server:
        assert raw(server, b"GET / HT", half_close=False) == b""
        assert b"did not come in time" in raw(
            server, b"POST /search HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{", False
        )
    # A client that sends a byte now and then is cut off, too.
    monkeypatch.setattr(serving.SearchHandler, "timeout", 60)
    monkeypatch.setattr(serving, "REQUEST_SECONDS", 0.05)
    with serving_from(index) as server:
        assert raw(server, b"GET / HT", half_close=False) == b""
        assert ask(server, "GET", "/")[0] == 200


def test_connections_are_bounded(index, monkeypatch):
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 2)
    with serving_from(index) as server:
        held = [socket.create_connection(("127.0.0.1", server.server_port), timeout=30) for _ in range(2)]
        assert b"503 Service Unavailable" in raw(server, b"", half_close=False)
        for connection in held:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with connection, connection.makefile("rb") as answer:
                assert b"12 images" in answer.read()


def test_another_host_may_be_named_where_others_are_let_in(index):
    with serving_from(index, host="0.0.0.0") as server:
        assert ask(server, "GET", "/search?text=red", Host="nas.home")[0] == 200


@given(st.binary(max_size=200), st.text(max_size=30))
def test_a_form_comes_out_as_it_went_in(content, text):
    boundary = BOUNDARY.encode()
    if boundary in content or BOUNDARY in text or not content:
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    fields = parse_multipart(form(image=content, text=text), f"multipart/form-data; boundary={BOUNDARY}")
    assert fields == {"image": content, "text": text}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_form_or_refused(content):
    for body in (content, f"--{BOUNDARY}\r\n".encode() + content + f"\r\n--{BOUNDARY}--".encode()):
        try:
            fields = parse_multipart(body, f"multipart/form-data; boundary={BOUNDARY}")
            check_fields(fields)
        except RequestError as error:
            assert "\n" not in str(error)


# --- the program and the page


def serve_command(folder: str, said: str) -> None:
    from modeling_cots.search import cli

    os.chdir(folder)
    sys.stdout = open(said, "w", buffering=1)  # noqa: SIM115 -- closed with the process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without one
    cli.main("serve index --port 0".split())
    print("ended")
    sys.stdout.flush()


def test_the_command_serves_until_it_is_interrupted(index, tiny_processor, tmp_path):
    index.model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    info = index.store._newest().manifest
    serving_info = {**info.info, "model": str(tmp_path / "model")}
    replace(info, info=serving_info).write(tmp_path / "index")
    os.mkfifo(tmp_path / "said")
    call = server_with_package().start(serve_command, str(tmp_path), str(tmp_path / "said"))
    with open(tmp_path / "said") as said:
        line = said.readline()
        assert line.startswith("index (12 images) is at http://127.0.0.1:")
        said.readline()
        port = int(line.partition("127.0.0.1:")[2].split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/search?text=red&top=3")
        assert len(json.loads(connection.getresponse().read())["hits"]) == 3
        connection.close()
        os.kill(call.pid, signal.SIGINT)
        assert said.read() == "ended\n"
    call.result(30)


def test_the_page_in_a_browser_wide_and_on_a_phone(server, scenes, tmp_path):
    skip_without_browser()
    Image.fromarray(np.asarray(scenes[4])).save(tmp_path / "four.png")
    for width in (1200, 390):
        with open_browser(width) as browser:
            browser.get(server.address)
            browser.find_element("name", "text").send_keys("a red circle\n")
            wait_for(browser, "h1", "Images for “a red circle”")
            assert len(browser.find_elements("css selector", "figure")) == 12 and overflow(browser) <= 0
            assert browser.find_element("name", "text").get_attribute("value") == "a red circle"
            browser.find_element("name", "text").clear()
            browser.find_element("name", "image").send_keys(str(tmp_path / "four.png"))
            browser.find_element("css selector", "button").click()
            wait_for(browser, "h1", "Images for the uploaded image")
            assert "row 4" in browser.find_element("css selector", "figcaption").text and overflow(browser) <= 0
            browser.find_element("name", "where").send_keys("color == red")
            browser.find_element("name", "text").send_keys("dog\n")
            wait_for(browser, "[role=status]", "no metadata 'color'")


def wait_for(browser, selector: str, text: str) -> None:
    """Wait for the next page, on which an element has this text."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(browser, 60, poll_frequency=0.05, ignored_exceptions=[StaleElementReferenceException])
    waiting.until(lambda browser: text in browser.find_element("css selector", selector).text)
