"""Reads one image of any mode, bounded in size: the result is an RGB image or one clear error, whatever the damage.

Training, search, the processor and the pipelines all read images here, so that a model sees the same pixels whichever
way an image takes. Nothing here depends on the thread that calls it.
"""

import base64
import io
import os
import threading
from contextlib import contextmanager

import numpy as np
from huggingface_hub.utils import httpx  # what it is made with: httpx, and from its version 2 on httpx2
from PIL import ExifTags, Image, UnidentifiedImageError

# The longest side that a JPEG can have. A resize to a square of S pixels first makes S x the height: of an image of
# 1 x 50,000,000 pixels, a file of some kilobytes, gigabytes.
MAX_IMAGE_SIDE = 2**16 - 1
MAX_REASON = 300  # characters of a decoder's message, which may hold all that was taken for a path
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

try:  # HEIC, the photographs of many telephones; the extra `heic`
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

try:  # decodes JPEGs faster than PIL does, to the same pixels; the extra `fast`
    import simplejpeg
except ImportError:
    simplejpeg = None

# Common formats. PIL opens many more, and some of them by starting other programs (EPS by Ghostscript).
Image.init()
FORMATS = [
    name
    for name in ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
]
REDUCIBLE_FORMATS = ("JPEG", "MPO")
# The endings of their files. Whoever looks for images among other files goes by these.
IMAGE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))


HEIC_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # bytes 8 to 12 of a file
HEIC_CURE = "HEIC needs pillow-heif: pip install 'modeling_cots[heic]'"


def fork_safe_lock() -> threading.Lock:
    """A lock that no other thread holds while this process forks, so that the new process finds it free."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


# PIL decodes an opened image when it is first used, and not safely if two threads use it first.
_DECODING = fork_safe_lock()


class UnreadableImageError(ValueError):
    """Raised for an image that cannot be decoded, as it is truncated, empty, too large, or no image at all."""


def read_image(source) -> Image.Image:
    """
    Decode an image to RGB, upright by its EXIF orientation.

    Args:
        source: What `datasets.Image(decode=False)` gives ({"bytes": ..., "path": ...}), a path, bytes or a PIL image.
            Gray, palette, CMYK, 16-bit and transparent images are converted. {"refused": reason} is never read.

    Raises [`UnreadableImageError`] for anything that cannot be decoded, for more than `PIL.Image.MAX_IMAGE_PIXELS`
    pixels (a decompression bomb), for a side of more than `MAX_IMAGE_SIDE`, and for formats other than `FORMATS`.

    Returns an image without EXIF data and other metadata: read once more, it stays as it is.
    """
    with ImageFile(source) as image:
        return image.read()


def read_pixels(source) -> np.ndarray:
    """The pixels (height, width, 3) uint8 of what `read_image` gives, which has arguments and errors; sooner."""
    with ImageFile(source) as image:
        return image.read_pixels()


def fetch_image(source: str, timeout: float | None = None) -> Image.Image:
    """
    An image behind a string of the caller's own, as `read_image` gives it.

    Args:
        source: The path of a file, an http or https URL, a `data:image/` URL, or base64.
        timeout: Seconds to wait for the server of a URL; `None` waits forever.

    Raises [`UnreadableImageError`] as `read_image` does, and for a URL that cannot be fetched.
    """
    with _as_unreadable():
        if source.startswith(("http://", "https://")):
            content = httpx.get(source, timeout=timeout, follow_redirects=True).content
        elif os.path.isfile(source):
            content = source
        else:
            content = _from_base64(source)
    return read_image(content)


def _from_base64(source: str) -> bytes:
    try:
        return base64.b64decode("".join(source.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise UnreadableImageError(
            f"{source[:100]!r} is neither a file that is there, nor a URL, nor base64"
        ) from error


def check_sides(width: float, height: float) -> None:
    """Raise [`UnreadableImageError`] for an image that is too long to be resized."""
    if max(width, height) > MAX_IMAGE_SIDE:
        raise UnreadableImageError(
            f"The image has {width:.0f} x {height:.0f} pixels, and no side may be longer than {MAX_IMAGE_SIDE}: "
            "resizing it would take too much memory."
        )


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
        self._file = self._read = self._source = None
        self.reduction = 1
        with _as_unreadable():
            if isinstance(source, Image.Image):
                check_sides(*source.size)
                _decode(source)
                self._read = _to_upright_rgb(source)
                self.size = self._read.size
                return
            file = self._source = _as_file(source)
            try:
                self._file = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                if _is_heic(file):
                    raise UnreadableImageError(HEIC_CURE) from None
                raise
            try:
                _check_pixels(*self._file.size)
                check_sides(*self._file.size)
                if self._file.format in REDUCIBLE_FORMATS:
                    width, height = self._file.size
                    self.size = (height, width) if _turn_of(self._file) in TURNS_ASIDE else (width, height)
                else:
                    self._read = _to_upright_rgb(self._file)
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
            wanted = _reduction_within(max_reduction)
            if wanted > 1:
                width, height = self._file.size
                drafted = self._file.draft(None, (max(1, width // wanted), max(1, height // wanted)))
                self.reduction = 1 if drafted is None else round(width / drafted[1][2])
            return _to_upright_rgb(self._file)

    def read_pixels(self, max_reduction: int = 1) -> np.ndarray:
        """
        The pixels (height, width, 3) uint8 of `read`, in its place.

        With simplejpeg a JPEG of color or gray is decoded by it. It refuses whatever is damaged, and PIL decides then.
        """
        if self._read is None and simplejpeg is not None and self._file.mode in ("RGB", "L"):
            pixels = self._decode_by_simplejpeg(_reduction_within(max_reduction))
            if pixels is not None:
                return pixels
        return np.asarray(self.read(max_reduction))

    def _decode_by_simplejpeg(self, reduction: int) -> np.ndarray | None:
        """`None` for a JPEG that it cannot decode without a warning."""
        width, height = (-(-side // reduction) for side in self._file.size)
        smallest = {} if reduction == 1 else {"min_width": width, "min_height": height, "min_factor": reduction}
        try:
            pixels = simplejpeg.decode_jpeg(_bytes_of(self._source), "RGB", **smallest)
        except Exception:  # as of PIL's decoders: anything
            return None
        if pixels.shape != (height, width, 3):
            return None
        self.reduction = reduction
        turn = _turn_of(self._file)
        return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _reduction_within(max_reduction: int) -> int:
    """The largest of the fractions at which a JPEG can be decoded fast."""
    return max((each for each in (2, 4, 8) if each <= max_reduction), default=1)


@contextmanager
def _as_unreadable():
    """Whatever goes wrong while an image is opened or decoded becomes an [`UnreadableImageError`]."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, zlib.error, ...
        raise UnreadableImageError(f"{type(error).__name__}: {str(error)[:MAX_REASON]}") from error


