"""Messages show the beginning of a long value, and so never a whole image."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from modeling_cots.data.messages import printable, shorten, shown
from modeling_cots.data.pairs import open_pairs
from modeling_cots.data.skip_report import SkipReport, StreamReport, and_more
from modeling_cots.data.videos import open_videos
from modeling_cots.image_reading_cots import UnreadableImageError, read_image

MAX_MESSAGE = 1_000


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"x" * 10**6, [1] * 10**6, ["x" * 10**6], {"a": "x" * 10**6}, 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_long_values_are_cut(value):
    assert len(shown(value)) < 400
    assert shown("short") == "'short'" and shown(5) == "5" and shown([]) == "[]"
    assert shown(["a"]) == "a list of 'a'" and shown({"a": 1}) == "an object of a"


def test_no_content_of_a_file_is_shown_and_names_can_be_printed():
    assert shown(b"secret") == "6 bytes" and shown([b"secret"]) == "a list of 6 bytes"
    assert printable("caf\udce9.png") == "caf\\udce9.png" and printable("café") == "café"


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert shorten("short") == "short"
    text = shorten("a" * 10**6 + "end")
    assert len(text) < 400 and text.startswith("aaa") and text.endswith("end") and "999,703 characters" in text


def encode(kind: str) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("column", ["image", "video"])
@pytest.mark.parametrize(
    ("value", "cure"),
    [
        (encode("JPEG"), "decode it"),
        (encode("PNG"), "decode it"),
        (encode("BMP"), "decode it"),
        ("data:image/webp;base64," + encode("WEBP"), "decode it"),
        ("https://host/0.jpg", "download what the addresses name"),
        ("images\\0.jpg", "write / in place of"),
        ("elsewhere/0.jpg", "move the files there"),
    ],
    ids=lambda value: value[:12],
)
def test_what_is_no_path_is_refused_in_a_short_sentence(tmp_path, column, value, cure):
    (tmp_path / "a.jsonl").write_text(json.dumps({column: value, "caption": "a thing"}) + "\n")
    opening = open_pairs if column == "image" else open_videos
    with pytest.raises(ValueError, match=cure) as caught:
        opening(str(tmp_path / "a.jsonl"), "train")
    assert len(str(caught.value)) < MAX_MESSAGE and "\n" not in str(caught.value)


def test_reports_and_errors_of_images_are_short(caplog):
    image = encode("BMP")
    with pytest.raises(UnreadableImageError) as caught:
        read_image(image)
    assert len(str(caught.value)) < MAX_MESSAGE
    assert len(and_more([image] * 3, 2)) < MAX_MESSAGE
    messages = []
    for report in (SkipReport(), StreamReport()):
        report._named.warn = lambda name, message: messages.append(message)
    report.add_sample(image, image)
    report.add_shard(image, OSError(image), 3)
    reported = SkipReport()
    reported._named.warn = lambda name, message: messages.append(message)
    reported.add(image, OSError(image))
    assert len(messages) == 3 and max(map(len, messages)) < MAX_MESSAGE
