"""What happens before `COTSTrainer` takes its first step: checks that fail early, frozen heads, schedule, videos.

And, after its last one, how processes leave each other.
"""

import os

import torch
import torch.distributed.distributed_c10d as c10d
from torch.utils.data import IterableDataset
from transformers.trainer_utils import HubStrategy, has_length

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
    num_launched = int(os.environ.get("WORLD_SIZE", 1))
    if num_launched > 1 and args.world_size == 1:
        raise ValueError(
            f"{num_launched} processes were launched and each takes itself for the only one, so that all would train "
            "alone and write to the same folder: without GPUs add --use_cpu."
        )
    if processor is None:
        raise ValueError("COTSTrainer needs the COTSProcessor as `processing_class`.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs: start one for each, `torchrun --nproc_per_node {args.n_gpu} ...`."
        )
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


def with_image_tokens(inputs: dict, image_tokenizer: ImageTokenizer | None, patch_size: tuple[int, int]) -> dict:
    """A batch with masked patches gets `image_tokens` (B, patches), cached or computed, of raw pixels if it has them.

    Called before the model runs: the dVAE's own activations then do not come on top of those that the model keeps.
    """
    if "bool_masked_pos" not in inputs or "image_tokens" in inputs:
        return inputs
    image_tokens = image_tokenizer(inputs.get("raw_pixels", inputs["pixel_values"]), patch_size)
    return {**inputs, "image_tokens": image_tokens}


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


def settle_launch(trainer) -> None:
    """Hold several processes to `ddp_timeout`. Raises `ValueError` for a mode that splits the model among them.

    docs/reliability.md has the sizes for which it need not be split.
    """
    # The arguments are asked too: a single process would ignore them without a word.
    wanted = trainer.args.fsdp or trainer.args.deepspeed
    if wanted or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "COTSTrainer keeps a full momentum copy of the model on every device: use plain data parallelism "
            "(torchrun or accelerate launch), not FSDP or DeepSpeed. The paper's model has 0.2 billion parameters."
        )
    # The Trainer hands the time-out to processes with GPUs alone; others would wait for a hung one for 30 minutes.
    if trainer.args.world_size > 1 and trainer.args.device.type == "cpu":
        set_timeout = getattr(torch.distributed, "set_timeout", None) or c10d._set_pg_timeout  # its older name
        set_timeout(trainer.args.ddp_timeout_delta, torch.distributed.group.WORLD)


def leave_launch(trainer) -> None:
    """Part from the other processes, so that this one can end.

    The threads of gloo let go of a tensor some time after its result is there. Where that is while the interpreter
    shuts down, the process is aborted ("terminate called without an active exception") after all of its work is done,
    and with it the launch fails (https://github.com/pytorch/pytorch/pull/179291). They are waited for when the last
    reference to the process group goes, and the wrapped model holds one (tests/test_distributed.py).
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def use_float16_on_cpu(trainer) -> None:
    """On a CPU accelerate would train in float32 without a word where `fp16` was asked for; torch can do it."""
    accelerator = trainer.accelerator
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")


def mark_repeated_samples(trainer, batches: list[dict]) -> None:
    """Take the samples out of an epoch's last batch that are there only to make the processes' batches equal.

    accelerate fills up with samples from the beginning of the epoch. With the pair id -1 and not `valid` they are in
    no loss, no queue and no count, so that a last batch that is not full equals that of one process.
    """
    if trainer.args.world_size == 1 or not batches or not trainer.accelerator.gradient_state.end_of_dataloader:
        return
    batch = batches[-1]
    batch_size = len(batch["valid"])
    if has_length(trainer.train_dataset) and not trainer.args.dataloader_drop_last:
        num_real = len(trainer.train_dataset) % (batch_size * trainer.args.world_size)
    else:
        num_real = max(0, trainer.accelerator.gradient_state.remainder)
    if num_real == 0:
        return
    first_repeated = max(0, num_real - trainer.args.process_index * batch_size)
    batch["valid"][first_repeated:] = False
    batch["pair_ids"][first_repeated:] = -1


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
