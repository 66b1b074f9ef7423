"""Filters on the metadata of a search index, such as `year >= 2020`: read from text, applied to Arrow or Milvus.

A condition never holds for an entry that lacks the value, whatever the operator; this is so in both vector stores.
"""

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COMPARISONS = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
OPERATORS = (*COMPARISONS, "in")
PATTERN = re.compile(r"\s*([^\W\d]\w*)\s*(==|!=|<=|>=|<|>|\bin\b|=)\s*(.+?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """
    A comparison of a column with a value; several conditions must all hold.

    Args:
        column: The name of a column of metadata, or `name` or `source`.
        operator: One of ==, !=, <, <=, >, >=, in.
        value: A string, number or boolean; for `in` a list of these.

    Raises `ValueError` for another operator or value.
    """

    column: str
    operator: str
    value: str | int | float | bool | tuple

    def __post_init__(self):
        if self.operator not in OPERATORS:
            raise ValueError(f"A condition compares with one of {', '.join(OPERATORS)}; got {self.operator!r}.")
        if re.fullmatch(r"[^\W\d]\w*", self.column) is None:
            raise ValueError(f"{self.column!r} is not the name of a column.")
        values = self.value if self.operator == "in" else (self.value,)
        if isinstance(values, list):
            values = tuple(values)
            object.__setattr__(self, "value", values)
        if not isinstance(values, tuple) or not all(_is_scalar(value) for value in values):
            raise ValueError(
                f"{self.column!r} can be compared with a string, a finite number or a boolean, and with a list of "
                f"these by `in`; got {self.operator} {self.value!r}."
            )


def _is_scalar(value) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def parse_condition(text: str) -> Condition:
    """
    Read a condition such as `year >= 2020`, `place == Oslo` or `place in ["Oslo", "Rome"]`.

    A value that is not a Python literal counts as a string. Raises `ValueError` for a text of another form.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"A condition reads like 'year >= 2020' or 'place == Oslo'; got {text!r}.")
    column, operator, value = match.groups()
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a bare word
        if value in ("true", "false"):
            value = value == "true"
    return Condition(column, "==" if operator == "=" else operator, value)


def as_conditions(where: str | Condition | Sequence[str | Condition] | None) -> list[Condition]:
    """One or several conditions, each a [`Condition`] or its text, as a list of [`Condition`]s."""
    if where is None:
        return []
    if isinstance(where, str | Condition):
        where = [where]
    return [condition if isinstance(condition, Condition) else parse_condition(condition) for condition in where]


def matching_rows(table: pa.Table, conditions: Sequence[Condition]) -> np.ndarray:
    """
    (N,) boolean: which rows of `table` satisfy all conditions.

    Raises `ValueError` for a missing column and for values that cannot be compared with the column's type.
    """
    mask = np.ones(len(table), dtype=bool)
    for condition in conditions:
        if condition.column not in table.column_names:
            raise missing_column(condition.column, table.column_names)
        column = table[condition.column]
        try:
            if condition.operator == "in":
                found = pc.is_in(column, value_set=pa.array(list(condition.value), column.type))
            else:
                found = COMPARISONS[condition.operator](column, pa.scalar(condition.value))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(
                f"The column {condition.column!r} holds {column.type}, which cannot be compared with "
                f"{condition.value!r}."
            ) from error
        mask &= pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    return mask


def missing_column(column: str, available: Sequence[str]) -> ValueError:
    """The error for a condition on a column that no entry has."""
    return ValueError(f"There is no metadata {column!r} to filter by; there is {', '.join(available) or 'none'}.")


def milvus_expression(conditions: Sequence[Condition]) -> str:
    """The conditions as a Milvus filter. Values are quoted as JSON, so that no value can end its string."""
    return " and ".join(
        f"{condition.column} {condition.operator} "
        f"{json.dumps(list(condition.value) if condition.operator == 'in' else condition.value, ensure_ascii=False)}"
        for condition in conditions
    )
