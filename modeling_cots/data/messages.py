"""Values in messages: of a long one, such as a whole image in text, only the beginning."""

MAX_SHOWN = 100  # characters of a value
MAX_TEXT = 300  # characters of a name or of another library's message


def shown(value) -> str:
    """A value as Python writes it; of a long one the beginning, and how long it is."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_SHOWN:  # Python refuses to write out the longest
        return "an integer of more than a hundred digits"
    if isinstance(value, str | bytes | list | tuple) and len(value) > MAX_SHOWN:
        return f"{repr(value[:MAX_SHOWN])[: 2 * MAX_SHOWN]}... ({len(value):,} long)"
    return shorten(repr(value), 2 * MAX_SHOWN)


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """A text of at most about `limit` characters: its beginning, its end, and between them how much is left out."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}... ({len(text) - limit:,} characters) ...{text[len(text) - limit // 2 :]}"
