"""Reads the image and the captions of one row of a file, or of one sample of a shard, and chooses the columns."""

import json
from collections.abc import Container, Sequence

IMAGE_COLUMNS = ("image", "file_name", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "captions", "text", "txt", "json")
JSON_CAPTIONS = ("caption", "captions", "text")
# The columns of cached image tokens, see image_token_cache.py.
IMAGE_TOKENS, TOKEN_SOURCE = "image_tokens", "image_tokens_source"
MAX_TEXT_BYTES = 2**20


class BadRowError(ValueError):
    """Raised for a row without an image or without a caption, or with other values in their place."""


def read_row(row: dict, image_column: str | None = None, caption_column: str | None = None) -> tuple[bytes, list[str]]:
    """
    The encoded image and the captions of a row; nothing is decoded, and no file is opened.

    Args:
        row: Column -> value. An image is bytes or {"bytes": ..., "path": ...}; captions are a string, a list of
            strings, an object that has them in a field, or the UTF-8 bytes of a text or JSON file.
        image_column: By default the first of `IMAGE_COLUMNS` that holds something.
        caption_column: By default the first of `CAPTION_COLUMNS` that does; "column.field" names a field of an object,
            by default the first of `JSON_CAPTIONS`.

    Raises [`BadRowError`] where the image or the captions are missing.
    """
    image = row.get(_find(row, image_column, IMAGE_COLUMNS, "image"))
    if isinstance(image, dict):
        image = image.get("bytes")
    if not isinstance(image, bytes):
        raise BadRowError("it has no image inside, only the name of a file or nothing")
    caption_column, field = split_field(caption_column, row)
    column = _find(row, caption_column, CAPTION_COLUMNS, "caption")
    captions = _captions_of(row[column], column, field)
    if not captions:
        raise BadRowError("it has no caption")
    return image, captions


def first_available(available: Container[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The wanted name, or without one the first of the usual names; `None` if it is not available."""
    return next((name for name in (usual if wanted is None else (wanted,)) if name in available), None)


def split_field(caption_column: str | None, columns: Container[str]) -> tuple[str | None, str | None]:
    """
    The column and the field that a name means: "json.alt" is the field "alt" of the objects in the column "json".

    A name without a dot, or of a column that has a dot in its own name, means the column; the field is then `None`.

    Args:
        caption_column: As a user writes it, or `None`.
        columns: Names of the columns that there are.
    """
    if caption_column is None or caption_column in columns or "." not in caption_column:
        return caption_column, None
    column, field = caption_column.split(".", 1)
    return column, field


def list_captions(value) -> list[str]:
    """
    The captions in a cell: a string is one, a list of strings holds several, and `None` is none, also in a list.

    An empty string is a caption. Raises `TypeError` for anything else.
    """
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list | None) or not all(isinstance(each, str | None) for each in captions or []):
        raise TypeError("captions are neither a string nor a list of strings")
    return [each for each in captions or [] if each is not None]


def wanted_columns(image_column: str | None, caption_column: str | None) -> set[str]:
    """All columns that `read_row` may look at, given the names that the user chose."""
    images = IMAGE_COLUMNS if image_column is None else (image_column,)
    captions = CAPTION_COLUMNS
    if caption_column is not None:
        captions = (caption_column, split_field(caption_column, ())[0])
    return {*images, *captions, IMAGE_TOKENS, TOKEN_SOURCE}


def cached_tokens(row: dict) -> dict:
    """The two columns of cached image tokens in a row; an empty dict if the row has none."""
    if not isinstance(row.get(TOKEN_SOURCE), str):
        return {}
    return {IMAGE_TOKENS: row[IMAGE_TOKENS], TOKEN_SOURCE: row[TOKEN_SOURCE]}


def _find(row: dict, wanted: str | None, usual: tuple[str, ...], kind: str) -> str:
    column = first_available({name for name in row if row[name] is not None}, wanted, usual)
    if column is None:
        there = ", ".join(name for name in row if not name.startswith("__")) or "nothing"
        looked_for = repr(wanted) if wanted is not None else f"one of {', '.join(usual)}"
        raise BadRowError(f"it has no {kind} in {looked_for}; there is {there}")
    return column


def _captions_of(value, column: str, field: str | None) -> list[str]:
    if isinstance(value, bytes):
        value = _decode(value, is_json=column == "json" or field is not None)
    if isinstance(value, dict):
        field = first_available({name for name in value if value[name] is not None}, field, JSON_CAPTIONS)
        value = None if field is None else value[field]
    elif field is not None:
        raise BadRowError(f"{column!r} has no field {field!r}")
    try:
        return list_captions(value)
    except TypeError as error:
        raise BadRowError(f"its captions in {column!r} are neither a string nor a list of strings") from error


def _decode(content: bytes, is_json: bool):
    if len(content) > MAX_TEXT_BYTES:
        raise BadRowError(f"its caption file has {len(content):,} bytes, more than {MAX_TEXT_BYTES:,}")
    try:
        text = content.decode("utf-8")
        return json.loads(text) if is_json else text
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or JSON of a thousand brackets
        raise BadRowError(f"its caption file is damaged: {type(error).__name__}") from error
