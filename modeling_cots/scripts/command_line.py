"""`SCRIPT.py [CONFIG.yaml] [--option value ...]`: one YAML file of options, which the command line overrides.

A value in the file is read as the same word on the command line would be, whatever YAML takes it for: `no` is a word
where an option takes words, and false where it takes true or false. Only a written `null` is no value.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from ..data.messages import shorten

_KINDS = {int: "a whole number", float: "a number", str: "text"}
MAX_SHOWN = 80  # characters of a value
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null timestamp seq map value".split()}


@dataclasses.dataclass
class GivenOptions:
    """
    What the user has set, and where.

    Attributes:
        names: Options of the command line and of the file.
        path: The file, if there is one.
        lines: The line in it of each option that the command line does not override.
        chosen: The defaults of `choose_defaults` that the user has not set.
    """

    names: set[str]
    path: Path | None
    lines: dict[str, int]
    chosen: dict

    @contextmanager
    def locating_errors(self) -> Iterator[None]:
        """Put file and line before the message of a `ValueError` that begins with the name of an option."""
        try:
            yield
        except ValueError as error:
            name = re.match(r"\w*", str(error))[0]
            if name not in self.lines:
                raise
            raise ValueError(f"{self.path}, line {self.lines[name]}: {error}") from error


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every option with its default, after a description that keeps its lines."""


