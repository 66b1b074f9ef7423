"""What the training scripts of `examples/` share: their options on data and models, and the steps that use them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch.utils.data import Dataset

from ..configuration_cots import COTSConfig
from ..data.image_reading import check_readable
from ..data.opening import open_dataset
from ..data.revisions import check_revision
from ..data.splits import MissingSplitError
from ..data.streaming.dataset import PairStream, open_stream
from ..data.streaming.mixture import is_mixture, open_mixture
from ..evaluation.recall_table import rename_metrics
from ..evaluation.report import format_report
from ..evaluation.results import stated_zero_shot_protocol, write_results
from ..evaluation.retrieval_metrics import COCO_NUM_FOLDS, PROTOCOLS
from ..hub.model_card import write_card_of_measured
from ..method.image_tokenizer import ImageTokenizer
from ..method.kmeans_tokenizer import KMeansImageTokenizer
from ..modeling_cots_pretraining import COTSForPreTraining
from ..processing_cots import COTSProcessor
from ..training.adapters import with_lora
from ..training.arguments import COTSTrainingArguments
from ..training.trainer import COTSTrainer
from .command_line import parse_and_trace
from .factory import (
    CONFIG_OPTIONS,
    MAIN,
    build_config,
    build_image_tokenizer,
    build_model,
    build_processor,
    build_tokenizer,
    config_options,
    set_image_size,
)
from .kmeans_fitting import KMEANS, VOCAB_SIZE, find_or_fit
from .output_folder import check_output_dir
from .starting_point import (
    describe_start,
    is_from_scratch,
    name_start,
    read_fields,
    set_initializer_range,
    starting_defaults,
)

# Options of the scripts; those of training are checked by `COTSTrainingArguments`. A caption has two special tokens.
LOWEST = {"max_text_length": 3, "shuffle_buffer": 1, "num_frames": 1, "num_pairs": 1, "num_gpus": 1}
ABOVE_ZERO = ("temperature", "gpu_memory_gib", "gpu_tflops")
VERSIONED = ("model", "text_model", "vision_model", "tokenizer", "image_tokenizer")  # options that may be Hub ids


@dataclass
class DataArguments:
    """The data set of pairs, its splits and its columns."""

    dataset: str = field(
        metadata={
            "help": "`scenes` (built in), a Hub id, a folder of images with metadata.jsonl or metadata.csv, .parquet, "
            ".jsonl, .csv or WebDataset .tar files, or dataset_flickr30k.json or dataset_coco.json of Karpathy."
        }
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub id, or of a folder with a card, if it has several."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    train_split: str = field(
        default="train", metadata={"help": "Split to train on; of dataset_coco.json `train` takes in `restval`."}
    )
    eval_split: str | None = field(
        default="validation", metadata={"help": "Split to measure retrieval on; `none` to measure nothing."}
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Images of a Karpathy file, if they are not beside it."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found if not given."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, one or a list for each image; found if not given."}
    )


@dataclass
class StreamArguments:
    """Whether pairs are streamed, and the data set of evaluation."""

    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read .tar or .parquet shards (paths, https:// or s3:// addresses, with {000..009}) or a Hub id "
            "as they come, or several by weights (dataset is a .yaml of sources); needs max_steps. Evaluation data is "
            "always opened whole."
        },
    )
    shuffle_buffer: int | None = field(
        default=None,
        metadata={"help": "With streaming: samples of each worker that wait to be drawn from, 1000 if not given."},
    )
    image_tokens: str | None = field(
        default=None,
        metadata={
            "help": "With streaming: a folder of image tokens beside the shards, as `tokenize_images.py "
            "--without_images` writes it."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Where eval_split is, if not in the data set that is trained on."}
    )
    eval_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, as dataset_config."})
    eval_dataset_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})


@dataclass
class ModelArguments:
    """The weights that the encoders start from, and the tokenizers."""

    model: str | None = field(default=None, metadata={"help": "A COTS checkpoint to go on from (Hub id or folder)."})
    text_model: str | None = field(default=None, metadata={"help": "A pre-trained text encoder (Hub id or folder)."})
    vision_model: str | None = field(
        default=None, metadata={"help": "A pre-trained vision encoder (Hub id, folder, or timm/NAME)."}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "A JSON file of COTSConfig fields for what is not pre-trained."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder; by default the text model's, or one trained on the captions."},
    )
    image_tokenizer: str = field(
        default="facebook/flava-image-codebook",
        metadata={
            "help": "Hub id or folder of the dVAE; or `kmeans:MODEL` for k-means over the patch features of a vision "
            "encoder, fitted to the data's first images; or `random` for a small randomly initialized codebook; or "
            "`none` to load none and trust the image tokens that the data set brings along."
        },
    )
    max_text_length: int = field(default=64, metadata={"help": "Captions are cut to so many tokens."})
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images in pixels, if not that of the vision encoder, whose position embeddings are "
            "then interpolated."
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Divides the similarities in the losses; by default as in the model, or 0.05."}
    )
    projection_hidden_size: int | None = field(
        default=None,
        metadata={"help": "Width of a hidden layer in each projection, which are linear otherwise. Not in the paper."},
    )
    standardize_features: bool | None = field(
        default=None,
        metadata={
            "help": "Center the encoders' features and divide them by their standard deviation, both fitted to the "
            "data, before the projections. Not in the paper."
        },
    )
    image_pooling: str | None = field(
        default=None,
        metadata={
            "help": "The global image feature: `cls`, the output at [CLS] (the paper), or `cls_mean`, and the mean of "
            "the patches' outputs."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA of this rank on queries and values of pre-trained encoders, and whole only what these "
            "do not bring along; needs peft. Not in the paper."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of `model`."})
    text_model_revision: str | None = field(default=None, metadata={"help": "That of `text_model`."})
    vision_model_revision: str | None = field(default=None, metadata={"help": "That of `vision_model`."})
    tokenizer_revision: str | None = field(default=None, metadata={"help": "That of `tokenizer`."})
    image_tokenizer_revision: str | None = field(default=None, metadata={"help": "That of `image_tokenizer`."})

    @property
    def revisions(self) -> dict[str, str]:
        """Branch, tag or commit of each option that has one. Raises `ValueError` where the option is no Hub id."""
        given = {name: getattr(self, f"{name}_revision") for name in VERSIONED}
        for name, revision in given.items():
            # Without masked vision modeling nothing asks for the image tokenizer; see `build_image_tokenizer`.
            check_revision(name, getattr(self, name), revision, is_needed=name != "image_tokenizer")
        return {name: revision for name, revision in given.items() if revision is not None}


@dataclass
class MeasuringArguments:
    """The protocol of a retrieval script, and how far its results are zero-shot."""

    protocol: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(f'`{name}`' for name in PROTOCOLS)}: the counts of `eval_split` must fit. Of MSR-VTT "
            "it also says which split is meant."
        },
    )
    zero_shot_protocol: str | None = field(
        default=None,
        metadata={
            "help": "Of a model that is only measured: `pretrained`, `fine-tuned-elsewhere`, or `none` if it was "
            "fine-tuned on this data set."
        },
    )


@dataclass
class OutcomeArguments:
    """What happens to what stands in `output_dir`, and where a run has learned nothing."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Write into an output_dir that is not empty, over files of equal names. Checkpoints of other runs "
            "are moved to a sub-folder."
        },
    )
    strict: bool = field(
        default=False,
        metadata={"help": "End with exit status 1 where recall on eval_split is within the noise of chance."},
    )


