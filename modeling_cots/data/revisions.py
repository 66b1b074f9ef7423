"""Which version of a Hub repository is meant: refuses revisions and configurations that would be ignored."""

from .sources import check_path, is_here, use_cache_if_unreachable


def check_revision(option: str, name: str | None, revision: str | None, *, is_needed: bool = True) -> None:
    """
    Raise `ValueError` for a path that is not there, and for a revision of an option that takes nothing from the Hub.

    A hub that is needed is tried once: see `use_cache_if_unreachable`.

    Args:
        option: Such as "model" or "tokenizer".
        name: Its value: a Hub id, a folder or a built-in name; `None` where it is not given.
        revision: A branch, a tag or a commit, if any is given.
        is_needed: Whether it will be loaded in any case; what is not, is looked up when it is loaded.
    """
    if name is not None:
        if is_needed or revision is not None:
            check_path(option, name)
        if is_needed and not is_here(name):
            use_cache_if_unreachable(f"{option}={name}")
    if revision is None:
        return
    if name is None:
        raise ValueError(f"The revision {revision!r} of {option} belongs to a Hub id: give {option}, too.")
    if is_here(name):
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
