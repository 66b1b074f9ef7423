"""Images as files and requests carry them."""

import base64
import io
import struct
import zlib

from PIL import Image


def as_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_base64(image: Image.Image, format: str = "PNG", **options) -> str:
    return base64.b64encode(as_bytes(image, format, **options)).decode()


def thin_png(width: int, height: int) -> bytes:
    """A PNG of black pixels, of some kilobytes whatever its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(2**20)) for _ in range((width + 1) * height // 2**20))
    rows += packer.compress(bytes((width + 1) * height % 2**20)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
