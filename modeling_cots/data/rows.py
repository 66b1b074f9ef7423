"""Reads the image (or video) and the captions of one row of a file, or of one sample of a shard, and says what is odd.

Each row is read by itself, so that an odd cell costs no other row. formats.py makes rows of files.
"""

import json
import math
from collections.abc import Container, Sequence
from typing import NamedTuple

import pyarrow as pa

from .messages import printable, shown

IMAGE_COLUMNS = ("image", "file_name", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "json")
VIDEO_COLUMNS = ("video", "file_name", "path")
VIDEO_CAPTION_COLUMNS = ("caption", "captions", "text", "sentence")
JSON_CAPTIONS = ("caption", "captions", "text")
# The columns of cached image tokens, see image_token_cache.py.
IMAGE_TOKENS, TOKEN_SOURCE = "image_tokens", "image_tokens_source"
TOKENS_TYPE = pa.list_(pa.list_(pa.uint16()))
MAX_TEXT_BYTES = 2**20
MAX_PATH = 4_096  # the longest path of Linux
ENCODED = ("data:", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # how data URLs, JPEG, PNG, GIF and WebP begin in base64


class BadRowError(ValueError):
    """Raised for a row without an image or without a caption, or with other values in their place."""


class Columns(NamedTuple):
    """
    Where a row has its image or video, and where its captions: of each the first name that holds something.

    Attributes:
        kind: "image" or "video".
        media: Names of columns. They hold encoded bytes (images alone), paths, or {"bytes": ..., "path": ...}.
        captions: Names of columns. "column.field" names a field of an object, unless a column has that name.
    """

    kind: str
    media: tuple[str, ...]
    captions: tuple[str, ...]

    def wanted(self) -> set[str]:
        """All columns that may be looked at."""
        return {*self.media, *self.captions, *(split_field(name, ())[0] for name in self.captions)} | {
            IMAGE_TOKENS,
            TOKEN_SOURCE,
        }


def image_columns(image_column: str | None = None, caption_column: str | None = None) -> Columns:
    """The columns of images and captions that a user names; without a name the usual ones."""
    images = IMAGE_COLUMNS if image_column is None else (image_column,)
    if image_column == "image":
        images = ("image", "file_name")  # as `datasets` calls the column "file_name" of a folder of images
    return Columns("image", images, CAPTION_COLUMNS if caption_column is None else (caption_column,))


def video_columns(video_column: str | None = None, caption_column: str | None = None) -> Columns:
    """The columns of videos and captions that a user names; without a name the usual ones."""
    videos = VIDEO_COLUMNS if video_column is None else (video_column,)
    return Columns("video", videos, VIDEO_CAPTION_COLUMNS if caption_column is None else (caption_column,))


def read_row(row: dict, columns: Columns) -> tuple[dict, list[str]]:
    """
    The image or video and the captions of a row that must have both; see `read_media` and `read_captions`.

    Raises [`BadRowError`] where one of them is missing.
    """
    media = read_media(row, columns)
    captions, note = read_captions(row, columns)
    if not captions:
        raise BadRowError(note or missing(row, columns.captions, "caption"))
    return media, captions


def read_media(row: dict, columns: Columns) -> dict:
    """
    The image or video of a row as {"bytes": bytes | None, "path": str | None}; nothing is decoded, no file is opened.

    Args:
        row: Column -> value.
        columns: Where to look.

    Raises [`BadRowError`] for a row that holds neither bytes nor the path of a file.
    """
    name, value = _first(row, columns.media)
    if name is None:
        raise BadRowError(missing(row, columns.media, columns.kind))
    if isinstance(value, BadRowError):
        raise value
    media = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
    content, path = media.get("bytes"), media.get("path")
    if isinstance(content, bytes) and columns.kind == "image":
        in_shard = f"{row['__key__']}.{name}" if "__key__" in row else None
        return {"bytes": content, "path": path if isinstance(path, str) else in_shard}
    if content is not None or not isinstance(path, str) or not path:
        raise BadRowError(f"its {columns.kind} column {name!r} holds {shown(value)}, neither an image nor a path")
    if len(path) > MAX_PATH or path.startswith(ENCODED):
        raise BadRowError(
            f"its {columns.kind} column {name!r} holds {shown(path)}, which is no path but a file encoded in a text: "
            "decode it, for example by base64.b64decode, and store it as bytes in a column of a parquet file"
        )
    return {"bytes": None, "path": path}


def read_captions(row: dict, columns: Columns) -> tuple[list[str], str | None]:
    """
    The captions of a row, which may be none, and what is odd about them (else `None`).

    Captions are a string, a list of strings, an object that has them in a field (of `JSON_CAPTIONS`, or the one that
    the column's name names), a list of such objects, or the UTF-8 bytes of a text or JSON file. An empty string is a
    caption. `None` and NaN are none, also in a list; any other value is left out, and is what is odd.

    Args:
        row: Column -> value.
        columns: Where to look.
    """
    for wanted in columns.captions:
        name, field = split_field(wanted, row)
        value = row.get(name)
        if _is_nothing(value) and value != "":
            continue
        if isinstance(value, BadRowError):
            return [], str(value)
        if isinstance(value, bytes):
            try:
                value = _decode(value, is_json=name == "json" or field is not None)
            except BadRowError as error:
                return [], str(error)
        if field is not None and not isinstance(value, dict):
            return [], f"{name!r} has no field {field!r}"
        captions, odd = list_captions(value, field)
        return captions, f"its captions in {name!r} hold {shown(odd[0])}, which is no text" if odd else None
    return [], None


def list_captions(value, field: str | None = None) -> tuple[list[str], list]:
    """
    The captions in a cell (see `read_captions`), and the values in it that are none.

    Args:
        value: The cell.
        field: The field of an object that holds its captions; without, the first of `JSON_CAPTIONS` that it has.
    """
    captions: list[str] = []
    odd: list = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            name = first_available({name for name in each if each[name] is not None}, field, JSON_CAPTIONS)
            each = None if name is None else each[name]
        for text in each if isinstance(each, list) and not isinstance(value, list) else [each]:
            if isinstance(text, str):
                # Half a surrogate pair, which JSON can escape, is no text that Arrow or a tokenizer takes.
                captions.append(text.encode("utf-8", "replace").decode("utf-8"))
            elif text is not None and not (isinstance(text, float) and math.isnan(text)):
                odd.append(text)
    return captions, odd


def missing(row: dict, names: Sequence[str], kind: str) -> str:
    """What to say of a row that has nothing in any of these columns."""
    empty = [name for name in names if split_field(name, row)[0] in row]
    if empty:
        return f"it has no {kind} in {', '.join(map(repr, empty))}"
    there = ", ".join(printable(str(name)) for name in row if not str(name).startswith("__")) or "nothing"
    looked_for = repr(names[0]) if len(names) == 1 else f"one of {', '.join(names)}"
    return f"it has no {kind} in {looked_for}; there is {there}"


def first_available(available: Container[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The wanted name, or without one the first of the usual names; `None` if it is not available."""
    return next((name for name in (usual if wanted is None else (wanted,)) if name in available), None)


def split_field(caption_column: str, columns: Container[str]) -> tuple[str, str | None]:
    """
    The column and the field that a name means: "json.alt" is the field "alt" of the objects in the column "json".

    A name without a dot, or of a column that has a dot in its own name, means the column; the field is then `None`.

    Args:
        caption_column: As a user writes it.
        columns: Names of the columns that there are.
    """
    if caption_column in columns or "." not in caption_column:
        return caption_column, None
    column, field = caption_column.split(".", 1)
    return column, field


def cached_tokens(row: dict) -> dict:
    """The two columns of cached image tokens in a row; an empty dict if the row has none.

    Raises [`BadRowError`] for other values than lists of lists of numbers from 0 to 65,535, or `None`.
    """
    if not isinstance(row.get(TOKEN_SOURCE), str):
        return {}
    try:
        (tokens,) = pa.array([row.get(IMAGE_TOKENS)], TOKENS_TYPE).to_pylist()
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        raise BadRowError(f"its {IMAGE_TOKENS} are no lists of numbers from 0 to 65,535") from None
    return {IMAGE_TOKENS: tokens, TOKEN_SOURCE: row[TOKEN_SOURCE]}


def _first(row: dict, names: Sequence[str]) -> tuple[str | None, object]:
    return next(((name, row[name]) for name in names if not _is_nothing(row.get(name))), (None, None))


def _is_nothing(value) -> bool:
    """Whether a cell is empty: `None`, NaN, an empty text, or an image without bytes and path."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        return value.get("bytes") is None and not value.get("path")
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _decode(content: bytes, is_json: bool):
    if len(content) > MAX_TEXT_BYTES:
        raise BadRowError(f"its caption file has {len(content):,} bytes, more than {MAX_TEXT_BYTES:,}")
    try:
        text = content.decode("utf-8")
        return read_json(text) if is_json else text
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or JSON of a thousand brackets
        raise BadRowError(f"its caption file is damaged: {type(error).__name__}") from error


def read_json(text: str | bytes):
    """JSON with integers of any length: one of thousands of digits becomes infinite. Raises as `json.loads` does."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 400 else float(digits))
