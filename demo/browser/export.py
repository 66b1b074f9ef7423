"""Write a page that searches images in the browser, without a server, and push it as a static Space.

    python demo/browser/export.py --model runs/quickstart --images scenes --output_dir out/page
    python demo/browser/export.py --model you/cots-quickstart --images PHOTOS/ --repo_id you/cots-quickstart-search

`python -m http.server --directory out/page` shows the page on http://localhost:8000. By default it fetches
onnxruntime-web from a CDN; with `--runtime node_modules` it asks nobody but its own host:

    npm install --ignore-scripts onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from modeling_cots import COTSModel, COTSProcessor, export_browser_demo
from modeling_cots.data.opening import open_dataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.hub_push import full_repo_id
from modeling_cots.scripts.command_line import parse_config_and_options
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.search.browser_demo import CPU_DTYPES, download_sizes, push_browser_demo
from modeling_cots.search.embedding import ImageFolder, as_image_folder

SCENE_SIDE = 256  # at which the generated images are drawn and shown


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "A trained folder, or a Hub id."})
    images: str = field(metadata={"help": "A folder of images, or any data set (see docs/data.md): Hub id, file."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    split: str = field(default="validation", metadata={"help": "Split of a data set."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub id, if it has several."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a data set."})
    output_dir: str | None = field(default=None, metadata={"help": "Write the page to this folder, new or empty."})
    repo_id: str | None = field(default=None, metadata={"help": "Push it as this Space: `name` or `owner/name`."})
    private: bool = field(default=False, metadata={"help": "Make the Space private."})
    title: str = field(default="Search images", metadata={"help": "The page's headline."})
    examples: list[str] | None = field(
        default=None, metadata={"help": "Queries to click on; by default some captions of the images."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "`float32`: as in Python. `int8`: a quarter of the download, and faster on a CPU."},
    )
    runtime: str | None = field(
        default=None, metadata={"help": "A `node_modules` whose runtime becomes a part of the page."}
    )


def main() -> None:
    (args,) = parse_config_and_options(ScriptArguments)
    if args.repo_id is None and args.output_dir is None:
        raise ValueError("Say where to: --repo_id NAME to push, --output_dir FOLDER to write the page there.")
    if args.repo_id is None and args.private:
        raise ValueError("--private concerns a push: give --repo_id as well.")
    check_revision("model", args.model, args.model_revision)

    # 1. The model, its processor and the images.
    try:
        version = {"revision": args.model_revision or "main"}
        model = COTSModel.from_pretrained(args.model, **version)
        processor = COTSProcessor.from_pretrained(args.model, **version)
    except (OSError, ValueError) as error:
        raise ValueError(f"No COTS model with its processor can be loaded from {args.model}: {error}") from error
    images = open_images(args)
    repo_id = None if args.repo_id is None else full_repo_id(args.repo_id)

    with tempfile.TemporaryDirectory() as temporary:
        # 2. The page.
        folder = Path(temporary, "page") if args.output_dir is None else Path(args.output_dir)
        options = {"dtype": args.dtype, "runtime": args.runtime, "title": args.title, "examples": args.examples}
        export_browser_demo(model, images, folder, processor=processor, **options)
        size = download_sizes(json.loads((folder / "demo.json").read_text(encoding="utf-8")))["wasm"] / 1e6
        smaller = "" if args.dtype == CPU_DTYPES[-1] else f"; with --dtype {CPU_DTYPES[-1]} it is smaller"
        print(f"A first visit downloads {size:.1f} MB{smaller}.")
        if args.output_dir is not None:
            print(f"The page is in {folder}: python -m http.server --directory {folder}")

        # 3. The push.
        if repo_id is not None:
            commit = push_browser_demo(folder, repo_id, private=args.private or None)
            print(f"Pushed to {commit.repo_url}, commit {commit.oid[:8]}.")
            print(f"The model's card links it after: push_to_hub.py --model ... --space {repo_id}")


def open_images(args: ScriptArguments):
    """The folder or data set that `images` names."""
    if as_image_folder(args.images) is not None:
        return ImageFolder(args.images)
    version = {"dataset_config": args.dataset_config, "revision": args.dataset_revision}
    return open_dataset(args.images, args.split, image_size=SCENE_SIDE, keep_uncaptioned=True, **version)


if __name__ == "__main__":
    run_script(main)
