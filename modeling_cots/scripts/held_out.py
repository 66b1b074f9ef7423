"""The images to measure on, where the data set has no split for them: a share of those to train on, held out.

They are drawn once for all, so that a resumed run and a second run hold out the same ones.
"""

import os

from torch.utils.data import Dataset
from transformers.utils import logging

from ..data.karpathy import is_karpathy
from ..data.pairs import PairDataset
from ..data.splits import MissingSplitError
from .steps import DataArguments, open_split

logger = logging.get_logger(__name__)

EVAL_SPLIT = DataArguments.__dataclass_fields__["eval_split"].default
SHARE, MOST = 0.1, 1_000  # of the images


def hold_out_if_missing(
    options: DataArguments, train_dataset: Dataset | None, *, image_size: int, seed: int
) -> tuple[Dataset | None, Dataset | None]:
    """
    What to train on and what to measure on, of one data set of which the training split is open.

    Where `eval_split` is the default and the data set has no such split, or is one file, which is every split, images
    are held out of `train_dataset`. Raises `ValueError` for another split that is not there.
    """
    whole = train_dataset if options.eval_split == EVAL_SPLIT and isinstance(train_dataset, PairDataset) else None
    if whole is None or not is_every_split(options.dataset):
        try:
            return train_dataset, open_split(options, options.eval_split, image_size=image_size, seed=seed)
        except ValueError as error:
            if whole is None or not isinstance(error.__cause__, MissingSplitError):
                raise
    rest, held_out = whole.hold_out(SHARE, MOST)
    rest.name = held_out.name = whole.name
    logger.warning(
        f"{options.dataset} has no split {EVAL_SPLIT!r}: {len(held_out):,} of its {len(whole):,} images are "
        "held out of training, to be measured. (--eval_split none trains on all of them.)"
    )
    return rest, held_out


def is_every_split(dataset: str) -> bool:
    """Whether a data set is read whole whatever split is asked for: a file of rows, or a pattern of files."""
    return not is_karpathy(dataset) and (os.path.isfile(dataset) or any(sign in dataset for sign in "*?[{"))
