"""The program `cots-export`: a Hub repository of a model, or of a part of it, as hub_repository.py makes it."""

from . import hub_repository
from .error_boundary import run_script


def main() -> None:
    """Run the export that `sys.argv` describes."""
    run_script(hub_repository.main)


if __name__ == "__main__":
    main()
