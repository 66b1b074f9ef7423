import pytest

from modeling_cots.scripts.plain_parser import PlainParser


def parser() -> PlainParser:
    made = PlainParser(
        """Draw something.

        python draw.py IMAGE
    """
    )
    made.add_argument("image")
    made.add_argument("--number", type=int)
    return made


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        ([], "image"),
        (["a.jpg", "--number", "many"], "'many'"),
        (["a.jpg", "--num", "3"], "--num 3"),
        (["a.jpg", "--color"], "--color"),
    ],
)
def test_what_is_refused_is_said_in_one_line(argv, what, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(argv)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert what in message and "--help" in message and message.count("\n") == 1


def test_the_end_of_a_sentence_stands_once(capsys):
    with pytest.raises(SystemExit):
        parser().error("Give an image.")
    assert "image. (" in capsys.readouterr().err


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert "Draw something.\n\npython draw.py IMAGE\n" in capsys.readouterr().out
