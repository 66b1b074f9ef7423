"""`SCRIPT.py [CONFIG.yaml] [--option value ...]`: one YAML file of options, which the command line overrides."""

import dataclasses
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_config_and_options(*dataclass_types: type, argv: list[str] | None = None, defaults: dict | None = None):
    """
    Parse `argv` (default: the command line) into one instance of every dataclass.

    The first argument may be a YAML file of options. Options on the command line override the file, and both override
    `defaults`, which replace those of the dataclasses. Raises `ValueError` for a missing file, and for an unknown
    option in the file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types)
    parser.set_defaults(**(defaults or {}))
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read_options(Path(argv.pop(0)), dataclass_types))
    for action in parser._actions:  # an option that the file gives is not required on the command line
        action.required = action.required and parser.get_default(action.dest) in (None, dataclasses.MISSING)
    return parser.parse_args_into_dataclasses(argv)


def option_names(argv: list[str]) -> set[str]:
    """Names of the options in `argv` and in its YAML file."""
    words = {word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")}
    is_file = bool(argv) and not argv[0].startswith("-")
    return words | set(_load_yaml(Path(argv[0])) if is_file else ())


def _load_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"There is no configuration file {path}.")
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold one `option: value` a line.")
    return options


def _read_options(path: Path, dataclass_types: tuple[type, ...]) -> dict:
    options = _load_yaml(path)
    known = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path} has options that do not exist: {', '.join(unknown)}.")
    return options
