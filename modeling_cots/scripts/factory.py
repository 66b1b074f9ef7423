"""Building model, tokenizer, image tokenizer and processor so that their sizes agree.

The training scripts do this before any other work. New parts take their sizes from the given ones. Two given parts
that do not fit are refused, with both sizes.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import SizeDict
from transformers.utils import CONFIG_NAME, logging

from ..configuration_cots import COTSConfig, encoder_sides
from ..data.revisions import check_revision
from ..encoders_cots import build_text_encoder, build_vision_encoder, check_vocabulary
from ..image_processing_cots import COTSImageProcessor
from ..method.image_tokenizer import ImageTokenizer
from ..method.kmeans_tokenizer import CENTERS_NAME, KMeansImageTokenizer
from ..modeling_cots import COTSModel
from ..modeling_cots_pretraining import COTSForPreTraining
from ..processing_cots import COTSProcessor
from ..video_processing_cots import COTSVideoProcessor
from .image_size import resize_model, resize_vision_encoder_
from .starting_point import read_fields
from .timm_weights import load_timm_vit, timm_vit_config

logger = logging.get_logger(__name__)

DEFAULT_VOCAB_SIZE = 30_522  # BERT's
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_ALPHABET = 1000
RANDOM_IMAGE_TOKENIZER = "random"
OF_ENCODER = "image_size", "patch_size"  # what a COTSConfig has of its vision encoder
OF_FILE = "attn_implementation", "auto_map", "custom_pipelines", "use_cache"  # that are written, and no attributes
OF_WEIGHTS = "projection_hidden_size", "standardize_features", "image_pooling"  # what a checkpoint has once for all
CONFIG_OPTIONS = "image_size", "temperature", *OF_WEIGHTS  # what options of a script may set of it
MAIN = "main"  # the branch that a Hub id without a revision means
LATEST: Mapping[str, str] = {}  # revisions of no option: every Hub id means its branch main


def build_config(
    model: str | None,
    model_config: str | None,
    text_model: str | None,
    vision_model: str | None,
    revisions: Mapping[str, str] = LATEST,
    *,
    image_size: int | None = None,
    **fields: float | int | bool | str | None,
) -> COTSConfig:
    """
    The configuration of a COTS checkpoint; otherwise that of a JSON file or the paper, with the given encoders.

    Args:
        revisions: The branch, tag or commit of each Hub id, by the name of the argument.
        image_size: Side of the images, where it is not that of the checkpoint, the encoder or the file.
        fields: Of [`COTSConfig`], the others of `CONFIG_OPTIONS`; or `None`.

    Raises `ValueError` where two sources differ, with both values, for a folder without a model, and for values that
    no model can be built from.
    """
    given: dict = {}
    if model is not None:
        if Path(model).is_dir() and not (Path(model) / CONFIG_NAME).is_file():
            raise ValueError(
                f"There is no COTS model in {model}: it has no {CONFIG_NAME}. Give a folder that has one."
            )
        config = COTSConfig.from_pretrained(model, revision=revisions.get("model", MAIN))
    else:
        given = read_fields(model_config)
        pre_trained = {"text_config": text_model, "vision_config": vision_model}
        config = _config_of({name: value for name, value in given.items() if not pre_trained.get(name)}, model_config)
    if text_model is not None:
        config.text_config = AutoConfig.from_pretrained(text_model, revision=revisions.get("text_model", MAIN))
        check_file(given.get("text_config"), config.text_config, f"text_model {text_model}")
    if vision_model is not None:
        config.vision_config = _read_vision_config(vision_model, config, image_size, revisions)
    if image_size is not None:
        sides = (given.get("vision_config") or {}).get("image_size")
        if sides not in (None, image_size, [image_size, image_size]):
            raise ValueError(f"image_size is {image_size} and {sides} in the model_config: leave one of them out.")
        config.vision_config.image_size = image_size
    if vision_model is not None:
        check_file(given.get("vision_config"), config.vision_config, f"vision_model {vision_model}")
    for name, value in fields.items():
        if value is None:
            continue
        if given.get(name, value) != value:
            raise ValueError(f"{name} is {value} and {given[name]} in the model_config: leave one of them out.")
        if model is not None and name in OF_WEIGHTS and getattr(config, name) != value:
            raise ValueError(f"{name} is {value} and {getattr(config, name)} in {model}: leave it out.")
        setattr(config, name, value)
    config.validate_architecture()
    return config


def config_options(options) -> dict[str, Any]:
    """What the options of a script set of the configuration, as `build_config` takes it."""
    return {name: getattr(options, name) for name in CONFIG_OPTIONS}


def _read_vision_config(vision_model: str, config: COTSConfig, image_size: int | None, revisions: Mapping[str, str]):
    """The configuration of a pre-trained vision encoder; one of timm is resampled to the image size of `config`."""
    if _is_timm(vision_model):
        return timm_vit_config(vision_model, config.image_size[0] if image_size is None else image_size)
    return AutoConfig.from_pretrained(vision_model, revision=revisions.get("vision_model", MAIN))


def check_file(given: dict | None, encoder_config: PreTrainedConfig, source: str) -> None:
    """
    Raise `ValueError` where a file's part for an encoder, if any, differs from the pre-trained one, with both values.
    """
    if not isinstance(given, dict | None):
        raise ValueError(f"The model_config has {given!r} beside {source}: write fields in braces, or leave it out.")
    for name, value in (given or {}).items():
        actual = getattr(encoder_config, name, None)
        if name == "image_size" and value == 2 * [actual]:
            continue
        if value != actual:
            advice = "give --image_size to train at another size" if name == "image_size" else "leave it out there"
            raise ValueError(f"{name} is {value} in the model_config and {actual} in {source}: {advice}.")


def _config_of(given: dict, path: str | None) -> COTSConfig:
    """The paper's configuration with the fields of a file."""
    try:
        config = COTSConfig(**{name: value for name, value in copy.deepcopy(given).items() if name not in OF_ENCODER})
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no JSON file of COTSConfig fields: {reason}") from error
    _check_fields(given, config, path)
    return config