@dataclass
class TrainingParts:
    """A model with processor and image tokenizer of matching sizes; the image tokenizer may be `None`."""

    model: COTSForPreTraining
    processor: COTSProcessor
    image_tokenizer: ImageTokenizer | KMeansImageTokenizer | None


def parse_options(
    *script_types: type,
    argv: list[str] | None = None,
    defaults: dict | None = None,
    description: str | None = None,
    writes: bool = True,
) -> tuple:
    """
    The dataclasses of a script, filled, and then its `COTSTrainingArguments`: see `parse_config_and_options`.

    A script with [`ModelArguments`] gets the defaults that fit what its training starts from, and prints them. For one
    with [`OutcomeArguments`] that `writes`, `output_dir` is checked.

    Raises `ValueError` for what transformers leaves to scripts and these do not ask for, and as `check_output_dir`.
    """
    has_model = any(issubclass(each, ModelArguments) for each in script_types)
    (*script_args, args), given = parse_and_trace(
        *script_types,
        COTSTrainingArguments,
        argv=argv,
        defaults=defaults,
        choose_defaults=starting_defaults if has_model else None,
        description=description,
    )
    with given.locating_errors():
        check_lowest(script_args)
    if has_model:
        options = next(each for each in script_args if isinstance(each, ModelArguments))
        args.starting_point = name_start(options)
        trains = all(getattr(each, "train_split", None) != "none" for each in script_args)
        if args.process_index == 0 and trains:
            print(describe_start(options, given.chosen))
        elif args.process_index == 0 and options.model is not None:
            print(f"Nothing is trained: {name_start(options)} is measured.")
    for name, is_set in {
        "do_train": args.do_train,
        "do_eval": args.do_eval and args.eval_strategy == "no",  # else it follows from the strategy
        "do_predict": args.do_predict,
    }.items():
        if is_set:
            raise ValueError(f"{name} would be ignored: train_split and eval_split say what this script does.")
    outcome = next((each for each in script_args if isinstance(each, OutcomeArguments)), None)
    if getattr(outcome, "eval_split", "any") in (None, "none"):
        if outcome.strict:
            raise ValueError("strict asks whether the run has learned, and nothing is measured: give eval_split.")
        if args.eval_strategy != "no":
            raise ValueError(f"eval_strategy={args.eval_strategy.value} has nothing to measure: give eval_split.")
    if writes and outcome is not None and args.process_index == 0:
        check_output_dir(args, outcome.overwrite_output_dir)
    return *script_args, args


