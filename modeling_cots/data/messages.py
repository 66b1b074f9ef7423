"""Values in messages: of a long one, such as a whole image in text, only the beginning."""

MAX_SHOWN = 100  # characters of a value
MAX_TEXT = 300  # characters of a name or of another library's message
MAX_FIELDS = 5  # of an object


def shown(value) -> str:
    """A value as Python writes it; of a long one the beginning, and no content of a file."""
    kind = ""
    while isinstance(value, list | tuple) and value:
        kind, value = f"{kind}a list of ", value[0]
    if isinstance(value, bytes):
        text = f"{len(value):,} bytes"
    elif isinstance(value, dict):
        names = [shorten(str(name), MAX_SHOWN) for name in list(value)[:MAX_FIELDS]]
        text = f"an object of {', '.join(names) or 'nothing'}"
    elif isinstance(value, int) and value.bit_length() > 4 * MAX_SHOWN:  # Python refuses to write out the longest
        text = "a very large number"
    elif isinstance(value, str) and len(value) > MAX_SHOWN:
        text = f"{repr(value[:MAX_SHOWN])[: 2 * MAX_SHOWN]}... ({len(value):,} long)"
    else:
        text = repr(value)
    return shorten(printable(kind + text), MAX_TEXT)


def shorten(text: str, limit: int = MAX_TEXT) -> str:
    """A text of at most about `limit` characters: its beginning, its end, and between them how much is left out."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}... ({len(text) - limit:,} characters) ...{text[len(text) - limit // 2 :]}"


def printable(text: str) -> str:
    """A text that can be printed and stored: bytes of a file name that are no UTF-8 become escapes such as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
