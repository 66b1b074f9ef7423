"""One YAML file of options, and a command line that wins over it."""

from dataclasses import dataclass, field

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modeling_cots import COTSTrainingArguments
from modeling_cots.scripts.command_line import parse_and_trace, parse_config_and_options


@dataclass
class Options:
    dataset: str
    steps: int = 3
    rate: float = 1e-3
    flip: bool = False
    split: str | None = "validation"
    labels: list[str] | None = None
    settings: dict | str | None = field(default=None)
    kind: str = field(default="no", metadata={"choices": ["no", "on", "1"]})


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
    with pytest.raises(ValueError, match="do not exist: stepz; did you mean steps"):
        parse(str(tmp_path / "bad.yaml"))
    with pytest.raises(ValueError, match="no configuration file"):
        parse(str(tmp_path / "absent.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="option: value"):
        parse(str(tmp_path / "list.yaml"))


def write(folder, text: str | bytes) -> str:
    path = folder / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("split: no", {"split": "no"}),
        ("split: null", {"split": None}),
        ("split: ~", {"split": None}),
        ("split: 'null'", {"split": "null"}),
        ("split: 2020-01-01", {"split": "2020-01-01"}),
        ("split: 007", {"split": "007"}),
        ("kind: no", {"kind": "no"}),
        ("kind: on", {"kind": "on"}),
        ("kind: 1", {"kind": "1"}),
        ("flip: no", {"flip": False}),
        ("flip: On", {"flip": True}),
        ("rate: 1", {"rate": 1.0}),
        ("steps: 12_800", {"steps": 12_800}),
        ("steps: '4'", {"steps": 4}),
        ("labels: a red circle", {"labels": ["a red circle"]}),
        ("labels: [yes, 1.0]", {"labels": ["yes", "1.0"]}),
        ("settings: {even: no, many: 3}", {"settings": {"even": False, "many": 3}}),
        ("settings: file.json", {"settings": "file.json"}),
        ("# nothing", {}),
    ],
)
def test_a_value_is_the_word_that_stands_there(tmp_path, line, expected):
    assert parse(write(tmp_path, line), "--dataset", "scenes") == Options("scenes", **expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 12.5", "line 1: steps must be a whole number, got 12.5"),
        ("steps: true", "line 1: steps must be a whole number, got true"),
        ("steps: 1e3", "steps must be a whole number, got 1e3"),
        ("steps:", "steps has no value: give one, or leave the line out"),
        ("split:", "split has no value: give one, or leave the line out"),
        ("steps: ''", "steps must be a whole number, got nothing"),
        ("flip: null", "flip has no value"),
        ("flip: 2", "flip must be true or false, got 2"),
        ("dataset: null", "dataset has no value"),
        ("dataset: [a]", "dataset must be text, got a list"),
        ("dataset: {a: b}", "dataset must be text, got a mapping"),
        ("dataset: scenes\nrate: [1, a]", "line 2: rate must be a number, got a list"),
        ("rate: {}", "rate must be a number, got a mapping"),
        ("rate: .inf", "rate must be a number, got .inf"),
        ("rate: .nan", "rate must be a number, got .nan"),
        ("rate: -inf", "rate must be a number, got -inf"),
        ("rate: nan", "rate must be a number, got nan"),
        ("rate: 1e999", "rate must be a number, got 1e999"),
        ("rate: fast", "rate must be a number, got fast"),
        ("kind: off", "kind must be one of no, on, 1, got off"),
        ("labels: []", "labels must be text, got a list"),
        ("labels: [a, [b]]", "labels must be text, got a list"),
        ("labels: &a [*a]", "labels must be text, got a list"),
        ("settings: !!python/object/apply:os.getcwd []", "settings has the tag tag:yaml.org,2002:python/object/apply"),
        ("settings: {a: !!python/name:os.getcwd x}", "settings is no YAML: could not determine a constructor"),
        ("settings: {a: !!int x}", "settings is no YAML: invalid literal"),
        ("rate: !fast 1", "rate has the tag !fast: leave it out"),
        ("steps: 1\nrate: 1\nsteps: 2", "gives steps twice, in lines 1 and 3"),
        ("steps: 1\n  rate: 1", "line 2, is no YAML: mapping values are not allowed here"),
        ("steps: [1", "is no YAML: expected ',' or ']'"),
        ("steps: 1\n---\nsteps: 2", "line 2, is no YAML: but found another document"),
        ("steps: *missing", "is no YAML: found undefined alias"),
        ("rate: \x00", "is no YAML: "),
        ("[" * 100_000, "nested too deeply"),
        ("- 1", "option: value"),
        ("steps", "option: value"),
        ("<<: {steps: 1}", "do not exist: <<"),
        ("? [steps]\n: 1", "do not exist"),
        (b"dataset: \xff", "is no text in UTF-8: invalid start byte at byte 9"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_file_is_refused_in_one_sentence_that_names_it(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as refused:
        parse(path)
    said = str(refused.value)
    assert said.startswith(path) and message in said and said.endswith(".") and "\n" not in said and len(said) < 400


@dataclass
class Ranged(Options):
    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.rate == 2:
            raise ValueError("Two rates are too many.")


def test_a_value_out_of_range_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, "dataset: scenes\nsteps: 0")
    with pytest.raises(ValueError) as refused:
        parse_config_and_options(Ranged, argv=[path])
    assert str(refused.value) == f"{path}, line 2: steps must be at least 1, got 0."
    assert parse_config_and_options(Ranged, argv=[path, "--steps", "2"])[0].steps == 2
    for words, said in ((["--steps", "-1"], "steps must"), (["--steps=3", "--rate", "2"], "Two rates")):
        with pytest.raises(ValueError, match=f"^{said}"):
            parse_config_and_options(Ranged, argv=[path, *words])


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999"])
def test_numbers_on_the_command_line_are_finite(word):
    with pytest.raises(ValueError, match="rate must be a finite number, got"):
        parse("--dataset", "scenes", f"--rate={word}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "12.5"], "--steps must be a whole number, got '12.5'"),
        (["--rate", "fast"], "--rate must be a number, got 'fast'"),
        (["--kind", "off"], "invalid choice: 'off'"),
        (["--flip", "maybe"], "Truthy value expected: got maybe"),
        (["--steps"], "expected one argument"),
    ],
)
def test_a_broken_command_line_is_refused_in_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        parse("--dataset", "scenes", *words)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and said in printed and printed.count("\n") == 1 and "--help" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stepz", "4"], "There is no option --stepz; did you mean steps."),
        (["--step", "4"], "There is no option --step; did you mean steps."),
        (["--qqq=4"], "There is no option --qqq."),
        (["more", "words"], "more belongs to no option: options are written --option value."),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(words, said):
    with pytest.raises(ValueError) as refused:
        parse("--dataset", "scenes", *words)
    assert str(refused.value) == said


def test_what_was_set_is_known_however_it_is_spelled(tmp_path):
    @dataclass
    class More(Options):
        with_masks: bool = True
        num_steps: int = 1

    path = write(tmp_path, "dataset: scenes\nrate: 1\nsteps: 2")
    words = ["--no_with_masks", "--num-steps", "4", "--steps=3", "--split", "with_masks"]
    chosen = {"steps": 9, "num_steps": 9, "kind": "on"}
    (found,), given = parse_and_trace(More, argv=[path, *words], choose_defaults=lambda options: chosen)
    assert given.names == {"dataset", "rate", "steps", "with_masks", "num_steps", "split"}
    assert given.lines == {"dataset": 1, "rate": 2} and given.chosen == {"kind": "on"}
    assert (found.steps, found.num_steps, found.kind, found.with_masks) == (3, 4, "on", False)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["dataset", "steps", "rate", "flip", "split", "labels", "settings", "kind"])


@given(options=st.dictionaries(NAMES, YAML_VALUES, max_size=4))
def test_whatever_stands_there_is_taken_with_its_type_or_refused(tmp_path_factory, options):
    path = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(options))
    try:
        found = parse(path, *(() if "dataset" in options else ("--dataset", "scenes")))
    except ValueError as error:
        assert str(error).startswith(path)
        return
    assert type(found.steps) is int and type(found.rate) is float and type(found.flip) is bool
    assert type(found.dataset) is type(found.kind) is str and abs(found.rate) < float("inf")


def test_the_arguments_of_training_keep_their_words(tmp_path):
    """Those whose values are words that YAML takes for true and false, and those that take lists and mappings."""
    text = "save_strategy: no\neval_strategy: no\nreport_to: [none]\noutput_dir: run\nuse_cpu: yes\n"
    path = write(tmp_path, text + "accelerator_config: {use_seedable_sampler: off}\nresume_from_checkpoint: latest\n")
    (args,) = parse_config_and_options(COTSTrainingArguments, argv=[path])
    assert args.save_strategy == args.eval_strategy == "no" and args.report_to == [] and args.use_cpu
    assert args.accelerator_config.use_seedable_sampler is False
