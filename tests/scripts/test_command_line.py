"""One YAML file of options, and a command line that wins over it."""

from dataclasses import dataclass

import pytest

from modeling_cots.scripts.command_line import parse_config_and_options


@dataclass
class Options:
    dataset: str
    steps: int = 3
    rate: float = 1e-3
    flip: bool = False
    split: str | None = "validation"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("dataset: scenes\nsteps: 7\nrate: 5e-5  # YAML reads this as a string\nflip: true\n")
    return str(path)


def parse(*argv: str) -> Options:
    return parse_config_and_options(Options, argv=list(argv))[0]


def test_file_alone(config):
    assert parse(config) == Options("scenes", steps=7, rate=5e-5, flip=True)


def test_command_line_wins_over_the_file(config):
    assert parse(config, "--steps", "9", "--dataset", "other", "--flip", "false") == Options("other", 9, 5e-5, False)


def test_command_line_alone():
    assert parse("--dataset", "photos") == Options("photos")


def test_a_required_option_may_stand_in_neither(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("steps: 1\n")
    with pytest.raises(SystemExit):
        parse(str(tmp_path / "empty.yaml"))
    assert "--dataset" in capsys.readouterr().err


def test_refuses_unknown_options_and_missing_files(tmp_path):
    (tmp_path / "bad.yaml").write_text("dataset: scenes\nstepz: 1\n")
    with pytest.raises(ValueError, match="do not exist: stepz"):
        parse(str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match="no configuration file"):
        parse(str(tmp_path / "absent.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="option: value"):
        parse(str(tmp_path / "list.yaml"))
