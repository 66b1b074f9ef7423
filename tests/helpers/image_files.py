"""Images as files and requests carry them."""

import base64
import io

from PIL import Image


def as_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def as_base64(image: Image.Image, format: str = "PNG", **options) -> str:
    return base64.b64encode(as_bytes(image, format, **options)).decode()
