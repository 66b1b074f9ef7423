"""Before `COTSTrainer` takes its first step: checks that fail early, where image tokens come from, frozen heads."""

from torch.utils.data import IterableDataset
from transformers.trainer_utils import HubStrategy

from ..data.image_augmentation import ImageTransform
from ..data.image_collators import COTSDataCollator
from ..data.image_token_cache import TokenSource
from ..data.rows import IMAGE_TOKENS, TOKEN_SOURCE
from ..data.streaming.dataset import StreamingPairs
from ..data.video_collators import COTSVideoDataCollator, holds_videos
from ..encoders_cots import check_vocabulary
from ..method.image_tokenizer import ImageTokenizer
from ..modeling_cots_pretraining import COTSForPreTraining
from .arguments import COTSTrainingArguments
from .processes import check_launch


def check_setup(model, args: COTSTrainingArguments, processor) -> None:
    """Raise `ValueError` for parts that do not fit each other or the method."""
    if not isinstance(model, COTSForPreTraining):
        raise ValueError(f"COTSTrainer trains a COTSForPreTraining, got {type(model).__name__}.")
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
    check_vocabulary(processor.tokenizer, model.config)


def settle_image_tokens(
    train_dataset, model, args: COTSTrainingArguments, image_tokenizer: ImageTokenizer | None, has_own_collator: bool
) -> tuple[TokenSource | None, ImageTokenizer | None]:
    """
    Where the targets of masked vision modelling come from: what cached tokens are of, or else the tokenizer.

    A collator of one's own need not know of cached tokens: then they are computed. Raises `ValueError` without either,
    for cached tokens of other views of the images than training shows, and for those of another image tokenizer.
    """
    if args.cmvm_weight == 0:
        return None, image_tokenizer
    if image_tokenizer is not None and image_tokenizer.vocab_size != model.config.image_vocab_size:
        raise ValueError(
            f"The image tokenizer has {image_tokenizer.vocab_size} tokens and the model's masked-image head "
            f"{model.config.image_vocab_size}: set image_vocab_size in the configuration."
        )
    item = {} if has_own_collator else _first_item(train_dataset)
    if TOKEN_SOURCE in item:
        source = TokenSource.from_json(item[TOKEN_SOURCE])
        _check_views(item, args)
        _check_source(source, model.config, image_tokenizer)
        return source, None
    if image_tokenizer is None:
        raise ValueError(
            "Masked vision modelling needs an image_tokenizer, or a data set with cached image tokens "
            "(examples/tokenize_images.py); or set cmvm_weight to 0."
        )
    return None, image_tokenizer


def _check_views(item: dict, args: COTSTrainingArguments) -> None:
    for name, needed in (("min_crop_scale", 1.0), ("auto_augment", None)):
        value = getattr(args, name)
        if value != needed:
            raise ValueError(
                f"The image tokens of the data set are of whole images, and {name}={value} shows others to the "
                f"model: set {name} to {needed} to train on the cached tokens, or train on the data set that they "
                f"were computed from, without the column {IMAGE_TOKENS}."
            )
    if args.horizontal_flip > 0 and item[IMAGE_TOKENS] is not None and len(item[IMAGE_TOKENS]) < 2:
        raise ValueError(
            f"horizontal_flip={args.horizontal_flip} flips images, and the data set has no image tokens of "
            "flipped ones: compute them with `examples/tokenize_images.py --mirrored`, or set horizontal_flip to 0."
        )


def _first_item(dataset) -> dict:
    if isinstance(dataset, StreamingPairs):
        return dataset.first_item()
    is_empty = dataset is None or isinstance(dataset, IterableDataset) or len(dataset) == 0
    return {} if is_empty else dataset[0]


def _check_source(source: TokenSource, config, image_tokenizer: ImageTokenizer | None) -> None:
    if image_tokenizer is not None:
        wanted = TokenSource.of(image_tokenizer, config.image_size, config.patch_size)
    else:  # whose weights they are of cannot be told
        wanted = TokenSource(config.image_vocab_size, config.image_size, config.patch_size, source.codebook)
    if difference := source.differences(wanted):
        raise ValueError(
            f"The cached image tokens do not fit this run: {difference}. Compute them anew with "
            f"examples/tokenize_images.py, or train on the data set without the column {IMAGE_TOKENS}."
        )


def build_training_collator(
    train_dataset,
    config,
    args: COTSTrainingArguments,
    processor,
    max_text_length: int,
    token_source: TokenSource | None = None,
):
    """The collator of training images or videos, with the augmentation and the masks that the arguments ask for."""
    if holds_videos(train_dataset):
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
    )


def build_video_collator(args: COTSTrainingArguments, processor, max_text_length: int) -> COTSVideoDataCollator:
    """The collator of training videos. Raises `ValueError` for what is set and could do nothing for them."""
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
    """Distributed data parallelism refuses parameters that get no gradient: those of a switched-off head."""
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
