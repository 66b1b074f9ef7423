"""`SCRIPT.py [CONFIG.yaml] [--option value ...]`: one YAML file of options, which the command line overrides."""

import dataclasses
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_config_and_options(*dataclass_types: type, argv: list[str] | None = None) -> tuple:
    """
    Parse `argv` (default: the command line) into one instance of every dataclass.

    The first argument may be a YAML file of options; options on the command line win over it. Raises `ValueError` for
    a file that is not there and for an option in it that does not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(dataclass_types)
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read_options(Path(argv.pop(0)), dataclass_types))
    # An option that the file gives is no longer required on the command line.
    for action in parser._actions:
        action.required = action.required and action.default in (None, dataclasses.MISSING)
    return parser.parse_args_into_dataclasses(argv)


def _read_options(path: Path, dataclass_types: tuple[type, ...]) -> dict:
    if not path.is_file():
        raise ValueError(f"There is no configuration file {path}.")
    options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold one `option: value` a line.")
    known = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{path} has options that do not exist: {', '.join(unknown)}.")
    return options


def find_beside(path: str, config_dir: Path) -> Path:
    """A file named in a configuration: as given, or in `config_dir`. Raises `ValueError` where it is in neither."""
    for candidate in (Path(path), config_dir / path):
        if candidate.is_file():
            return candidate
    raise ValueError(f"There is no file {path}, neither here nor in {config_dir}.")


__all__ = ["find_beside", "parse_config_and_options"]
