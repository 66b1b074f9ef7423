"""Which version of a Hub repository is meant: refuses revisions and configurations that would be ignored."""

import os

# Names that some options take beside Hub ids; what they name has no versions.
BUILT_IN = ("scenes", "random", "none")


def check_revision(option: str, name: str | None, revision: str | None) -> None:
    """
    Raise `ValueError` for a revision of an option by which nothing of the Hub is opened.

    Args:
        option: Such as "model" or "tokenizer".
        name: Its value: a Hub id, a folder or a built-in name; `None` where it is not given.
        revision: A branch, a tag or a commit, if any is given.
    """
    if revision is None:
        return
    if name is None:
        raise ValueError(f"The revision {revision!r} of {option} belongs to a Hub id: give {option}, too.")
    if name in BUILT_IN or os.path.exists(os.path.expanduser(name)):
        raise ValueError(
            f"{option}={name} is no Hub id and has no revision {revision!r}: leave the revision out, or give a Hub id."
        )


def refuse_version(dataset: str, dataset_config: str | None = None, revision: str | None = None) -> None:
    """Raise `ValueError` if a configuration or a revision is given for a data set that has none."""
    given = {"dataset_config": dataset_config, "dataset_revision": revision}
    for option, value in given.items():
        if value is not None:
            raise ValueError(
                f"{option}={value} belongs to a Hub id{' or a folder with a card' if dataset_config else ''}, and "
                f"{dataset!r} is none: leave it out."
            )
