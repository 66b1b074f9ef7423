"""Reading one picture from the wild: any mode, any damage, bounded in size. Either an RGB image or a clear error."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image

SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # the last is 32 bits wide, but holds 16-bit PGM and TIFF
UPRIGHT = {  # by the value of EXIF's orientation tag
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# What people keep pictures in. PIL opens much more, and some of it by starting other programs (EPS by Ghostscript).
Image.init()
FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded: truncated, empty, not an image at all, or too large to be one."""


def read_image(source) -> Image.Image:
    """
    Decode a picture to RGB, upright by its EXIF orientation.

    Args:
        source: What `datasets.Image(decode=False)` gives ({"bytes": ..., "path": ...}), a path, bytes or a PIL image.
            Grey, palette, CMYK, 16-bit and transparent pictures are converted. {"refused": reason} is never read.

    Raises [`UnreadableImageError`] for anything that cannot be decoded, and for more than `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (a decompression bomb), and for formats other than `FORMATS`.
    """
    try:
        if isinstance(source, Image.Image):
            return _to_upright_rgb(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_as_file(source), formats=FORMATS) as image:
                return _to_upright_rgb(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def _as_file(source):
    if isinstance(source, dict):
        if source.get("refused"):
            raise UnreadableImageError(source["refused"])
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # Not ImageOps.exif_transpose: it writes the EXIF data anew, and fails where any other tag is damaged.
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data around a sound picture
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in SIXTEEN_BIT_MODES:  # PIL would clip these at 255 and leave white
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_readable(dataset, num_tries: int = 200) -> None:
    """Raise `ValueError` if none of the first `num_tries` pictures of a data set of pairs can be read."""
    errors = []
    for index in range(min(num_tries, len(dataset))):
        item = dataset[index]
        try:
            read_image(item["image"])
            return
        except UnreadableImageError as error:
            errors.append(f"{item['name']} ({error})")
    raise ValueError(f"None of the first {len(errors)} images can be read, beginning with {errors[0]}.")


__all__ = ["UnreadableImageError", "check_readable", "read_image"]
