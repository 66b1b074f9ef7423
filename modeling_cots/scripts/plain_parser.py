"""`PlainParser`: the options of a script that has few of them."""

import argparse
import inspect
from typing import NoReturn


class PlainParser(argparse.ArgumentParser):
    """
    A parser that refuses in one line, shows a description as it is written, and takes no abbreviations of options.

    Args:
        description: What `--help` says before the options, such as a module's docstring.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=inspect.cleandoc(description or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removesuffix('.')}. (--help lists all options.)\n")
