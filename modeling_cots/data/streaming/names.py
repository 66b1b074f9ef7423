"""Expands braces and stars in the names of shards, on this machine or at any address that fsspec knows."""

import itertools
import posixpath
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

import fsspec

MAX_NAMES = 1_000_000
BRACES = re.compile(r"\{([^{}]*)\}")
HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+( [^/\\]*)?")
LOCAL_URL = re.compile(r"(file|local)://", re.IGNORECASE)
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def is_url(name: str) -> bool:
    """Whether `name` begins with a protocol, as https://, s3:// or hf:// do."""
    return "://" in name


def expand_braces(pattern: str) -> list[str]:
    """
    "a-{000..002}.tar" -> a-000.tar, a-001.tar, a-002.tar; "{a,b}.tar" -> a.tar, b.tar; without braces, the name alone.

    Raises `ValueError` for a range that ends before it begins, braces without range or comma, and over a million
    names.
    """
    pieces = BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [[piece] if i % 2 == 0 else _choices(piece, pattern) for i, piece in enumerate(pieces)]
    total = 1
    for each in choices:
        total *= len(each)
    if total > MAX_NAMES:
        raise ValueError(f"{pattern!r} stands for {total:,} names; {MAX_NAMES:,} at most.")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    if match := RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        if last < first:
            raise ValueError(f"The range {{{inside}}} in {pattern!r} runs backwards.")
        if last - first >= MAX_NAMES:
            raise ValueError(f"The range {{{inside}}} in {pattern!r} has {last - first + 1:,} names.")
        width = len(match[1]) if match[1].startswith("0") else 0
        return [str(number).zfill(width) for number in range(first, last + 1)]
    if "," not in inside:
        raise ValueError(f"{{{inside}}} in {pattern!r} is neither a range ({{000..009}}) nor a list ({{a,b}}).")
    return inside.split(",")


def expand_urls(pattern: str) -> list[str]:
    """
    All addresses that match a pattern with braces and stars. Stars are looked up at the server.

    Raises `ValueError` for an unknown protocol, a protocol whose package is not installed, and a star that matches
    nothing or cannot be looked up.
    """
    return list(_expand_stars(pattern))


def _expand_stars(pattern: str) -> Iterator[str]:
    for url in expand_braces(pattern):
        try:
            fs, path = fsspec.core.url_to_fs(url)
            # A question mark begins the query of a web address; it is a wildcard nowhere here.
            found = [fs.unstrip_protocol(name) for name in sorted(fs.glob(path))] if "*" in path else [url]
        except Exception as error:  # each protocol has its own
            raise ValueError(f"{display_name(url)} cannot be looked up: {type(error).__name__}: {error}") from error
        if not found:
            raise ValueError(f"No file matches {display_name(url)}.")
        yield from found


def display_name(name: str) -> str:
    """A name for logs: of a web address without user, password and query, as a query may be a signature."""
    if not is_url(name):
        return name
    parts = urlsplit(name)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def public_name(dataset: str) -> str:
    """
    What a published card may say of a data set: a Hub id, an address without user and query, a name without its path.

    Folders of this machine are left out, also of globs, lists in braces and file:// addresses.

    Args:
        dataset: As a user names it, or a name of it with the split behind ("scenes validation").
    """
    if is_url(dataset) and not LOCAL_URL.match(dataset):
        return display_name(dataset)
    if HUB_ID.fullmatch(dataset):
        return dataset
    path = re.sub(r"\{[^{}]*[/\\][^{}]*\}", "{...}", dataset).replace("\\", "/")
    return posixpath.basename(posixpath.normpath(path))
