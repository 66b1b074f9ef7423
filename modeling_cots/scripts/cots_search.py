"""The program `cots-search`: the commands of `search/cli.py`, whose errors end in one sentence."""

from ..search import cli
from .error_boundary import run_script


def main() -> None:
    """Run the command that `sys.argv` names."""
    run_script(cli.main, go_on="To go on: {command}")


if __name__ == "__main__":
    main()