def check_lowest(script_args: list) -> None:
    """Raise `ValueError` for an option of a script that is below its lowest value; see `LOWEST` and `ABOVE_ZERO`."""
    for options in script_args:
        for name, lowest in LOWEST.items():
            if (value := getattr(options, name, None)) is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}.")
        for name in ABOVE_ZERO:
            if (value := getattr(options, name, None)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")


def read_config(options: ModelArguments) -> COTSConfig:
    """
    The configuration: of the checkpoint, of the given encoders, of a file, or the paper's.

    Raises `ValueError` for a checkpoint given together with encoders or a configuration, as it contains both.
    """
    if options.model is not None:
        for name in ("text_model", "vision_model", "model_config"):
            if getattr(options, name) is not None:
                raise ValueError(f"model={options.model} is a whole COTS checkpoint: leave {name} out, or model.")
    config = build_config(
        options.model,
        options.model_config,
        options.text_model,
        options.vision_model,
        options.revisions,
        **config_options(options),
    )
    if options.lora_rank is not None and options.model is None and None in (options.text_model, options.vision_model):
        raise ValueError(
            "LoRA leaves encoders frozen, so both must be pre-trained: give text_model and vision_model, or model; "
            "or leave lora_rank out."
        )
    if is_from_scratch(options):
        set_initializer_range(config, read_fields(options.model_config))
    return config


def open_split(options: DataArguments, split: str | None, *, image_size: int, seed: int) -> Dataset | None:
    """A split of the data, after reading its first images; `None` for no split."""
    if split in (None, "none"):
        return None
    with explaining_splits(options, split):
        opened = open_dataset(
            options.dataset,
            split,
            image_folder=options.image_folder,
            image_column=options.image_column,
            caption_column=options.caption_column,
            image_size=image_size,
            seed=seed,
            dataset_config=options.dataset_config,
            revision=options.dataset_revision,
        )
    check_readable(opened)
    return opened


@contextmanager
def explaining_splits(options, split: str) -> Iterator[None]:
    """
    Say after the message of a `MissingSplitError` what to write instead.

    Args:
        options: Has `train_split` and `eval_split`.
        split: The one that is opened in the block.
    """
    try:
        yield
    except MissingSplitError as error:
        option = "eval_split" if split == options.eval_split else "train_split"
        ways = [f"--{option} {name}" for name in error.available]
        if option == "eval_split":
            first = error.available[0] if error.available else "train"
            ways = ["--eval_split none to measure nothing"] if not isinstance(options, MeasuringArguments) else []
            if error.can_be_cut:
                ways.append(f"--eval_split {first}[:500] --train_split {first}[500:] to hold some of it out")
            ways += [f"--eval_split {name}" for name in error.available if name != options.train_split]
        raise ValueError(f"{error} Write {', or '.join(ways)}.") from error


def held_out_options(options):
    """
    The options of data, by which [`open_split`] opens `eval_split`; `options` has [`StreamArguments`], too.

    The columns and the folder of images of the training data are those of an `eval_dataset` too, but for `scenes`.

    Raises `ValueError` for a configuration or revision of an `eval_dataset` that is not given, and for one of which no
    split is to be measured.
    """
    given = {name: getattr(options, f"eval_dataset{name}") for name in ("", "_config", "_revision")}
    if given[""] is not None:
        if options.eval_split in (None, "none"):
            raise ValueError(f"eval_dataset={given['']} is not measured without an eval_split: leave one of them out.")
        columns = {} if given[""] != "scenes" else dict.fromkeys(("image_folder", "image_column", "caption_column"))
        return replace(options, **{f"dataset{name}": value for name, value in given.items()}, **columns)
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"eval_dataset{name}={value} belongs to eval_dataset, which is not given: leave it out, or give both."
            )
    return options


