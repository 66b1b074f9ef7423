"""`read_image` on real encoded bytes: every mode, orientation and damage that a folder of images may hold."""

import base64
import io
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import thin_png
from PIL import ExifTags, Image, ImageFile

from modeling_cots import image_reading_cots
from modeling_cots.image_reading_cots import (
    MAX_IMAGE_SIDE,
    UnreadableImageError,
    fetch_image,
    read_image,
    read_pixels,
)

COLOR = (200, 100, 50)
GRAY = 117
# How an image is stored under each value of EXIF's orientation tag (EXIF 2.3, tag 0x0112).
STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def draw_image(height: int = 5, width: int = 7) -> np.ndarray:
    """(height, width, 3) noise: no two of its eight orientations are alike."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


# Modes


def plain(mode: str, color) -> Image.Image:
    return Image.new(mode, (8, 8), color)


PLAIN_IMAGES = {
    "rgb": (encode(plain("RGB", COLOR), "PNG"), COLOR),
    "jpeg": (encode(plain("RGB", COLOR), "JPEG", quality=95), COLOR),
    "webp": (encode(plain("RGB", COLOR), "WEBP", lossless=True), COLOR),
    "gif": (encode(plain("RGB", COLOR), "GIF"), COLOR),
    "grey": (encode(plain("L", GRAY), "PNG"), (GRAY,) * 3),
    "gray jpeg": (encode(plain("L", GRAY), "JPEG"), (GRAY,) * 3),
    "gray with alpha": (encode(plain("LA", (GRAY, 255)), "PNG"), (GRAY,) * 3),
    "black and white": (encode(plain("1", 1), "PNG"), (255,) * 3),
    "palette": (encode(plain("RGB", COLOR).quantize(4), "PNG"), COLOR),
    "transparent palette": (encode(plain("RGB", COLOR).quantize(4), "PNG", transparency=b"\xff\x80"), COLOR),
    "rgba": (encode(plain("RGBA", (*COLOR, 255)), "PNG"), COLOR),
    "half transparent": (encode(plain("RGBA", (*COLOR, 128)), "PNG"), COLOR),
    "cmyk": (encode(plain("CMYK", (55, 155, 205, 0)), "TIFF"), COLOR),
    "cmyk jpeg": (encode(plain("CMYK", (55, 155, 205, 0)), "JPEG", quality=95), COLOR),
    "luma and chroma": (encode(plain("RGB", COLOR).convert("YCbCr"), "JPEG", quality=95), COLOR),
}


@pytest.mark.parametrize("name", PLAIN_IMAGES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_mode_becomes_rgb_of_the_same_color(name):
    data, color = PLAIN_IMAGES[name]
    image = read_image(data)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 3  # JPEG rounds


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "PGM", "32-bit pixels"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    levels = np.linspace(0, 2**16 - 1, 64).astype(np.uint16).reshape(8, 8)
    source = {
        "PNG": lambda: encode(Image.fromarray(levels), "PNG"),
        "TIFF": lambda: encode(Image.fromarray(levels), "TIFF"),
        "big-endian TIFF": lambda: encode(Image.fromarray(levels.astype(">u2")), "TIFF"),
        "PGM": lambda: b"P5 8 8 65535\n" + levels.astype(">u2").tobytes(),
        "32-bit pixels": lambda: Image.fromarray(levels.astype(np.int32)),
    }[kind]()
    expected = np.repeat(levels[:, :, None] // 256, 3, axis=2)
    assert np.array_equal(np.asarray(read_image(source)), expected)


def test_wider_values_than_sixteen_bits_are_clipped_and_do_not_wrap_around():
    image = Image.fromarray(np.array([[-5, 2**16, 2**20]], dtype=np.int32))
    assert np.asarray(read_image(image))[0, :, 0].tolist() == [0, 255, 255]


# Orientation


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_images_stand_upright(orientation, format):
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](draw_image())))
    image = read_image(encode(stored, format, exif=exif(orientation)))
    assert np.array_equal(np.asarray(image), draw_image())


def test_sixteen_bit_images_stand_upright_too():
    levels = np.arange(0, 35 * 256, 256, dtype=np.uint16).reshape(5, 7)
    data = encode(Image.fromarray(np.ascontiguousarray(np.rot90(levels))), "PNG", exif=exif(6))
    assert np.array_equal(np.asarray(read_image(data))[:, :, 0], levels // 256)


def test_an_orientation_counts_though_another_tag_is_damaged():
    """Here PIL's own `exif_transpose` raises, because it writes all tags anew."""
    # One of its tags claims to be text where a number must stand.
    tags = struct.pack(">HHIIHHIHH", 0x0119, 2, 5, 0x26, 0x0112, 3, 1, 6, 0)
    data = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + tags + bytes(4) + b"text\0"
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(draw_image())))
    assert np.array_equal(np.asarray(read_image(encode(stored, "PNG", exif=data))), draw_image())


