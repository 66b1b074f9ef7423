"""Where the features of frozen encoders come from: made or found in `feature_cache`, or columns of the data."""

from dataclasses import replace

from torch.utils.data import IterableDataset

from ..data.feature_cache import EVALUATION, KINDS, TRAINING, FeatureSource, check_flips, check_usable
from ..data.feature_writing import FeatureDataset, cache_features
from ..data.items import modality_of
from ..modeling_cots import COTSModel
from .arguments import COTSTrainingArguments


def frozen_kinds(args: COTSTrainingArguments) -> tuple[str, ...]:
    """The kinds of features, "image" and "text", whose encoder is frozen whole."""
    frozen = {"image": args.freeze_vision, "text": args.freeze_text}
    return tuple(kind for kind in KINDS if frozen[kind] == "all")


def with_cached_features(
    model: COTSModel, args: COTSTrainingArguments, processor, max_text_length: int, train_dataset, eval_dataset
) -> tuple:
    """
    The two data sets, with the features of frozen encoders as columns where `feature_cache` is set.

    They are computed by the first process of each machine, and found by the others. Raises `ValueError` where no
    encoder is frozen whole, where training could not use the features, and for streams and videos.
    """
    folder = args.feature_cache
    if folder is None:
        return train_dataset, eval_dataset
    kinds = frozen_kinds(args)
    if not kinds:
        raise ValueError(
            "feature_cache is for encoders that are frozen whole: set freeze_vision or freeze_text to all, or leave "
            "it out."
        )
    for kind in kinds:
        check_usable(kind, args)
    model.to(args.device)

    def cached(dataset, view: str, flipped: bool = False):
        if isinstance(dataset, FeatureDataset):  # of another model that `model_init` has made
            dataset = dataset.dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError("A stream has no end to compute features of: leave feature_cache out, or open it whole.")
        if modality_of(dataset) == "video":
            raise ValueError("Frames of videos are drawn anew in each epoch: leave feature_cache out.")
        return cache_features(
            dataset,
            model,
            processor,
            folder,
            kinds=kinds,
            max_text_length=max_text_length,
            view=view,
            flipped=flipped,
            batch_size=args.eval_batch_size,
            num_workers=args.dataloader_num_workers,
            precision="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            progress=args.process_index == 0 and not args.disable_tqdm,
        )

    with args.main_process_first(desc="caching features"):
        if train_dataset is not None:
            train_dataset = cached(train_dataset, TRAINING, args.horizontal_flip > 0)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: cached(part, EVALUATION) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = cached(eval_dataset, EVALUATION)
    return train_dataset, eval_dataset


def choose_features(
    first_item: dict, model: COTSModel, args: COTSTrainingArguments, processor, max_text_length: int
) -> dict[str, FeatureSource]:
    """
    The sources of the cached features of training data, by kind; empty for data without.

    Raises `ValueError` for features that training cannot use, and for those of another encoder, image size or cut.
    """
    sources = {}
    for kind in KINDS:
        found = FeatureSource.of_item(first_item, kind)
        if found is None:
            continue
        check_usable(kind, args)
        wanted = features_of(kind, model, processor, max_text_length, TRAINING)
        wanted = replace(wanted, precision=found.precision)  # whichever it is
        if difference := found.differences(wanted):
            raise ValueError(
                f"The cached {kind} features do not fit this run: {difference}. Compute them anew, or train on the "
                "data without them."
            )
        if kind == "image":
            check_flips(found, first_item, args.horizontal_flip)
        sources[kind] = found
    return sources


def features_of(kind: str, model: COTSModel, processor, max_text_length: int, view: str) -> FeatureSource:
    """The source of a kind of features that a model would have."""
    if kind == "image":
        return FeatureSource.of_images(model, processor, view)
    return FeatureSource.of_texts(model, processor, max_text_length)


class MeasuredFeatures:
    """
    Which cached features an evaluation can use: those that an encoder which does not train would give.

    Args:
        model, args, processor, max_text_length: Of the trainer.
    """

    def __init__(self, model: COTSModel, args: COTSTrainingArguments, processor, max_text_length: int):
        self.parts = model, processor, max_text_length
        self.kinds = frozen_kinds(args)
        self._wanted: dict[str, FeatureSource] = {}

    def of(self, first_item: dict) -> dict[str, FeatureSource]:
        """The sources, by kind, of the features of a data set with this first item."""
        usable = {}
        for kind in self.kinds:
            found = FeatureSource.of_item(first_item, kind)
            if found is None:
                continue
            if kind not in self._wanted:  # a digest of all weights, which do not change
                self._wanted[kind] = features_of(kind, *self.parts, EVALUATION)
            if found == replace(self._wanted[kind], precision=found.precision):
                usable[kind] = found
        return usable
