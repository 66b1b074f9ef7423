"""`cots-search` as a module of the package, for `torchrun -m`: the commands of `search/cli.py`."""

import sys

from ..search import cli
from ..search.options import go_on
from .error_boundary import run_script


def main() -> None:
    """Run the command that `sys.argv` names."""
    run_script(cli.main, go_on=go_on(sys.argv))


if __name__ == "__main__":
    main()