@pytest.mark.parametrize(
    "data",
    [
        b"Exif\0\0nothing of the kind",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",  # ends inside its first tag
        b"Exif\0\0II*\0\xff\xff\xff\x7f",  # points far beyond its end
        b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, 99, 0),  # no such orientation
        b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 2, 2, ord("A"), 0),  # text for a number
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_cost_the_image(data, format):
    image = read_image(encode(plain("RGB", COLOR), format, exif=data))
    assert np.abs(np.asarray(image).astype(int) - COLOR).max() <= 3


# Sources


def test_every_kind_of_source_gives_the_same_image(tmp_path):
    data = encode(Image.fromarray(draw_image()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        data,
        {"bytes": data, "path": None},
        {"bytes": data, "path": "not/there.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"path": str(tmp_path / "a.png")},
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        Image.fromarray(draw_image()),
    ]
    assert all(np.array_equal(np.asarray(read_image(source)), draw_image()) for source in sources)


def test_an_image_given_as_such_is_left_alone():
    image = Image.fromarray(draw_image())
    read_image(image).paste((0, 0, 0), (0, 0, 7, 5))
    assert np.array_equal(np.asarray(image), draw_image())


# Damage


def damaged_sources() -> dict:
    jpeg = encode(Image.fromarray(draw_image(64, 64)), "JPEG")
    png = encode(Image.fromarray(draw_image(64, 64)), "PNG")
    broken_middle = bytearray(png)
    broken_middle[len(png) // 2] ^= 0xFF
    return {
        "no bytes": b"",
        "text": b"<html>404 Not Found</html>",
        "a header alone": jpeg[:20],
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "truncated PNG": png[: len(png) // 2],
        "a flipped bit in PNG": bytes(broken_middle),
        "truncated, opened by the caller": Image.open(io.BytesIO(jpeg[: len(jpeg) // 2])),
        "a missing file": {"bytes": None, "path": "no/such/file.jpg"},
        "a folder": {"bytes": None, "path": "."},
        "no source": {"bytes": None, "path": None},
        "nothing": None,
    }


@pytest.mark.parametrize("name", damaged_sources())
def test_damage_is_one_clear_error(name):
    with pytest.raises(UnreadableImageError, match=r"^\w+(Error|Warning): "):
        read_image(damaged_sources()[name])


@pytest.mark.parametrize("rows_too_many", [1, 2000])
def test_decompression_bombs_are_refused_every_time(rows_too_many):
    """PIL itself only warns up to twice its limit, and only once."""
    bomb = png_header(1000, Image.MAX_IMAGE_PIXELS // 1000 + rows_too_many)
    for _ in range(2):
        with pytest.raises(UnreadableImageError, match="exceeds limit of .* decompression bomb"):
            read_image(bomb)


def test_the_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    assert read_image(encode(Image.fromarray(draw_image(5, 7)), "PNG")).size == (7, 5)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_image(encode(Image.fromarray(draw_image(6, 6)), "PNG"))


def test_settings_of_pil_and_of_warnings_stay_as_they_are():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    for source in damaged_sources().values():
        with pytest.raises(UnreadableImageError):
            read_image(source)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_formats_that_nobody_keeps_images_in_are_not_even_tried(monkeypatch):
    """PIL would hand EPS, a programming language, to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **options: pytest.fail("another program"))
    for format in ("EPS", "PCX", "ICO", "TGA", "PDF", "DDS"):
        with pytest.raises(UnreadableImageError):
            read_image(encode(Image.new("RGB", (8, 8)), format))


def test_a_refused_image_is_not_read_whatever_else_is_said_of_it():
    refused = {"bytes": encode(Image.new("RGB", (8, 8)), "PNG"), "path": None, "refused": "it is a link"}
    with pytest.raises(UnreadableImageError, match="^it is a link$"):
        read_image(refused)


# Thin images


@pytest.mark.parametrize("size", [(1, MAX_IMAGE_SIDE + 1), (MAX_IMAGE_SIDE + 1, 1), (1, 50_000_000)])
def test_an_image_that_is_too_long_is_not_decoded(size, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImageError, match=rf"{size[0]} x {size[1]} pixels, and no side may be longer"):
        read_image(thin_png(*size))


def test_an_image_object_that_is_too_long_is_refused_too():
    with pytest.raises(UnreadableImageError, match="no side may be longer"):
        read_image(Image.new("L", (MAX_IMAGE_SIDE + 1, 1)))
    assert read_image(Image.new("L", (MAX_IMAGE_SIDE, 1))).size == (MAX_IMAGE_SIDE, 1)


# Reading twice, and in threads


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_what_was_read_stays_as_it_is(format):
    image = read_image(encode(Image.fromarray(draw_image()), format, exif=exif(6)))
    assert np.array_equal(np.asarray(read_image(image)), np.asarray(image))
    assert not image.getexif()


def test_one_image_object_is_read_alike_by_many_threads():
    """PIL decodes it, and its EXIF data, when it is first used."""
    data = encode(Image.fromarray(draw_image(200, 300)), "PNG", exif=exif(6))
    expected = np.asarray(read_image(data))
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            image = Image.open(io.BytesIO(data))
            for found in threads.map(read_image, [image] * 8):
                assert np.array_equal(np.asarray(found), expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_threads_refuse_every_bomb_and_leave_the_warnings_alone():
    before = list(warnings.filters)
    bomb, sound = png_header(1000, Image.MAX_IMAGE_PIXELS // 1000 + 1), encode(Image.new("L", (9, 9)), "PNG")

    def is_refused(data: bytes) -> bool:
        try:
            read_image(data)
        except UnreadableImageError:
            return True
        return False

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(is_refused, [bomb, sound] * 200)) == [True, False] * 200
    assert list(warnings.filters) == before


# Sources of strings


def test_a_string_is_a_path_a_data_url_or_base64(tmp_path):
    data = encode(Image.fromarray(draw_image()), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    for source in (str(tmp_path / "a.png"), f"data:image/png;base64,{text}", text):
        assert np.array_equal(np.asarray(fetch_image(source)), draw_image())
    for source in ("", "data:image/png;base64,AAAA"):
        with pytest.raises(UnreadableImageError, match=r"^UnidentifiedImageError: "):
            fetch_image(source)
    for source in ("no/such/file.png", "ä", "no/such/file.png" * 1000):
        with pytest.raises(
            UnreadableImageError, match=f"^'{source[:100]}' is neither a file that is there, nor a URL"
        ):
            fetch_image(source)


def write_heic(path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:, :20, 0] = 200
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=90)


def test_heic_is_read_where_its_library_is_installed(tmp_path):
    write_heic(tmp_path / "a.heic")
    for source in (str(tmp_path / "a.heic"), (tmp_path / "a.heic").read_bytes()):
        image = read_image(source)
        assert image.mode == "RGB" and image.size == (40, 24)
        assert abs(image.getpixel((5, 5))[0] - 200) < 20 and image.getpixel((35, 5))[0] < 20
    (tmp_path / "cut.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:200])
    with pytest.raises(UnreadableImageError):
        read_image(str(tmp_path / "cut.heic"))


def test_heic_without_its_library_is_named(tmp_path, monkeypatch):
    write_heic(tmp_path / "a.heic")
    monkeypatch.setattr("modeling_cots.image_reading_cots.FORMATS", ["JPEG", "PNG"])
    for source in (str(tmp_path / "a.heic"), (tmp_path / "a.heic").read_bytes()):
        with pytest.raises(UnreadableImageError, match=r"HEIC needs pillow-heif: pip install 'modeling_cots\[heic\]'"):
            read_image(source)
    (tmp_path / "b.heic").write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
        read_image(str(tmp_path / "b.heic"))


# By simplejpeg


def shaded(height: int = 150, width: int = 201) -> Image.Image:
    """Smooth shades with an edge, as photographs have."""
    shades = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.array(shades.resize((width, height), Image.Resampling.BICUBIC))
    pixels[: height // 3, width // 3 :] = (250, 20, 40)
    return Image.fromarray(pixels)


def jpegs() -> dict[str, bytes]:
    image = shaded()
    return {
        "4:2:0": encode(image, "JPEG", quality=90),
        "4:2:2": encode(image, "JPEG", quality=90, subsampling="4:2:2"),
        "4:4:4": encode(image, "JPEG", quality=90, subsampling="4:4:4"),
        "progressive": encode(image, "JPEG", progressive=True),
        "stored as RGB": encode(image, "JPEG", keep_rgb=True),
        "restart markers": encode(image, "JPEG", restart_marker_rows=1),
        "gray": encode(image.convert("L"), "JPEG"),
        "CMYK": encode(image.convert("CMYK"), "JPEG"),
        "something behind its end": encode(image, "JPEG") + b"a film",
        "one pixel": encode(Image.new("RGB", (1, 1), COLOR), "JPEG"),
        **{f"turned by {number}": encode(image, "JPEG", exif=exif(number)) for number in STORED_AS},
    }


@pytest.fixture
def decoded_by_simplejpeg(monkeypatch) -> list:
    """What simplejpeg has decoded in this test."""
    simplejpeg = pytest.importorskip("simplejpeg")
    decoded, decode = [], simplejpeg.decode_jpeg

    def counted(*args, **options):
        decoded.append(decode(*args, **options))
        return decoded[-1]

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    return decoded


@pytest.mark.parametrize("name", jpegs())
def test_simplejpeg_gives_the_pixels_that_pil_gives(name, decoded_by_simplejpeg, tmp_path):
    data = jpegs()[name]
    (tmp_path / "a.jpg").write_bytes(data)
    expected = np.asarray(read_image(data))
    assert not decoded_by_simplejpeg
    for source in (data, tmp_path / "a.jpg", {"bytes": data, "path": None}):
        assert np.array_equal(read_pixels(source), expected)
    assert len(decoded_by_simplejpeg) == (0 if name == "CMYK" else 3)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("name", jpegs())
def test_simplejpeg_decodes_fractions_as_pil_does(name, reduction, decoded_by_simplejpeg):
    data = jpegs()[name]
    with image_reading_cots.ImageFile(data) as by_pil, image_reading_cots.ImageFile(data) as by_simplejpeg:
        expected = np.asarray(by_pil.read(reduction)).astype(int)
        found = by_simplejpeg.read_pixels(reduction)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 2
        if name != "one pixel":  # of which PIL decodes no fraction, and of which every fraction is one pixel
            assert by_simplejpeg.reduction == by_pil.reduction == reduction


def without_address(raised) -> str:
    """The message of an error, which may name an object in memory."""
    return re.sub(r"0x\w+", "", str(raised.value))


@pytest.mark.parametrize("source", [*damaged_sources().values()], ids=[*damaged_sources()])
def test_pixels_are_refused_as_images_are(source):
    with pytest.raises(UnreadableImageError) as of_image:
        read_image(source)
    if not isinstance(source, Image.Image):  # what the caller has opened cannot be decoded a second time
        with pytest.raises(UnreadableImageError) as of_pixels:
            read_pixels(source)
        assert without_address(of_pixels) == without_address(of_image)


@pytest.mark.parametrize("name", ["4:2:0", "progressive", "gray", "turned by 6"])
def test_damage_is_refused_or_read_as_pil_does(name, decoded_by_simplejpeg):
    """Whatever simplejpeg warns of is left to PIL, which refuses some of it."""
    draw, sound = np.random.default_rng(0), jpegs()[name]
    refused = 0
    for number in range(150):
        data = bytearray(sound)
        if number % 3 == 0:
            del data[draw.integers(2, len(data)) :]
        for position in draw.integers(2, len(data), number % 3):
            data[position] = draw.integers(0, 256)
        try:
            expected = np.asarray(read_image(bytes(data)))
        except UnreadableImageError as error:
            refused += 1
            with pytest.raises(UnreadableImageError) as raised:
                read_pixels(bytes(data))
            assert without_address(raised) == re.sub(r"0x\w+", "", str(error))
        else:
            assert np.array_equal(read_pixels(bytes(data)), expected)
    assert 30 < refused < 120
    assert decoded_by_simplejpeg


def test_a_bomb_is_refused_before_simplejpeg_decodes_it(decoded_by_simplejpeg, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="decompression bomb"):
        read_pixels(jpegs()["4:2:0"])
    assert not decoded_by_simplejpeg


@pytest.mark.parametrize("name", ["4:2:0", "gray", "turned by 6"])
def test_pixels_are_the_same_without_simplejpeg(name, monkeypatch):
    expected = read_pixels(jpegs()[name])
    monkeypatch.setattr(image_reading_cots, "simplejpeg", None)
    assert np.array_equal(read_pixels(jpegs()[name]), expected)