def _check_fields(given: dict, config: COTSConfig, path: str | None) -> None:
    """Raise `ValueError` for fields of a file that a configuration would carry along without any use."""
    for name in OF_ENCODER:
        if name in given:
            raise ValueError(f"{path}: {name}={given[name]} is that of the vision encoder: put it into vision_config.")
    if given.get("model_type", COTSConfig.model_type) != COTSConfig.model_type:
        raise ValueError(f"{path} is no JSON file of COTSConfig fields: its model_type is {given['model_type']!r}.")
    if given.get("dtype") not in (None, "float32"):
        raise ValueError(f"{path}: dtype is {given['dtype']}, and weights are trained in float32: set bf16 or fp16.")
    parts = {name: getattr(config, name) for name in ("text_config", "vision_config") if given.get(name)}
    for prefix, fields, known in [("", given, config), *((f"{name}.", given[name], parts[name]) for name in parts)]:
        blank = type(known)()
        for name in fields:
            if not hasattr(blank, name) and name not in OF_FILE:
                raise ValueError(f"{path}: there is no {prefix}{name} in a `{known.model_type}` configuration.")


def _is_timm(vision_model: str) -> bool:
    return vision_model.startswith("timm/")


def train_tokenizer(captions: Iterable[str], vocab_size: int = DEFAULT_VOCAB_SIZE) -> BertTokenizer:
    """
    A WordPiece tokenizer in BERT's format, of at most `vocab_size` tokens, each seen at least twice in `captions`.

    The same captions give the same tokenizer, on every process and in every run.
    """
    captions = list(captions)
    blank = BertTokenizer().backend_tokenizer
    letters = Counter(letter for caption in captions for letter in blank.normalizer.normalize_str(caption))
    alphabet = sorted(letter for letter, _ in letters.most_common(MAX_ALPHABET) if not letter.isspace())
    # The library numbers the letters inside words in the order of a hash table with a new seed in every run, and it
    # breaks ties between merges by these numbers. As special tokens the letters are numbered beforehand.
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in alphabet)],
        limit_alphabet=MAX_ALPHABET,
        show_progress=False,
    )
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    tokenizer.train_from_iterator(captions, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab())


