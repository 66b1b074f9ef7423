"""Make a Hub repository of a COTS model: the whole model, or one of the two parts that hosted widgets can run.

    cots-export --model runs/photos --output_dir out/photos
    cots-export --model runs/photos --repo_id cots-photos --private true --tag v1.0
    cots-export --model runs/photos --onnx true --output_dir out/photos
    cots-export --model runs/photos --kind onnx --repo_id cots-photos-onnx
    cots-export --model runs/photos --kind text_encoder --repo_id cots-photos-text
    cots-export --model runs/photos --kind zero_shot_classifier --output_dir out/shapes \
        --labels "a red circle" "a blue star" --images PHOTOS/

The token is that of `hf auth login`, or of `HF_TOKEN`. `--output_dir` writes the repository to a folder; with
`--repo_id` it is pushed as well. `--onnx true` writes ONNX files into the repository of the model, in the same commit;
`--kind onnx` makes a repository of them alone. A card that somebody edited in the repository stays, unless
`--overwrite_card true`.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ..data.opening import open_dataset
from ..data.revisions import check_revision
from ..hub.onnx_export import export_onnx, export_sentence_onnx
from ..hub.standard_exports import export_text_encoder, export_zero_shot_classifier
from ..hub_export import CARD_NAME, check_space, copy_card_images, export_repository, link_space, rename_card
from ..hub_push import full_repo_id, push_folder
from ..image_reading_cots import UnreadableImageError, read_image
from ..modeling_cots import COTSModel
from ..processing_cots import COTSProcessor
from .command_line import parse_config_and_options

KINDS = ("model", "onnx", "text_encoder", "zero_shot_classifier")
MAX_IMAGES = 500  # for the mean length of embeddings, and for what is measured of ONNX files


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "A trained folder, a `checkpoint-*` of one, or a Hub id."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    kind: str = field(
        default="model",
        metadata={
            "help": "`model`: everything. `onnx`: both encoders as ONNX files. `text_encoder`: a standard "
            "sentence-transformers model, for the sentence-similarity widget. `zero_shot_classifier`: a standard ViT "
            "classifier of `labels`, for the image-classification widget."
        },
    )
    repo_id: str | None = field(default=None, metadata={"help": "Where to push to: `name` or `owner/name`."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Write the repository to this folder, new or empty."}
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; created if there is none."})
    tag: str | None = field(default=None, metadata={"help": "Name of this version, such as `v1.0`."})
    overwrite_card: bool = field(default=False, metadata={"help": "Replace a card in the repository that was edited."})
    onnx: bool = field(default=False, metadata={"help": "Write ONNX files into the repository as well."})
    validation_data: str | None = field(
        default=None,
        metadata={
            "help": "`scenes`, a Hub id or a folder, on whose validation split 8-bit ONNX files are measured and "
            "chosen; by default `scenes` for a model that was evaluated on these."
        },
    )
    labels: list[str] | None = field(default=None, metadata={"help": "The classes of the classifier."})
    hypothesis_template: str = field(
        default="This is a photo of {}.", metadata={"help": "The text that is embedded for a label of the classifier."}
    )
    space: str | None = field(
        default=None, metadata={"help": "A Space to try the model in, `owner/name`, which the card then links."}
    )
    images: str | None = field(
        default=None,
        metadata={"help": "A folder of typical images, to which the scores of the classifier are adjusted."},
    )


def main(argv: list[str] | None = None) -> None:
    """Read the options in `argv` (by default the command line), and do what they say."""
    (args,) = parse_config_and_options(ScriptArguments, argv=argv, description=__doc__)
    check(args)

    # 1. The model and its processor.
    try:
        version = {"revision": args.model_revision or "main"}
        model = COTSModel.from_pretrained(args.model, **version)
        processor = COTSProcessor.from_pretrained(args.model, **version)
    except (OSError, ValueError) as error:
        raise ValueError(f"No COTS model with its processor can be loaded from {args.model}: {error}") from error
    repo_id = None if args.repo_id is None else full_repo_id(args.repo_id)

    with tempfile.TemporaryDirectory() as temporary:
        # 2. The folder.
        folder = Path(temporary) if args.output_dir is None else Path(args.output_dir)
        model_id = folder.name if repo_id is None else repo_id
        if args.kind == "text_encoder":
            export_text_encoder(model, processor, folder, model_id=model_id)
            if args.onnx:
                export_sentence_onnx(model, folder, model_id=model_id)
        elif args.kind == "zero_shot_classifier":
            images = None if args.images is None else read_images(Path(args.images))
            template = {"hypothesis_template": args.hypothesis_template}
            export_zero_shot_classifier(
                model, processor, args.labels, folder, images=images, model_id=model_id, **template
            )
        elif args.kind == "onnx":
            write_onnx(args, model, processor, folder, model_id)
        else:
            # Training wrote a card into the folder, with its results and the images that it shows.
            path = Path(args.model) / "README.md"
            card = path.read_text(encoding="utf-8") if path.exists() else None
            if card is not None:
                card = rename_card(card, path.parent.name, model_id)
                copy_card_images(card, path.parent, folder)
            export_repository(model, processor, folder, card=card, model_id=model_id)
            if args.onnx:
                write_onnx(args, model, processor, folder, model_id)
        if args.space is not None:
            card_path = folder / CARD_NAME
            card_path.write_text(link_space(card_path.read_text(encoding="utf-8"), args.space), encoding="utf-8")
        if args.output_dir is not None:
            print(f"The repository is in {folder}.")

        # 3. The push.
        if repo_id is not None:
            commit = push_folder(
                folder,
                repo_id,
                private=args.private or None,
                revision=args.revision,
                tag=args.tag,
                overwrite_card=args.overwrite_card,
            )
            print(f"Pushed to {commit.repo_url}, commit {commit.oid[:8]}{f', tag {args.tag}' if args.tag else ''}.")


def check(args: ScriptArguments) -> None:
    """Raise `ValueError` for options that do not go together, before anything is loaded."""
    check_revision("model", args.model, args.model_revision)
    if args.kind not in KINDS:
        raise ValueError(f"--kind must be one of {', '.join(KINDS)}, got {args.kind!r}.")
    if args.repo_id is None and args.output_dir is None:
        raise ValueError("Say where to: --repo_id NAME to push, --output_dir FOLDER to write the repository there.")
    if args.space is not None:
        check_space(args.space)
    if args.repo_id is None and (args.private or args.revision or args.tag or args.overwrite_card):
        raise ValueError("--private, --revision, --tag and --overwrite_card concern a push: give --repo_id as well.")
    if args.output_dir is not None and Path(args.output_dir).exists() and any(Path(args.output_dir).iterdir()):
        raise ValueError(f"--output_dir {args.output_dir} is not empty, and its files would be pushed as well.")
    is_classifier = args.kind == "zero_shot_classifier"
    if is_classifier and not args.labels:
        raise ValueError('A classifier needs its classes: --labels "a red circle" "a blue star".')
    if args.onnx and args.kind not in ("model", "text_encoder"):
        raise ValueError(
            "--onnx belongs to --kind model or text_encoder; --kind onnx writes the ONNX files of a model alone."
        )
    if args.validation_data is not None and not (args.kind == "onnx" or (args.kind == "model" and args.onnx)):
        raise ValueError("--validation_data measures ONNX files: give --onnx true or --kind onnx as well.")
    if not is_classifier and (args.labels or args.images):
        raise ValueError("--labels and --images belong to --kind zero_shot_classifier.")
    if not is_classifier and args.hypothesis_template != ScriptArguments.hypothesis_template:
        raise ValueError("--hypothesis_template belongs to --kind zero_shot_classifier.")


def write_onnx(args: ScriptArguments, model: COTSModel, processor: COTSProcessor, folder: Path, model_id: str) -> None:
    """Write the ONNX files, and print what was measured of them."""
    queries = validation_queries(args, model.config.image_size[0])
    if not queries:
        print("The 8-bit ONNX files are not measured: give --validation_data for that.")
    for variant in export_onnx(model, processor, folder, **queries, model_id=model_id):
        size = (variant.text_bytes + variant.vision_bytes) / 1e6
        kept = f", same first result for {min(variant.kept):.1f} % of the queries" if queries else ""
        print(f"ONNX {variant.dtype}: {size:.1f} MB{kept}.")


def validation_queries(args: ScriptArguments, image_size: int) -> dict[str, list]:
    """`images` and `texts` of the validation data; nothing where it is neither named nor here."""
    name, record = args.validation_data, Path(args.model) / "training_record.json"
    if name is None and record.is_file():
        evaluation = json.loads(record.read_text(encoding="utf-8"))["evaluation_data"]
        name = "scenes" if evaluation is not None and evaluation["name"] == "scenes" else None
    if name is None:
        return {}
    data = open_dataset(name, "validation", image_size=image_size)
    items = [data[number] for number in range(min(len(data), MAX_IMAGES))]
    return {
        "images": [read_image(item["image"]) for item in items],
        "texts": [caption for item in items for caption in item["captions"]],
    }


def read_images(folder: Path) -> list:
    """The first images in a folder and its sub-folders; other files are skipped."""
    images = []
    for path in sorted(folder.rglob("*")):
        if len(images) == MAX_IMAGES:
            break
        try:
            images.append(read_image(path))
        except UnreadableImageError:
            continue
    if not images:
        raise ValueError(f"There is no image in {folder}.")
    return images
