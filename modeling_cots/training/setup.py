"""Before `COTSTrainer` takes its first step: checks that fail early, where image tokens come from, frozen heads."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import MappingProxyType

from torch.utils.data import IterableDataset
from transformers.trainer_utils import HubStrategy, has_length

from ..data.feature_cache import FeatureSource
from ..data.image_augmentation import ImageTransform
from ..data.image_collators import COTSDataCollator
from ..data.image_token_cache import TokenSource
from ..data.items import modality_of
from ..data.rows import IMAGE_TOKENS, TOKEN_SOURCE
from ..data.streaming.dataset import PairStream
from ..data.video_collators import COTSVideoDataCollator
from ..encoders_cots import check_vocabulary
from ..method.image_tokenizer import ImageTokenizer
from ..modeling_cots_pretraining import COTSForPreTraining
from .adapters import pretraining_model_of
from .arguments import COTSTrainingArguments
from .base_arguments import REFUSED, check_measure
from .processes import check_launch
from .sharding import check_sharding

# Parts of `transformers.Trainer` that COTSTrainer has its own of, and why they must be left out.
REFUSED_PARTS = {
    "compute_loss_func": "the loss is COTSObjective's",
    "compute_metrics": "evaluation measures retrieval",
    "preprocess_logits_for_metrics": "evaluation measures retrieval",
}


def check_model(model, processor) -> None:
    """Raise `ValueError` for a model that COTS cannot train, or whose vocabulary does not fit the tokenizer."""
    inner = pretraining_model_of(model)
    if not isinstance(inner, COTSForPreTraining):
        raise ValueError(f"COTSTrainer trains a COTSForPreTraining, got {type(inner).__name__}.")
    check_vocabulary(processor.tokenizer, inner.config)


def check_setup(args: COTSTrainingArguments | None, processor) -> None:
    """Raise `ValueError` for arguments, a launch or a missing processor that COTS cannot be trained with."""
    if not isinstance(args, COTSTrainingArguments):
        raise ValueError(f"COTSTrainer needs COTSTrainingArguments, got {type(args).__name__}.")
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value} would put momentum copies and optimizer states into the "
            "repository of the model: use every_save or end, and keep the checkpoints where you train."
        )
    check_launch(args)
    if processor is None:
        raise ValueError("COTSTrainer needs the COTSProcessor as `processing_class`.")


def check_parts(args: COTSTrainingArguments, parts: dict) -> None:
    """Raise `ValueError` for further arguments of the trainer that it would ignore, or that do not fit `args`."""
    for name, reason in REFUSED_PARTS.items():
        if parts.get(name) is not None:
            raise ValueError(f"COTSTrainer takes no {name}: {reason}.")
    if args.encoder_learning_rate is not None:
        for name in ("optimizers", "optimizer_cls_and_kwargs"):
            if parts.get(name) not in (None, (None, None)):
                raise ValueError(f"encoder_learning_rate would be ignored beside {name}: leave one of them out.")
    if isinstance(parts.get("train_dataset"), PairStream) and args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy} does not apply to a stream, which is shuffled by "
            "its own buffer: leave it out, or open the stream with shuffle_buffer=0."
        )
    check_measure(args, parts.get("eval_dataset"))
    check_sharding(args, parts)


def check_searched(names: Iterable[str]) -> None:
    """Raise `ValueError` for names of a search space that training would ignore, or that are no arguments of it."""
    arguments = {field.name for field in fields(COTSTrainingArguments)}
    for name in names:
        if name in REFUSED:
            raise ValueError(f"There is nothing to search for in {name}: {REFUSED[name]}.")
        if name not in arguments:
            raise ValueError(
                f"{name} is no argument of training: what changes the model is chosen in model_init(trial)."
            )


def check_measurable(dataset) -> None:
    """Raise `ValueError` for what cannot be measured as one data set of pairs."""
    if dataset is None or isinstance(dataset, (str, Mapping)) or not has_length(dataset):
        raise ValueError(
            f"Retrieval is measured in a data set of known length, as of open_pairs; got {type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ValueError("The data set to measure is empty.")


def search_measure(args: COTSTrainingArguments, eval_dataset) -> tuple[str, str]:
    """
    The measure that trials of a search are compared by, and whether to "maximize" or to "minimize" it.

    Raises `ValueError` where several data sets are evaluated and no measure is chosen.
    """
    name = args.metric_for_best_model
    if name is None and isinstance(eval_dataset, dict):
        raise ValueError("With several data sets, set metric_for_best_model: by which measure are trials compared?")
    name = "eval_recall_sum" if name is None else name
    best = "minimize" if name.endswith("_rank") else "maximize"
    return (name if name.startswith("eval_") else f"eval_{name}"), best


def check_batches(loader, dataset, args: COTSTrainingArguments) -> None:
    """Raise `ValueError` for training data that make no batch; the Trainer would end as if it had trained."""
    if has_length(loader) and len(loader) == 0:
        raise ValueError(
            f"{len(dataset):,} images make no batch of {args.train_batch_size * args.world_size:,}, and "
            "dataloader_drop_last leaves out a smaller one: lower per_device_train_batch_size, or set "
            "dataloader_drop_last to false."
        )


def choose_image_tokens(
    train_dataset, model, args: COTSTrainingArguments, image_tokenizer: ImageTokenizer | None, has_own_collator: bool
) -> tuple[TokenSource | None, ImageTokenizer | None]:
    """
    Where the targets of masked vision modeling come from: the source of cached tokens, or else the image tokenizer.

    A custom collator need not know of cached tokens: with one, tokens are computed. Raises `ValueError` where there is
    neither, and for cached tokens that training cannot use (`TokenSource.check`).
    """
    if args.cmvm_weight == 0:
        return None, image_tokenizer
    if image_tokenizer is not None and image_tokenizer.vocab_size != model.config.image_vocab_size:
        raise ValueError(
            f"The image tokenizer has {image_tokenizer.vocab_size} tokens and the model's masked-image head "
            f"{model.config.image_vocab_size}: set image_vocab_size in the configuration."
        )
    item = {} if has_own_collator else first_item(train_dataset)
    if TOKEN_SOURCE in item:
        source, tokens = TokenSource.from_json(item[TOKEN_SOURCE]), item[IMAGE_TOKENS]
        source.check(model.config, args, image_tokenizer, None if tokens is None else len(tokens))
        return source, None
    if image_tokenizer is None:
        raise ValueError(
            "Masked vision modeling needs an image_tokenizer, or a data set with cached image tokens "
            "(examples/tokenize_images.py); or set cmvm_weight to 0."
        )
    return None, image_tokenizer


def first_item(dataset) -> dict:
    """The first item of a data set, or an empty one where there is none to look at."""
    if isinstance(dataset, PairStream):
        return dataset.first_item()
    is_empty = dataset is None or isinstance(dataset, IterableDataset) or len(dataset) == 0
    return {} if is_empty else dataset[0]


def build_training_collator(
    train_dataset,
    config,
    args: COTSTrainingArguments,
    processor,
    max_text_length: int,
    token_source: TokenSource | None = None,
    features: Mapping[str, FeatureSource] = MappingProxyType({}),
):
    """The collator of training images or videos; augmentation and masks are those of the arguments."""
    if modality_of(train_dataset) == "video":
        return build_video_collator(args, processor, max_text_length)
    transform = ImageTransform(
        config.image_size,
        processor.image_processor.image_mean,
        min_crop_scale=args.min_crop_scale,
        horizontal_flip=args.horizontal_flip,
        auto_augment=args.auto_augment,
    )
    return COTSDataCollator(
        processor,
        image_transform=transform,
        max_text_length=max_text_length,
        patch_size=config.patch_size,
        image_mask_ratio=args.image_mask_ratio,
        text_mask_ratio=args.text_mask_ratio,
        mask_images=args.cmvm_weight > 0,
        mask_texts=args.cmlm_weight > 0,
        token_source=token_source,
        features=features,
    )


def build_video_collator(args: COTSTrainingArguments, processor, max_text_length: int) -> COTSVideoDataCollator:
    """The collator of training videos. Raises `ValueError` for options that do not apply to videos."""
    for name in ("cmvm_weight", "cmlm_weight"):
        if getattr(args, name) > 0:
            raise ValueError(f"Videos have no masked passes: set {name} to 0, got {getattr(args, name)}.")
    if args.auto_augment is not None:
        raise ValueError(f"auto_augment works on single images: leave it out for videos, got {args.auto_augment!r}.")
    return COTSVideoDataCollator(
        processor,
        max_text_length=max_text_length,
        min_crop_scale=args.min_crop_scale,
        horizontal_flip=args.horizontal_flip,
    )


def freeze_unused_parameters(model: COTSForPreTraining, args: COTSTrainingArguments) -> None:
    """Freeze the heads of losses with weight 0: distributed data parallelism refuses parameters without a gradient."""
    unused = []
    if args.cmvm_weight == 0:
        unused += [*model.cmvm_head.parameters(), *model.text_to_image.parameters()]
        unused += [tensor for name, tensor in model.cots.named_parameters() if name.endswith("mask_token")]
    if args.cmlm_weight == 0:
        shared = {id(parameter) for parameter in model.cots.parameters()}  # the tied word embeddings are in use
        heads = [*model.cmlm_head.parameters(), *model.image_to_text.parameters()]
        unused += [parameter for parameter in heads if id(parameter) not in shared]
    for parameter in unused:
        parameter.requires_grad_(False)


def encoder_parameters(model: COTSForPreTraining) -> list:
    """The weights of the two encoders."""
    return [*model.cots.text_model.parameters(), *model.cots.vision_model.parameters()]


def check_encoder_learning_rate(model: COTSForPreTraining, args: COTSTrainingArguments) -> None:
    """Raise `ValueError` for a learning rate of encoders that do not train."""
    if args.encoder_learning_rate is None:
        return
    if not any(parameter.requires_grad for parameter in encoder_parameters(model)):
        raise ValueError(
            f"encoder_learning_rate is {args.encoder_learning_rate}, and no weight of an encoder trains: leave it out."
        )