def build_tokenizer(
    tokenizer: str | None,
    text_model: str | None,
    captions: Iterable[str],
    max_text_length: int,
    vocab_size: int,
    revisions: Mapping[str, str] = LATEST,
) -> PreTrainedTokenizerBase:
    """The tokenizer given by id or folder; else that of the pre-trained text encoder; else one trained on `captions`.

    `revisions` has the branch, tag or commit of each Hub id, by the name of the argument.

    Raises `ValueError` for one without padding or mask token.
    """
    source = text_model if tokenizer is None else tokenizer
    if source is None:
        built = train_tokenizer(captions, vocab_size)
        logger.warning(f"Trained a WordPiece tokenizer of {len(built)} tokens on the training captions.")
    else:
        option = "text_model" if tokenizer is None else "tokenizer"
        built = AutoTokenizer.from_pretrained(source, revision=revisions.get(option, MAIN))
    for role in ("pad_token", "mask_token"):
        if getattr(built, role) is None:
            raise ValueError(f"The tokenizer {source} has no {role}, which padding and masked modeling need.")
    # Saved with the tokenizer, so that `truncation=True` cuts at the same length wherever the model is used.
    built.model_max_length = max_text_length
    return built


def build_model(
    *,
    model: str | None,
    text_model: str | None,
    vision_model: str | None,
    config: COTSConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_image_tokens: int,
    max_text_length: int,
    with_heads: bool = True,
    revisions: Mapping[str, str] = LATEST,
) -> COTSForPreTraining:
    """
    The model to train: a COTS checkpoint to continue from, a pair of pre-trained encoders, or fresh weights.

    An encoder that is not pre-trained is built from `config`, with vocabulary sizes from the tokenizers. The heads of
    masked modeling are loaded from a checkpoint only `with_heads`, as a shared checkpoint has none. `revisions` has
    the branch, tag or commit of each Hub id, by the name of the argument.

    Raises `ValueError` where an encoder and a tokenizer do not fit, and for captions longer than the positions.
    """
    if model is not None:
        load = COTSForPreTraining.from_pretrained if with_heads else _load_without_heads
        built = load(model, revision=revisions.get("model", MAIN))
        if built.config.image_size != config.image_size:
            built = resize_model(built, config.image_size[0])
        built.config.temperature = config.temperature
    elif text_model is None and vision_model is None:
        config.text_config.vocab_size = len(tokenizer)
        config.image_vocab_size = num_image_tokens
        built = COTSForPreTraining(config)
    else:
        built = _from_encoders(text_model, vision_model, config, tokenizer, num_image_tokens, revisions)
        if config._attn_implementation is not None:  # set in the configuration file; encoders are loaded with another
            built.set_attn_implementation(config._attn_implementation)
    check_vocabulary(tokenizer, built.config)
    if built.config.image_vocab_size != num_image_tokens:
        raise ValueError(
            f"The image tokenizer has {num_image_tokens} tokens and the model's masked-image head "
            f"{built.config.image_vocab_size}: give the image tokenizer that the model was trained with."
        )
    max_positions = built.base_model.max_text_length
    if max_positions is not None and max_text_length > max_positions:
        raise ValueError(
            f"max_text_length is {max_text_length} and the text encoder has only {max_positions} positions."
        )
    return built


def _load_without_heads(model: str, revision: str) -> COTSForPreTraining:
    """The encoders of a checkpoint with fresh heads, without the loader's report of missing heads."""
    loaded = COTSModel.from_pretrained(model, revision=revision)
    built = COTSForPreTraining(loaded.config)
    missing, _ = built.cots.load_state_dict(loaded.state_dict(), strict=False)
    assert all(name.endswith("mask_token") for name in missing), missing
    return built