def open_train_stream(options, args: COTSTrainingArguments) -> PairStream:
    """
    The training split as a stream; `options` is a dataclass of data, stream and model arguments.

    Raises `ValueError` without `max_steps` or a tokenizer, and for options that a stream cannot follow.
    """
    if options.dataset == "scenes":
        raise ValueError("The scenes are drawn, not read: leave out --streaming.")
    if options.image_folder is not None:
        raise ValueError("image_folder belongs to a Karpathy file, which is no stream: leave out one of them.")
    if args.max_steps <= 0:
        raise ValueError("A stream has no known length to count epochs by: give --max_steps.")
    if (options.tokenizer or options.text_model or options.model) is None:
        raise ValueError(
            "With --streaming give --tokenizer, --text_model or --model: the captions of a stream cannot all be read "
            "to train a tokenizer, and every process and every resumed run needs the same one."
        )
    buffer = {} if options.shuffle_buffer is None else {"shuffle_buffer": options.shuffle_buffer}
    if is_mixture(options.dataset):
        _check_mixture(options)
        return open_mixture(options.dataset, options.train_split, seed=args.data_seed, **buffer)
    return open_stream(
        options.dataset,
        options.train_split,
        image_column=options.image_column,
        caption_column=options.caption_column,
        seed=args.data_seed,
        dataset_config=options.dataset_config,
        revision=options.dataset_revision,
        image_tokens=options.image_tokens,
        **buffer,
    )


def _check_mixture(options) -> None:
    """Raise `ValueError` for options of one data set, and where a mixture would have to be measured on itself."""
    for name in ("image_column", "caption_column", "dataset_config", "dataset_revision", "image_tokens"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} belongs to one data set: write it below each source of {options.dataset}.")
    if options.eval_dataset is None and options.eval_split not in (None, "none"):
        raise ValueError(f"{options.dataset} has no split to measure on: give eval_dataset, or --eval_split none.")


def build_parts(
    options: ModelArguments, config: COTSConfig, args: COTSTrainingArguments, train_dataset: Dataset
) -> TrainingParts:
    """
    Tokenizers, processor and model; a tokenizer is trained on the captions of `train_dataset` if none is given.

    Raises `ValueError` without a `train_dataset`, and where parts do not fit.
    """
    if train_dataset is None:
        raise ValueError("There is nothing to train on: give train_split. To measure only, use run_retrieval.py.")
    revisions = options.revisions
    of_tokenizer = revisions
    if options.tokenizer is None and "model" in revisions:
        of_tokenizer = {"tokenizer": revisions["model"]}
    tokenizer = build_tokenizer(
        options.tokenizer or options.model,
        options.text_model,
        train_dataset.iter_captions(),
        options.max_text_length,
        config.text_config.vocab_size,
        of_tokenizer,
    )
    if options.model is None:
        processor = build_processor(config, tokenizer, options.vision_model, revisions)
    else:  # images must be normalized as in the training of the checkpoint
        processor = COTSProcessor.from_pretrained(options.model, revision=revisions.get("model", MAIN))
        processor.tokenizer = tokenizer
        set_image_size(processor, config)
    image_tokenizer = None
    if args.cmvm_weight > 0 and options.image_tokenizer != "none":
        image_tokenizer = _build_image_tokenizer(options, config, args, processor, train_dataset)
    model = build_model(
        model=options.model,
        text_model=options.text_model,
        vision_model=options.vision_model,
        config=config,
        tokenizer=tokenizer,
        num_image_tokens=config.image_vocab_size if image_tokenizer is None else image_tokenizer.vocab_size,
        max_text_length=options.max_text_length,
        with_heads=args.cmvm_weight > 0 or args.cmlm_weight > 0,
        revisions=revisions,
    )
    if options.lora_rank is not None:
        model = with_lora(model, args, options.lora_rank)
    return TrainingParts(model, processor, image_tokenizer)


