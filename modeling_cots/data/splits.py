"""`MissingSplitError`: a split that a data set does not have, with those that it has."""

from collections.abc import Iterable


class MissingSplitError(ValueError):
    """
    A data set has no such split.

    Args:
        message: One sentence.
        available: The splits that it has.
        can_be_cut: Whether a part of a split can be named, as in "train[:500]".
    """

    def __init__(self, message: str, available: Iterable[str], *, can_be_cut: bool = True):
        super().__init__(message)
        self.available, self.can_be_cut = sorted(available), can_be_cut

    @classmethod
    def of(cls, dataset: str, split: str, available: Iterable[str]) -> "MissingSplitError":
        """The error for files, of which some belong to other splits."""
        names = ", ".join(sorted(available)) or "none"
        return cls(
            f"{dataset!r} has no split {split!r}; it has {names}. (A glob reads all files that it matches, whatever "
            "they are called.)",
            available,
        )
