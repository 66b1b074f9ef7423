"""The columns beside images and captions, by which `cots-search` filters: every one gets a single type.

The type of a column is that of most of its values. Values of another type are left out, counted and named.
"""

import json
import math
from collections import Counter

import datasets
from transformers.utils import logging

from .messages import printable, shown
from .skip_report import and_more

logger = logging.get_logger(__name__)

MAX_NAMES = 5  # of rows, in a warning
LARGE = "larger than 64 bits"
KINDS = {"text": str, "number": float, "integer": int, "truth value": bool}


class OtherColumns:
    """
    The values of a table of tables.py beside images and captions.

    Args:
        table: It has R rows; its column "others" holds a JSON object or `None` in each, and "are_text" whether its
            values are all texts, as csv files have them: numbers are then read from them.
    """

    def __init__(self, table: datasets.Dataset):
        self._rows = table.select_columns(["others", "are_text"])
        counts: dict[str, Counter[str]] = {}
        odd: dict[tuple[str, str], list[str]] = {}  # the first rows of each column and kind
        for number, row in enumerate(self._rows.with_format("arrow")[:].to_pylist()):
            for name, value in json.loads(row["others"] or "{}").items():
                kind = _kind_of(_read(value, row["are_text"]))
                of_column = counts.setdefault(name, Counter())
                if kind is not None:
                    of_column[kind] += 1
                    examples = odd.setdefault((name, kind), [])
                    if len(examples) <= MAX_NAMES:
                        examples.append(f"{shown(value)} in row {number}")
        self.kinds = {name: _kind_of_most(of_column) for name, of_column in counts.items()}
        for name, of_column in counts.items():
            for kind, count in of_column.items():
                if not _fits(kind, self.kinds[name]):
                    told = and_more(odd[name, kind][:MAX_NAMES], MAX_NAMES)
                    more = f" and {count - MAX_NAMES} more" if count > MAX_NAMES else ""
                    logger.warning(
                        f"Left out {count} values of the column {name!r}, where most are of the kind "
                        f"{self.kinds[name]!r}: {told}{more}."
                    )

    def row(self, number: int) -> dict:
        """Column -> text, number, truth value or `None`, for each of the columns."""
        row = self._rows[number]
        values = json.loads(row["others"] or "{}")
        return {name: _convert(values.get(name), kind, row["are_text"]) for name, kind in self.kinds.items()}


def _read(value, is_text: bool):
    return _parse(value) if is_text and isinstance(value, str) else value


def _convert(value, kind: str, is_text: bool):
    if kind == "text":
        return None if value is None else printable(str(value))
    value = _read(value, is_text)
    value_kind = _kind_of(value)
    return KINDS[kind](value) if value_kind is not None and _fits(value_kind, kind) else None


def _parse(text: str):
    """What a cell of a csv file means: a number, a truth value, nothing or a text."""
    stripped = text.strip()
    if stripped in ("True", "False", "true", "false"):
        return stripped in ("True", "true")
    for kind in (int, float):
        try:
            return kind(stripped) if len(stripped) <= 400 and "_" not in stripped else text
        except ValueError:
            pass
    return text


def _kind_of(value) -> str | None:
    """One of `KINDS`, or `LARGE`; `None` for what is no value: `None`, NaN and an empty text."""
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, int):
        return "integer" if -(2**63) <= value < 2**63 else LARGE
    if isinstance(value, float):
        return None if math.isnan(value) else "number" if math.isfinite(value) else LARGE
    return "text" if value else None


def _kind_of_most(counts: Counter[str]) -> str:
    numbers = counts["integer"] + counts["number"]
    if numbers and numbers >= max(counts["text"], counts["truth value"]):
        return "number" if counts["number"] else "integer"
    return "truth value" if counts["truth value"] > counts["text"] else "text"


def _fits(kind: str, wanted: str) -> bool:
    """Whether a value of a kind can stand in a column of the wanted one; anything can be a text."""
    return wanted in ("text", kind) or (kind, wanted) == ("integer", "number")