def _build_image_tokenizer(options: ModelArguments, config: COTSConfig, args, processor, train_dataset):
    revision = options.revisions.get("image_tokenizer", MAIN)
    if not options.image_tokenizer.startswith(KMEANS):
        return build_image_tokenizer(options.image_tokenizer, processor, config.image_vocab_size, revision)
    check_revision("image_tokenizer", options.image_tokenizer, None)
    is_set = options.model is not None or "image_vocab_size" in read_fields(options.model_config)
    settings = processor.image_processor
    with args.main_process_first(desc="fitting image tokens"):
        return find_or_fit(
            options.image_tokenizer,
            train_dataset,
            config,
            config.image_vocab_size if is_set else VOCAB_SIZE,
            settings.image_mean,
            settings.image_std,
            args.output_dir,
            revision=revision,
            device=args.device,
        )


def check_measuring(options, args: COTSTrainingArguments) -> str:
    """
    How far the numbers of a retrieval script will be zero-shot (see [`stated_zero_shot_protocol`]).

    Raises `ValueError` where there is nothing to measure, or nothing to push.
    """
    trains = options.train_split != "none"
    zero_shot_protocol = stated_zero_shot_protocol(options.zero_shot_protocol, trains)
    if not trains and options.model is None:
        raise ValueError("There is nothing to measure: give `model`, or a `train_split` to train on.")
    if options.eval_split in (None, "none"):
        raise ValueError("There is nothing to measure on: give `eval_split`. To train only, use cots-train.")
    for name in (*CONFIG_OPTIONS, "lora_rank"):
        if not trains and getattr(options, name) is not None:
            raise ValueError(f"{name} belongs to a training, and this run only measures the model: leave it out.")
    if not trains and args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint goes on with a training, and this run only measures: give `model`.")
    if not trains and args.push_to_hub:
        raise ValueError("push_to_hub pushes what was trained, and this run only measures: use cots-export.")
    return zero_shot_protocol


def finish_retrieval(
    trainer: COTSTrainer, options, zero_shot_protocol: str, *, trained_on: str | None, modality: str = "image", **facts
) -> None:
    """
    The last step of a retrieval script: measure, write `results.json` and the model with its card, and print both.

    Args:
        options: The arguments of the script, with [`ModelArguments`] and [`MeasuringArguments`].
        trained_on: The data set and split; `None` if the model is only measured, and then its card is copied.
        modality: What the captions describe, an "image" or a "video".
        facts: Further entries of `results.json`.
    """
    args, dataset = trainer.args, trainer.eval_dataset
    metrics = trainer.evaluate()
    if trained_on is not None:
        trainer.export_model(args.output_dir)
        if args.push_to_hub:
            trainer.push_to_hub()
    if not trainer.is_world_process_zero():
        return
    path = os.path.join(args.output_dir, "results.json")
    results = write_results(
        path,
        rename_metrics(metrics, modality),
        protocol=options.protocol,
        zero_shot_protocol=zero_shot_protocol,
        measured_on=dataset.name,
        **{f"num_{modality}s": len(dataset)},
        num_captions=sum(1 for _ in dataset.iter_captions()),
        **facts,
        model=options.model,
        model_commit=getattr(trainer.model.config, "_commit_hash", None),
        trained_on=trained_on,
        num_steps=trainer.state.global_step,
    )
    if trained_on is None:
        write_card_of_measured(
            args.output_dir, options.model, results, modality=modality, revision=options.model_revision
        )
    num_folds = COCO_NUM_FOLDS if results["protocol"] == "coco-1k" else 1
    examples = trainer.example_retrievals
    assert examples is not None, "the trainer has evaluated"
    print("", format_report(metrics, examples, dataset, modality=modality, num_folds=num_folds), sep="\n\n")
    print(f"\nProtocol: {results['protocol']}; zero-shot: {zero_shot_protocol}; skipped: {results['num_skipped']}.")
    print(f"The numbers are in {path}, and in the card beside it.")
    if trained_on is not None:
        print(describe_output(args.output_dir))


def tell_whether_learned(trainer: COTSTrainer, strict: bool) -> None:
    """
    The end of a script: a plain sentence where the last evaluation was within the noise of chance.

    Raises `SystemExit` with status 1 then, if `strict`, on every process.
    """
    if not trainer.recall_is_chance:
        return
    if trainer.args.process_index == 0:
        print(
            "\nThis model has learned nothing: its recall is within the noise of chance. The warnings above and "
            "docs/training.md say what to look at."
        )
    if strict:
        raise SystemExit(1)


def describe_output(output_dir: str) -> str:
    """A sentence that says where the model is and how to load it."""
    return f"The model is in {output_dir}: load it with COTSModel.from_pretrained({output_dir!r})."
