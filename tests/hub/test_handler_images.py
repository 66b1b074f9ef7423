"""How the handler of Inference Endpoints reads strangers' images: any mode, bounded, and from public addresses only.

Whatever is connected to here is on the loopback, which a test may declare public.
"""

import base64
import ipaddress
import socket
import ssl
import threading
import zlib

import pytest
from hub_network import Answer, Network, Server
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import as_base64, as_bytes
from PIL import Image

from modeling_cots.hub import handler as hub_handler
from modeling_cots.hub.handler import RequestError, is_public, load_image


@pytest.fixture
def images(image, monkeypatch):
    """A server of images on the loopback, which counts as public for once; `answers` maps paths to answers."""
    answers = {"/image.png": Answer(content=as_bytes(image))}
    monkeypatch.setattr(hub_handler, "is_public", lambda address: address == "127.0.0.1")
    server = Server(Network(), lambda request: answers.get(request.path, Answer(404)))
    server.answers = answers
    server.open()
    yield server
    server.close()
    server.server_close()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=200)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]), st.data())
def test_a_damaged_image_is_read_or_refused(format, data):
    content = bytearray(as_bytes(Image.radial_gradient("L").resize((20, 20)), format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        load_image(base64.b64encode(content).decode()).convert("RGB")
    except RequestError as error:
        assert "image" in str(error)


def png_of_size(width: int, height: int) -> str:
    """The beginning of a PNG file, which says its size and has no pixels."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk + bytes([0, 0, 0, 0]) + b"IDAT").decode()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's, with 89 million pixels
@pytest.mark.parametrize("size", [(7072, 7072), (10_000, 10_000), (50_000, 50_000)])
def test_a_image_of_too_many_pixels_is_not_decoded(size):
    with pytest.raises(RequestError, match="more than 50000000 pixels"):
        load_image(png_of_size(*size))


@pytest.mark.parametrize("size", [(1, 4_000_000), (4_000_000, 1), (2, 65_536)])
def test_a_image_that_is_too_long_is_not_decoded(size):
    with pytest.raises(RequestError, match="a side of more than 65535 pixels"):
        load_image(png_of_size(*size))


def test_bounds_of_pixels(monkeypatch, image):
    monkeypatch.setattr(hub_handler, "MAX_IMAGE_PIXELS", 48)
    assert load_image(image).size == load_image(as_base64(image)).size == (8, 6)
    monkeypatch.setattr(hub_handler, "MAX_IMAGE_PIXELS", 47)
    for source in (image, as_base64(image)):
        with pytest.raises(RequestError, match="more than 47 pixels"):
            load_image(source)


def test_bounds_of_bytes(monkeypatch, image):
    content = as_bytes(image)
    monkeypatch.setattr(hub_handler, "MAX_IMAGE_BYTES", len(content))
    assert load_image(as_base64(image)).size == (8, 6)
    for too_small in (len(content) - 1, len(content) // 2):
        monkeypatch.setattr(hub_handler, "MAX_IMAGE_BYTES", too_small)
        with pytest.raises(RequestError, match=f"larger than {too_small} bytes"):
            load_image(as_base64(image))
    monkeypatch.setattr(base64, "b64decode", None)  # what is far too long is not even decoded
    with pytest.raises(RequestError, match="larger than"):
        load_image("A" * len(content) + "A")


@pytest.mark.parametrize(
    "source",
    ["", "AAA", "not base64!", "/etc/hosts", "data:,", "data:image/png;base64,x", "data:image/png,%89PNG"]
    + [base64.b64encode(content).decode() for content in (b"", b"\x89PNG", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"II*\0")],
)
def test_what_is_no_image(source):
    with pytest.raises(RequestError):
        load_image(source)


@pytest.mark.parametrize("source", ["{}!", "!{}", "data:image/png,{}", "data:image/png;base64;x,{}", "data:{}"])
def test_nothing_is_guessed_about_an_encoding(image, source):
    with pytest.raises(RequestError, match="base64"):
        load_image(source.format(as_base64(image)))


@pytest.mark.parametrize("format", ["EPS", "TIFF", "ICO", "PPM"])
def test_decoders_that_nobody_needs_are_not_within_reach(image, format):
    with pytest.raises(RequestError, match="none of BMP, GIF, JPEG, PNG, WEBP"):
        load_image(as_base64(image, format=format))


# --- URLs


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "javascript", "HTTPX", "c"])
def test_schemes(scheme):
    with pytest.raises(RequestError, match=f"scheme '{scheme.lower()}' is refused"):
        load_image(f"{scheme}://127.0.0.1/image.png")


LOOPBACK = ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"]


@pytest.mark.parametrize(
    "host", [*LOOPBACK, "[::ffff:7f00:1]", "\uff11\uff12\uff17.0.0.1", "0", "127.0.0.1.", "0.0.0.0"]
)
def test_this_machine_is_refused_however_it_is_spelled(images, monkeypatch, host):
    monkeypatch.setattr(hub_handler, "is_public", is_public)
    with pytest.raises(RequestError, match="not public|cannot be fetched") as error:
        load_image(f"http://{host}:{images.server_port}/image.png")
    assert "not public" in str(error.value) or host not in LOOPBACK  # the rest may resolve to nothing at all
    assert images.network.requests == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True)]
    + [(a, False) for a in "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0".split()]
    + [(a, False) for a in "224.0.0.1 240.0.0.1 255.255.255.255 ::ffff:127.0.0.1 ::127.0.0.1 :: ::1".split()]
    + [(a, False) for a in "fe80::1 fe80::1%lo fc00::1 fec0::1 ff02::1 2002:7f00:1:: 64:ff9b::7f00:1 2001::1".split()],
)
def test_public_addresses(address, expected):
    assert is_public(address) is expected


# IANA's special-purpose registries of IPv4 and IPv6, all their blocks, as of 2025; and multicast.
REGISTERED = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24
192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
255.255.255.255/32 ::/128 ::1/128 ::/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32
2001:1::1/128 2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28
2001:30::/28 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8
"""


@pytest.mark.parametrize("block", REGISTERED.split())
def test_no_block_of_special_purpose_is_public(block):
    block = ipaddress.ip_network(block)
    for address in (block[0], block[-1], block[block.num_addresses // 2]):
        assert not is_public(str(address))
        if address.version == 4:
            assert not is_public(f"::ffff:{address}")


@pytest.mark.parametrize("address", ["192.88.98.255", "192.88.100.0", "192.0.1.0", "198.20.0.0", "223.255.255.255"])
def test_their_neighbors_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("address", ["3ffe:ffff::1", "3fff:1000::1", "2001:200::1", "2003::1", "2620:4f:7fff::1"])
def test_their_neighbors_of_ipv6_are_public(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_address_mapped_into_ipv6_is_judged_as_itself(address):
    assert is_public(f"::ffff:{address}") == is_public(str(address))
    assert not is_public(str(address)) or not address.is_private
    assert not is_public(str(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80))))  # 6to4


def test_redirects_are_checked_like_the_first_address(images, image):
    answers, port = images.answers, images.server_port
    answers["/moved"] = Answer(302, {"Location": "image.png"})
    assert load_image(f"{images.url}/moved").tobytes() == image.tobytes()
    images.network.requests.clear()
    answers["/inside"] = Answer(301, {"Location": f"http://127.0.0.2:{port}/image.png"})
    answers["/file"] = Answer(307, {"Location": "file:///etc/hosts"})
    answers["/round"] = Answer(308, {"Location": "/round"})
    for path, message in {"inside": "not public", "file": "scheme 'file'", "round": "more than 3 times"}.items():
        with pytest.raises(RequestError, match=message):
            load_image(f"{images.url}/{path}")
    assert [request.path for request in images.network.requests] == ["/inside", "/file"] + ["/round"] * 4


def test_a_name_is_resolved_once_and_that_address_used(images, image, monkeypatch):
    resolved = []

    def resolve(host, port, **kwargs):
        resolved.append(host)
        address = "127.0.0.1" if len(resolved) == 1 else "127.0.0.2"  # a name that is rebound after the check
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert load_image(f"http://images.test:{images.server_port}/image.png").tobytes() == image.tobytes()
    assert resolved == ["images.test"]
    assert images.network.requests[0].headers["host"] == f"images.test:{images.server_port}"


def test_the_usual_port_is_not_named_to_the_server(images, image, monkeypatch):
    """Signed addresses are signed for the bare name."""
    monkeypatch.setitem(hub_handler.DEFAULT_PORTS, "http", images.server_port)
    assert load_image("http://127.0.0.1/image.png").tobytes() == image.tobytes()
    assert images.network.requests[0].headers["host"] == "127.0.0.1"


def test_https_wants_a_certificate_for_the_name_not_the_address(images, monkeypatch):
    asked = []

    def distrust(context, sock, server_hostname, **kwargs):
        asked.append((server_hostname, context.verify_mode, context.check_hostname))
        raise ssl.SSLCertVerificationError

    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", images.server_port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [entry])
    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", distrust)
    with pytest.raises(RequestError, match="cannot be fetched"):
        load_image(f"https://images.test:{images.server_port}/image.png")
    assert asked == [("images.test", ssl.CERT_REQUIRED, True)]


def test_one_private_address_among_public_ones_is_enough(images, monkeypatch):
    entries = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, images.server_port)) for a in ("127.0.0.1", "127.0.0.2")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: entries)
    with pytest.raises(RequestError, match="not public"):
        load_image(f"http://images.test:{images.server_port}/image.png")