def _from_encoders(text_model, vision_model, config: COTSConfig, tokenizer, num_image_tokens: int, revisions):
    """A model of pre-trained encoders; one that is not given is built from `config`."""
    if text_model is None:
        config.text_config.vocab_size = len(tokenizer)
        text_model = build_text_encoder(config.text_config)
    else:
        text_model = AutoModel.from_pretrained(text_model, revision=revisions.get("text_model", MAIN))
    if vision_model is None:
        vision_model = build_vision_encoder(config.vision_config, use_mask_token=False)
    elif _is_timm(vision_model):
        vision_model = load_timm_vit(vision_model, config.image_size[0], revisions.get("vision_model"))
    else:
        vision_model = AutoModel.from_pretrained(vision_model, revision=revisions.get("vision_model", MAIN))
        if encoder_sides(vision_model.config, "image_size") != config.image_size:
            resize_vision_encoder_(vision_model, config.image_size[0])
    return COTSForPreTraining.from_encoders(
        text_model,
        vision_model,
        projection_dim=config.projection_dim,
        projection_hidden_size=config.projection_hidden_size,
        standardize_features=config.standardize_features,
        image_pooling=config.image_pooling,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        temperature=config.temperature,
        image_vocab_size=num_image_tokens,
    )


def build_processor(
    config: COTSConfig,
    tokenizer: PreTrainedTokenizerBase,
    vision_model: str | None,
    revisions: Mapping[str, str] = LATEST,
) -> COTSProcessor:
    """The processor of a model: it converts images to RGB, and resizes and normalizes them for the vision encoder."""
    height, width = config.image_size
    size = {"height": height, "width": width}
    normalization = {}
    if vision_model is not None and not _is_timm(vision_model):
        given = AutoImageProcessor.from_pretrained(vision_model, revision=revisions.get("vision_model", MAIN))
        normalization = {"image_mean": given.image_mean, "image_std": given.image_std}
    image_processor = COTSImageProcessor(size=size, **normalization)
    video_processor = COTSVideoProcessor(
        size=size, image_mean=image_processor.image_mean, image_std=image_processor.image_std
    )
    return COTSProcessor(image_processor, tokenizer, video_processor)


def set_image_size(processor: COTSProcessor, config: COTSConfig) -> None:
    """Make the processor of a checkpoint resize images and videos to the image size of `config`."""
    height, width = config.image_size
    for part in (processor.image_processor, getattr(processor, "video_processor", None)):
        if part is not None:
            part.size = SizeDict(height=height, width=width)  # as the classes hold it


def build_image_tokenizer(
    name_or_path: str, processor: COTSProcessor | None, vocab_size: int, revision: str = MAIN
) -> ImageTokenizer | KMeansImageTokenizer:
    """
    The dVAE, given by id or folder, or what k-means has made of a vision encoder, by folder; for "random", a random
    codebook of `vocab_size` tokens, with a warning.

    It takes pixels that `processor` has normalized. Without a processor it takes raw pixels only.
    """
    settings = None if processor is None else processor.image_processor
    mean, std = ([0.0] * 3, [1.0] * 3) if settings is None else (settings.image_mean, settings.image_std)
    if (Path(name_or_path) / CENTERS_NAME).is_file():
        return KMeansImageTokenizer.from_pretrained(name_or_path, mean, std)
    if name_or_path != RANDOM_IMAGE_TOKENIZER:
        check_revision("image_tokenizer", name_or_path, None)
        return ImageTokenizer.from_pretrained(name_or_path, mean, std, revision)
    logger.warning(
        f"The image tokenizer is a random codebook of {vocab_size} tokens, a random-projection quantizer: its tokens "
        "are no substitute for those of the pre-trained dVAE that the paper uses (facebook/flava-image-codebook)."
    )
    return ImageTokenizer.random(vocab_size, mean, std)