class _Parser(HfArgumentParser):
    """A parser that refuses in one line: a list of more than a hundred options would hide it."""

    def __init__(self, dataclass_types: tuple[type, ...], description: str | None):
        super().__init__(
            dataclass_types,
            usage="%(prog)s [CONFIG.yaml] [--option value ...]",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> typing.NoReturn:
        kinds = {kind.__name__: text for kind, text in _KINDS.items()}
        found = re.fullmatch(r"argument (--\w+).*: invalid (int|float) value: (.*)", message)
        if found is not None:
            message = f"{found[1]} must be {kinds[found[2]]}, got {found[3]}"
        print(f"{self.prog}: {message}. (--help lists all options.)", file=sys.stderr)
        raise SystemExit(2)

    def names_in(self, argv: list[str]) -> set[str]:
        """Names of the options that stand on a command line, whatever they are spelled as (--no_X, --a-b)."""
        words = {word.partition("=")[0] for word in argv}
        return {self._option_string_actions[word].dest for word in words & set(self._option_string_actions)}


def parse_config_and_options(*dataclass_types: type, **options) -> tuple:
    """As `parse_and_trace`, without what was set."""
    return parse_and_trace(*dataclass_types, **options)[0]


def parse_and_trace(
    *dataclass_types: type,
    argv: list[str] | None = None,
    defaults: dict | None = None,
    choose_defaults: Callable[[argparse.Namespace], dict] | None = None,
    description: str | None = None,
) -> tuple[tuple, GivenOptions]:
    """
    Parse `argv` (default: the command line) into one instance of every dataclass; also returns what the user has set.

    The first argument may be a YAML file of options. Options on the command line override the file, and both override
    `defaults`, which replace those of the dataclasses. `choose_defaults` gives further ones by what is set so
    far, and these override `defaults`. `description` is what `--help` says before the options, in its own lines.

    Raises `ValueError` for a missing or broken file, for an unknown option, for one that stands in the file twice, and
    for a value of another type or out of range, with its line in the file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds = {name: kind for dataclass_type in dataclass_types for name, kind in _kinds_of(dataclass_type).items()}
    parser = _Parser(dataclass_types, description)
    parser.set_defaults(**(defaults or {}))
    path, options = None, {}
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        options = _read_options(path)
        if unknown := sorted(set(options) - set(kinds)):
            names = shorten(", ".join(unknown), MAX_SHOWN)
            raise ValueError(f"{path} has options that do not exist: {names}{_nearest(unknown[0], kinds)}.")
        actions = {option: action for action in parser._actions for option in action.option_strings}
        for name, node in options.items():
            try:
                parser.set_defaults(**{name: _convert(actions[f"--{name}"], kinds[name], node)})
            except ValueError as error:
                raise ValueError(f"{path}, line {node.start_mark.line + 1}: {name} {error}.") from None
    for action in parser._actions:  # an option that the file gives is not required on the command line
        action.required = action.required and parser.get_default(action.dest) in (None, dataclasses.MISSING)
    named = parser.names_in(argv)
    lines = {name: node.start_mark.line + 1 for name, node in options.items() if name not in named}
    given = GivenOptions(named | set(options), path, lines, {})
    if choose_defaults is not None:
        chosen = choose_defaults(parser.parse_known_args(argv)[0])
        given.chosen = {name: value for name, value in chosen.items() if name not in given.names}
        parser.set_defaults(**given.chosen)
    with given.locating_errors():
        *filled, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        _refuse_unknown(rest, kinds)
        _refuse_infinite(filled)
    return tuple(filled), given


def _refuse_unknown(words: list[str], names: typing.Collection[str]) -> None:
    if not words:
        return
    word = words[0].partition("=")[0]
    if not word.startswith("-"):
        raise ValueError(f"{shorten(word, MAX_SHOWN)} belongs to no option: options are written --option value.")
    raise ValueError(f"There is no option {shorten(word, MAX_SHOWN)}{_nearest(word.lstrip('-'), names)}.")


def _nearest(name: str, names: typing.Collection[str]) -> str:
    found = difflib.get_close_matches(name.replace("-", "_"), list(names), n=1)
    return f"; did you mean {found[0]}" if found else ""


def _refuse_infinite(filled: list) -> None:
    for each in filled:
        for name, value in vars(each).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}.")


def option_names(argv: list[str]) -> set[str]:
    """Names of the options in `argv` and in its YAML file."""
    words = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    is_file = bool(argv) and not argv[0].startswith("-")
    return words | set(_read_options(Path(argv[0])) if is_file else ())


def _kinds_of(dataclass_type: type) -> dict[str, set]:
    """The types that each field takes, such as `{list, NoneType}`."""
    hints = typing.get_type_hints(dataclass_type)
    kinds = {}
    for field in (field for field in dataclasses.fields(dataclass_type) if field.init):
        hint = hints[field.name]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        parts = typing.get_args(hint) if is_union else (hint,)
        kinds[field.name] = {typing.get_origin(part) or part for part in parts}
        if field.default is None:
            kinds[field.name].add(type(None))
    return kinds


def _read_options(path: Path) -> dict[str, yaml.Node]:
    """What the file says of each option, not yet converted."""
    if not path.is_file():
        raise ValueError(f"There is no configuration file {path}.")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to hold one `option: value` a line.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1},"
        raise ValueError(f"{path}{line} is no YAML: {_first_line(error)}.") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold one `option: value` a line.")
    options: dict[str, yaml.Node] = {}
    for key, node in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in options:
            first = options[name].start_mark.line + 1
            raise ValueError(
                f"{path} gives {shorten(name, MAX_SHOWN)} twice, in lines {first} and {line}: leave one of them out."
            )
        options[name] = node
    return options


def _convert(action: argparse.Action, kinds: set, node: yaml.Node):
    """The value as the parser would take it from the command line; raises `ValueError` with the end of a sentence."""
    if node.tag not in _PLAIN_TAGS:
        raise ValueError(f"has the tag {node.tag}: leave it out")
    if node.tag == "tag:yaml.org,2002:null":
        if type(None) not in kinds or not node.value:
            raise ValueError("has no value: give one, or leave the line out")
        return None
    is_list = action.nargs == "+" or list in kinds
    if isinstance(node, yaml.MappingNode) and dict in kinds:
        try:
            return yaml.SafeLoader("").construct_document(node)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"is no YAML: {_first_line(error)}") from error
    if isinstance(node, yaml.SequenceNode) and is_list and node.value:
        return [_convert_word(action, part) for part in node.value]
    word = _convert_word(action, node)
    return [word] if action.nargs == "+" else word


def _convert_word(action: argparse.Action, node: yaml.Node):
    kind: typing.Any = action.type  # argparse allows names of registered types too, which no dataclass gives
    is_switch = action.choices is None and kind not in _KINDS
    if action.choices is not None:
        wanted = f"must be one of {', '.join(map(str, action.choices))}"
    else:
        wanted = f"must be {_KINDS.get(kind, 'true or false')}"
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{wanted}, got {'a list' if isinstance(node, yaml.SequenceNode) else 'a mapping'}")
    # YAML's two other words for true and false, which the command line does not know.
    word = {"on": "yes", "off": "no"}.get(node.value.lower(), node.value) if is_switch else node.value
    try:
        value = kind(word)
        is_one = action.choices is None or value in action.choices
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        is_one = False
    if not is_one or (isinstance(value, float) and not math.isfinite(value)):
        got = shorten(" ".join(node.value.split()), MAX_SHOWN)
        raise ValueError(f"{wanted}, got {got or 'nothing'}")
    return value


def _first_line(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]