def test_what_a_server_may_not_send(images, monkeypatch):
    monkeypatch.setattr(hub_handler, "MAX_IMAGE_BYTES", 1000)
    images.answers["/large"] = Answer(content=bytes(1001))
    images.answers["/zeros"] = Answer(content=bytes(1000))
    images.answers["/html"] = Answer(content=b"<html>")
    messages = {"large": "larger than 1000", "zeros": "cannot be read", "html": "cannot be read", "none": "status 404"}
    for path, message in messages.items():
        with pytest.raises(RequestError, match=message):
            load_image(f"{images.url}/{path}")
    for url in (f"https://127.0.0.1:{images.server_port}/", "http://127.0.0.1:99999/", "http://[/", "http://"):
        with pytest.raises(RequestError, match="cannot be fetched|no host"):
            load_image(url)
    with pytest.raises(RequestError, match="or a user"):
        load_image(f"http://me:word@127.0.0.1:{images.server_port}/image.png")


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\nX-Slow: ", b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n"]
)
def test_a_server_that_never_ends_is_left(monkeypatch, sent):
    """It goes on with a byte every few milliseconds, so that no timeout of a single read helps."""
    monkeypatch.setattr(hub_handler, "is_public", lambda address: True)
    monkeypatch.setattr(hub_handler, "FETCH_SECONDS", 0.3)
    gone = threading.Event()

    def drip(connection):
        with connection:
            try:
                connection.sendall(sent)
                while sent and not gone.wait(0.02):
                    connection.sendall(b"x")
                gone.wait()
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: drip(server.accept()[0]), daemon=True).start()
        try:
            with pytest.raises(RequestError, match="longer than 0.3 seconds"):
                load_image(f"http://127.0.0.1:{server.getsockname()[1]}/image.png")
        finally:
            gone.set()
