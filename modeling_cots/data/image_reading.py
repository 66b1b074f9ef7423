"""Reads one image of any mode, bounded in size: the result is an RGB image or one clear error, whatever the damage."""

import io
import warnings
from contextlib import contextmanager

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
TURNS_ASIDE = (UPRIGHT[5], UPRIGHT[6], UPRIGHT[7], UPRIGHT[8])  # width and height change places


# Common formats. PIL opens many more, and some of them by starting other programs (EPS by Ghostscript).
Image.init()
FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]
REDUCIBLE_FORMATS = ("JPEG", "MPO")
# The endings of their files. Whoever looks for images among other files goes by these.
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))


class UnreadableImageError(ValueError):
    """Raised for an image that cannot be decoded, as it is truncated, empty, too large, or no image at all."""


def read_image(source) -> Image.Image:
    """
    Decode an image to RGB, upright by its EXIF orientation.

    Args:
        source: What `datasets.Image(decode=False)` gives ({"bytes": ..., "path": ...}), a path, bytes or a PIL image.
            Gray, palette, CMYK, 16-bit and transparent images are converted. {"refused": reason} is never read.

    Raises [`UnreadableImageError`] for anything that cannot be decoded, and for more than `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (a decompression bomb), and for formats other than `FORMATS`.
    """
    with ImageFile(source) as image:
        return image.read()


class ImageFile:
    """
    An opened image whose size is known, and which can be decoded at a fraction of it. Use it in a `with` statement.

    At first only the header of a JPEG is read. Images of other formats are decoded at once.

    Args:
        source: See `read_image`, which has the errors, too.

    Attributes:
        size: Width and height, upright.
        reduction: The factor by which `read` has decoded it smaller.
    """

    def __init__(self, source):
        self._file = self._read = None
        self.reduction = 1
        with _as_unreadable():
            image = source if isinstance(source, Image.Image) else Image.open(_as_file(source), formats=FORMATS)
            self._file = image if image is not source else None
            try:
                if getattr(image, "format", None) in REDUCIBLE_FORMATS and self._file is not None:
                    width, height = image.size
                    self.size = (height, width) if _turn_of(image) in TURNS_ASIDE else (width, height)
                else:
                    self._read = _to_upright_rgb(image)
                    self.size = self._read.size
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, max_reduction: int = 1) -> Image.Image:
        """
        Decode the image to RGB, upright. Call it once.

        Args:
            max_reduction: A JPEG may be decoded at 1/2, 1/4 or 1/8 of its width and height, down to 1/max_reduction,
                which leaves out most of the work; widths and heights are rounded up.
        """
        if self._read is not None:
            return self._read
        with _as_unreadable():
            wanted = max((each for each in (2, 4, 8) if each <= max_reduction), default=1)
            if wanted > 1:
                width, height = self._file.size
                drafted = self._file.draft(None, (max(1, width // wanted), max(1, height // wanted)))
                self.reduction = 1 if drafted is None else round(width / drafted[1][2])
            return _to_upright_rgb(self._file)


@contextmanager
def _as_unreadable():
    """Whatever goes wrong while an image is opened or decoded becomes an [`UnreadableImageError`]."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
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


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the image upright."""
    # Not ImageOps.exif_transpose: it writes the EXIF data anew, and fails where any other tag is damaged.
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))  # type: ignore[arg-type]
    except Exception:  # damaged EXIF data around a sound image
        return None


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn_of(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in SIXTEEN_BIT_MODES:  # PIL would clip these at 255 and leave white
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_readable(dataset, num_tries: int = 200) -> None:
    """Raise `ValueError` if none of the first `num_tries` images of a data set of pairs can be read."""
    errors = []
    for index in range(min(num_tries, len(dataset))):
        item = dataset[index]
        try:
            read_image(item["image"])
            return
        except UnreadableImageError as error:
            errors.append(f"{item['name']} ({error})")
    raise ValueError(f"None of the first {len(errors)} images can be read, beginning with {errors[0]}.")
