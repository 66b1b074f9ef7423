"""Filters on the metadata of a search index, such as `year >= 2020`: read from text, applied to Arrow or Milvus.

A condition means the same in every vector store. A column holds texts, numbers or booleans, and is compared with
values of its kind alone: `as_kind` refuses all others, and takes a value without quotes as a text where the column
holds texts. A condition never holds for an entry that lacks the value, whatever the operator.
"""

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.messages import shown
from ..data.skip_report import and_more

COMPARISONS = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
OPERATORS = (*COMPARISONS, "in")
UNORDERED = ("==", "!=", "in")  # what booleans can be compared by
MAX_LENGTH = 10_000  # characters of a condition
MAX_COLUMNS = 30  # named in a message
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1  # what Arrow and Milvus hold
# A column is in quotes, or is all before the first operator; `in` is an operator only before a list.
QUOTED = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*(==|!=|<=|>=|<|>|=|in(?=\s*[\[(]))""", re.DOTALL)
OPERATOR = re.compile(r"==|!=|<=|>=|<|>|=|(?<=\s)in(?=\s*[\[(])")


class Kind(NamedTuple):
    """What a column holds: the types of its values, and the words for it in messages."""

    types: tuple[type, ...]
    plural: str
    example: str


TEXT = Kind((str,), "texts", "a text, in quotes if it is a number")
NUMBER = Kind((int, float), "numbers", "a number without quotes")
BOOLEAN = Kind((bool,), "booleans", "true or false")


@dataclass(frozen=True)
class Condition:
    """
    A comparison of a column with a value; several conditions must all hold.

    Args:
        column: The name of a column of metadata, or `name` or `source`.
        operator: One of ==, !=, <, <=, >, >=, in.
        value: A string, number or boolean; for `in` a list of these.
        words: How each value was written if it was written without quotes, else `None`; this is what counts where the
            column holds texts.

    Raises `ValueError` for another operator or value.
    """

    column: str
    operator: str
    value: str | int | float | bool | tuple
    words: tuple[str | None, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self):
        if self.operator not in OPERATORS:
            raise ValueError(f"A condition compares with one of {', '.join(OPERATORS)}; got {shown(self.operator)}.")
        if not isinstance(self.column, str) or not _is_encodable(self.column):
            raise ValueError(f"{shown(self.column)} is not the name of a column.")
        values = self.value if self.operator == "in" else (self.value,)
        if isinstance(values, list):
            values = tuple(values)
            object.__setattr__(self, "value", values)
        odd = [value for value in values if not _is_scalar(value)] if isinstance(values, tuple) else [values]
        if odd:
            where = " in a list" if values is self.value and isinstance(values, tuple) else ""
            raise ValueError(
                f"{shown(self.column)} can be compared with a string, a finite number or a boolean, and by `in` with "
                f"a list of these, its texts in quotes; got {shown(odd[0])}{where}."
            )
        if not values:
            raise ValueError(f"The list after `in` is empty: name at least one value of {shown(self.column)}.")

    @property
    def values(self) -> tuple:
        """The values of the list after `in`, or the one value."""
        return self.value if isinstance(self.value, tuple) else (self.value,)


def _is_scalar(value) -> bool:
    if isinstance(value, str):
        return _is_encodable(value)
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer that is too large for a float
        return False


def _is_encodable(text: str) -> bool:
    """Whether a text has no halves of characters, which stand for undecodable bytes and which no store holds."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def parse_condition(text: str) -> Condition:
    """
    Read a condition such as `year >= 2020`, `Date Taken == 'May 5'` or `place in ["Oslo", "Rome"]`.

    All before the first operator is the column; one with an operator in its name stands in quotes. A value that is not
    a Python literal counts as a string. Raises `ValueError` for a text of another form.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(
            f"A condition has at most {MAX_LENGTH:,} characters, and {shown(text)} has {len(text):,}; in Python a "
            "`Condition` takes a longer list."
        )
    if (match := QUOTED.match(text)) is not None:
        column, operator = re.sub(r"\\(.)", r"\1", match[1][1:-1], flags=re.DOTALL), match[2]
    elif (match := OPERATOR.search(text)) is not None:
        column, operator = text[: match.start()].strip(), match[0]
    value = "" if match is None else text[match.end() :].strip()
    if match is None or not value or not (column or text.lstrip().startswith(("''", '""'))):
        raise ValueError(f"A condition reads like 'year >= 2020' or 'place == Oslo'; got {shown(text)}.")
    return Condition(column, "==" if operator == "=" else operator, *_read_value(value))


def _read_value(text: str) -> tuple:
    """The value that a text means, and the `words` of the condition."""
    try:
        value, tree = ast.literal_eval(text), ast.parse(text, mode="eval").body
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # a bare word, or a thousand brackets
        return (text == "true" if text in ("true", "false") else text), (text,)
    parts = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    is_quoted = [isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts]
    return value, tuple(
        None if quoted else ast.get_source_segment(text, part) for part, quoted in zip(parts, is_quoted, strict=True)
    )


def as_conditions(where: str | Condition | Sequence[str | Condition] | None) -> list[Condition]:
    """One or several conditions, each a [`Condition`] or its text, as a list of [`Condition`]s."""
    if where is None:
        return []
    if isinstance(where, str | Condition):
        where = [where]
    return [condition if isinstance(condition, Condition) else parse_condition(condition) for condition in where]


def as_kind(condition: Condition, kind: Kind) -> Condition:
    """
    The condition with values of the column's kind: `zip == 5` means the text "5" where the column `zip` holds texts.

    Raises `ValueError` for a value of another kind, and for an order of booleans.
    """
    words = condition.words or (None,) * len(condition.values)
    values = [
        word if kind == TEXT and word is not None else value
        for value, word in zip(condition.values, words, strict=True)
    ]
    for value in values:
        if not isinstance(value, kind.types) or (isinstance(value, bool) and kind != BOOLEAN):
            raise ValueError(
                f"The column {shown(condition.column)} holds {kind.plural}, which cannot be compared with "
                f"{shown(value)}: give {kind.example}."
            )
    if kind == BOOLEAN and condition.operator not in UNORDERED:
        raise ValueError(
            f"The column {shown(condition.column)} holds booleans, which have no order: compare by ==, != or in, not "
            f"by {condition.operator}."
        )
    if kind == NUMBER:
        values = [_as_stored(value) for value in values]
    return replace(condition, value=tuple(values) if condition.operator == "in" else values[0], words=())


def _as_stored(value: int | float) -> int | float:
    """A whole number as an integer if it fits into 64 bits, else as a float."""
    if MIN_INTEGER <= value <= MAX_INTEGER and value == int(value):
        return int(value)
    return float(value)


def kind_of_value(value) -> Kind:
    """The kind of a column in which this value stands."""
    return next(kind for kind in (BOOLEAN, NUMBER, TEXT) if isinstance(value, kind.types))


def kind_of_type(dtype: pa.DataType) -> Kind:
    """The kind of a column of this Arrow type."""
    if pa.types.is_boolean(dtype):
        return BOOLEAN
    return NUMBER if pa.types.is_integer(dtype) or pa.types.is_floating(dtype) else TEXT


def matching_rows(table: pa.Table, conditions: Sequence[Condition], counting: np.ndarray | None = None) -> np.ndarray:
    """
    (N,) boolean: which rows of `table` satisfy all conditions.

    Args:
        table: The columns that conditions may name.
        conditions: The conditions.
        counting: (N,) boolean; a column without a value in any of these rows counts as missing. By default all rows.

    Raises `ValueError` for a missing column and for values of another kind than the column's.
    """
    mask = np.ones(len(table), dtype=bool)
    for condition in conditions:
        if condition.column not in table.column_names or not _has_value(table[condition.column], counting):
            there = [name for name in table.column_names if _has_value(table[name], counting)]
            raise missing_column(condition.column, there)
        column = table[condition.column]
        found = _compare(column, as_kind(condition, kind_of_type(column.type)))
        mask &= pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    return mask


def _has_value(column: pa.ChunkedArray, counting: np.ndarray | None) -> bool:
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return bool((present if counting is None else present & counting).any())


def _compare(column: pa.ChunkedArray, condition: Condition):
    if pa.types.is_integer(column.type):
        return _compare_integers(column, condition)
    values = pa.array(condition.values, column.type)
    if condition.operator == "in":
        return pc.and_(pc.is_in(column, value_set=values), column.is_valid())
    return COMPARISONS[condition.operator](column, values[0])


def _compare_integers(column: pa.ChunkedArray, condition: Condition):
    """As Arrow, which however rounds integers to floats before it compares them with one."""
    operator, bound = condition.operator, condition.values[0]
    if operator in UNORDERED:  # only whole numbers can be equal
        whole = pa.array([value for value in condition.values if isinstance(value, int)], pa.int64())
        found = pc.is_in(column.cast(pa.int64()), value_set=whole)
        return pc.and_(pc.invert(found) if operator == "!=" else found, column.is_valid())
    if isinstance(bound, float):
        bound = math.floor(bound) if operator in (">", "<=") else math.ceil(bound)
        if not MIN_INTEGER <= bound <= MAX_INTEGER:  # all integers lie on one side
            holds = (bound > 0) == (operator in ("<", "<="))
            return pc.and_(pa.scalar(holds), column.is_valid())
    return COMPARISONS[operator](column.cast(pa.int64()), pa.scalar(bound, pa.int64()))


def bind(
    where: Sequence[Condition], kind_of: Callable[[str], Kind | None], columns: Callable[[], Sequence[str]]
) -> list[Condition]:
    """
    The conditions with values of their columns' kinds, for a store that looks columns up.

    Args:
        where: The conditions.
        kind_of: What a column holds; `None` where no entry has it.
        columns: Gives the columns that there are, for the message.

    Raises `ValueError` for a missing column and for a value of another kind.
    """
    bound = []
    for condition in where:
        kind = kind_of(condition.column)
        if kind is None:
            raise missing_column(condition.column, columns())
        bound.append(as_kind(condition, kind))
    return bound


def missing_column(column: str, available: Sequence[str]) -> ValueError:
    """The error for a condition on a column that no entry has."""
    there = and_more(available, MAX_COLUMNS) or "none"
    return ValueError(f"There is no metadata {shown(column)} to filter by; there is {there}.")


def check_kinds(
    rows: pa.Table,
    names: Sequence[str],
    known: dict[str, Kind],
    kinds_of: Callable[[Sequence[str]], Mapping[str, Kind]],
) -> None:
    """
    Raise `ValueError` if a column of new entries holds another kind of values than in the index.

    Args:
        rows: The new entries.
        names: The columns to compare; one without a value has no kind.
        known: The kinds that earlier calls have found, to which this one adds its own: looking for a column that no
            entry has may read the whole index.
        kinds_of: What columns of the index hold, without those that no entry has.
    """
    new = {name: kind_of_type(rows[name].type) for name in names if rows[name].null_count < len(rows)}
    if unknown := [name for name in new if name not in known]:
        known.update({name: new[name] for name in unknown} | dict(kinds_of(unknown)))
    for name, kind in new.items():
        if known[name] != kind:
            raise mixed_kinds(name, known[name], kind)


def mixed_kinds(column: str, present: Kind, new: Kind) -> ValueError:
    """The error for new entries whose column holds another kind of values than the same column of the index."""
    return ValueError(
        f"The metadata {shown(column)} holds {present.plural} in this index and {new.plural} in the new entries: "
        "rename one of them, or keep an index for each."
    )


def postgres_expression(conditions: Sequence[Condition], fields: Sequence[str]) -> tuple[str, list]:
    """
    The conditions, whose values are of their columns' kinds, as a WHERE clause of PostgreSQL with its values.

    Names of columns and all values are parameters of the statement, so that none can end a string.

    Args:
        conditions: What `as_kind` returned.
        fields: The columns of texts of the table; all others are keys of its column `metadata`, which is jsonb.

    Returns the clause with %s for each value, empty without conditions, and the values.
    """
    parts, values = [], []
    for condition in conditions:
        part, bound = _postgres_comparison(condition, fields)
        parts.append(part)
        values.extend(bound)
    return f"WHERE {' AND '.join(parts)}" if parts else "", values


def _postgres_comparison(condition: Condition, fields: Sequence[str]) -> tuple[str, list]:
    bound = [without_nul(value) if isinstance(value, str) else value for value in condition.values]
    if condition.column in fields:
        column, values = condition.column, []
    else:
        column, values = "(metadata ->> %s)", [without_nul(condition.column)]
    operator = "=" if condition.operator == "==" else condition.operator
    if isinstance(bound[0], str):  # ordered by their bytes, as Arrow orders texts, whatever the database's language
        column += ' COLLATE "C"'
        return (
            (f"{column} = ANY(%s)", [*values, bound])
            if operator == "in"
            else (f"{column} {operator} %s", [*values, bound[0]])
        )
    column = column.replace("->>", "->")  # jsonb compares numbers exactly, integers with floats too
    if operator == "in":
        return f"{column} = ANY(%s::jsonb[])", [*values, [json.dumps(value) for value in bound]]
    return f"{column} {operator} %s::jsonb", [*values, json.dumps(bound[0])]


def without_nul(text: str) -> str:
    """The text as PostgreSQL holds it: with the sign for an unknown character in place of NUL."""
    return text.replace("\0", "\ufffd")


def milvus_expression(conditions: Sequence[Condition], fields: Sequence[str] = ()) -> str:
    """
    The conditions, whose values are of their columns' kinds, as a Milvus filter.

    Names of columns and values are quoted, so that none can end its string or be taken for a word of Milvus.

    Args:
        conditions: What `as_kind` returned.
        fields: The columns that are fields of the collection; all others are keys of its dynamic field.
    """
    return " and ".join(_milvus_comparison(condition, fields) for condition in conditions)


def milvus_column(column: str, fields: Sequence[str] = ()) -> str:
    """A column as a Milvus filter names it."""
    return column if column in fields else f"$meta[{_milvus_literal(column)}]"


def _milvus_comparison(condition: Condition, fields: Sequence[str]) -> str:
    column = milvus_column(condition.column, fields)
    values = [_milvus_literal(value) for value in condition.values]
    if condition.operator == "!=" and condition.column not in fields:
        # A server of Milvus takes an entry without the key for different from everything, and version 2.3 does not
        # parse `exists` beside another comparison.
        if isinstance(condition.value, bool):
            return f"{column} == {_milvus_literal(not condition.value)}"
        return f"({column} < {values[0]} or {column} > {values[0]})"
    if condition.operator != "in":
        return f"{column} {condition.operator} {values[0]}"
    if condition.column in fields:
        return f"{column} in [{', '.join(values)}]"
    return _any_of([f"{column} == {value}" for value in values])  # Milvus Lite knows no `in` for keys


def _any_of(comparisons: list[str]) -> str:
    """The comparisons joined by `or` in halves of halves, because Milvus Lite descends into each bracket."""
    if len(comparisons) == 1:
        return comparisons[0]
    half = len(comparisons) // 2
    return f"({_any_of(comparisons[:half])} or {_any_of(comparisons[half:])})"


def _milvus_literal(value: str | int | float | bool) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r") + '"'
