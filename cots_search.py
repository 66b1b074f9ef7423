"""The program `cots-search`: reads its options before the package is imported, which takes seconds.

    cots-search --help
    python -m cots_search query IDX "a dog in the snow"

It stands beside the package because importing anything inside a package imports the package.
"""

import importlib.util
import os
import sys
from types import ModuleType


def load(name: str) -> ModuleType:
    """A file of the package that needs nothing of it, by its path below the package's folder."""
    package = importlib.util.find_spec("modeling_cots")  # finds it, and imports nothing
    path = os.path.join(next(iter(package.submodule_search_locations)), name)
    spec = importlib.util.spec_from_file_location(f"cots_search_{os.path.basename(name)[:-3]}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


options = load("search/options.py")


def run() -> None:
    """Run the command that `sys.argv` names."""
    args = options.build_parser().parse_args()
    options.refuse_early(args)
    from modeling_cots.search import cli

    cli.run(args)


def main() -> None:
    """Run the command that `sys.argv` names; what ends it too early is one sentence."""
    load("scripts/error_boundary.py").run_script(run, go_on=options.go_on(sys.argv))


if __name__ == "__main__":
    main()