def _as_file(source):
    if isinstance(source, dict):
        if source.get("refused"):
            raise UnreadableImageError(source["refused"])
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _bytes_of(file) -> bytes:
    """The content of a path or of a file of bytes."""
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    with open(file, "rb") as opened:
        return opened.read()


def _is_heic(file) -> bool:
    """Whether a path or a file of bytes is HEIC, which could not be opened."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[:12]
    else:
        with open(file, "rb") as opened:
            head = opened.read(12)
    return "HEIF" not in FORMATS and head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns the image upright."""
    # Not ImageOps.exif_transpose: it writes the EXIF data anew, and fails where any other tag is damaged.
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))  # type: ignore[arg-type]
    except Exception:  # damaged EXIF data around a sound image
        return None


def _check_pixels(width: int, height: int) -> None:
    """PIL itself refuses twice as many pixels, and only warns, once, of fewer."""
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise UnreadableImageError(
            f"DecompressionBombError: Image size ({width * height} pixels) exceeds limit of {Image.MAX_IMAGE_PIXELS} "
            "pixels, could be decompression bomb."
        )


def _decode(image: Image.Image) -> None:
    """Decode a caller's image and its EXIF data now, in one thread."""
    with _DECODING:
        image.load()
        _turn_of(image)


def _to_upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn_of(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in SIXTEEN_BIT_MODES:  # PIL would clip these at 255 and leave white
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    if image.mode == "La":  # gray times alpha, which PIL converts to nothing but gray and alpha
        image = image.convert("LA")
    image = image.convert("RGB")
    image.info.clear()  # without its EXIF data nobody turns it once more
    return image


__all__ = [
    "FORMATS",
    "HEIC_CURE",
    "HEIC_SUFFIXES",
    "IMAGE_SUFFIXES",
    "MAX_IMAGE_SIDE",
    "ImageFile",
    "UnreadableImageError",
    "check_sides",
    "fetch_image",
    "fork_safe_lock",
    "read_image",
    "read_pixels",
]
