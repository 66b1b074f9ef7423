"""The command `cots-search`: index images, query them, add, delete.

    cots-search index PHOTOS/ --model runs/quickstart --index IDX
    cots-search query IDX "a dog in the snow" --top 12 --html out.html
    cots-search query IDX --image like_this.jpg --where "year >= 2020"
    cots-search add IDX MORE_PHOTOS/
    cots-search delete IDX PHOTOS/blurred.jpg
    cots-search rebuild IDX --engine hnsw

IDX is a folder, a Milvus Lite file (photos.db) or a Milvus server (http://host:19530#photos, its token in
MILVUS_TOKEN). Several processes: `torchrun --nproc_per_node 8 -m modeling_cots.scripts.cots_search index ...`.
"""

import argparse
import json
import os
import shlex
import sys
from contextlib import closing

from ..data.opening import open_dataset
from ..data.revisions import check_revision, refuse_version
from ..data.skip_report import and_more
from .backends import BACKENDS, ONNX_DTYPES, TORCH_DTYPES, check_backend, load_encoders
from .embedding import MAX_REPORTED, THUMBNAIL_SIDE, ImageFolder, as_image_folder, known_names, row_ids_of
from .index import SearchIndex, delete_entries, process_state
from .index_types import INDEX_TYPES
from .page import results_page
from .stores import open_store, store_exists


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="cots-search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="embed images; run again to continue, or to add new ones")
    index.add_argument("data", help="a folder of images, or any data set (see docs/training.md): Hub id, file, shards")
    index.add_argument("--model", required=True, help="a COTS checkpoint: folder or Hub id")
    index.add_argument("--index", required=True, help="the index to make or to continue")
    index.add_argument(
        "--engine", help=f"index type of a new index: {', '.join(INDEX_TYPES)} (exact); see docs/search.md"
    )
    add = commands.add_parser("add", help="embed more images, with the index's own model")
    add.add_argument("index", help="the index")
    add.add_argument("data", help="as for `index`")
    for command in (index, add):
        command.add_argument("--dataset_config", help="configuration of a Hub id, if it has several")
        command.add_argument("--dataset_revision", help="branch, tag or commit of a Hub id")
        command.add_argument("--split", default="train", help="split of a data set (train)")
        command.add_argument("--image_column", help="column of the images; found if not given")
        command.add_argument("--caption_column", help="column of the captions; found if not given")
        command.add_argument("--batch_size", type=int, default=32, help="images a forward pass (32)")
        command.add_argument("--num_workers", type=int, default=0, help="processes that decode images (0)")
        command.add_argument(
            "--thumbnails", type=int, default=THUMBNAIL_SIDE, help=f"pixels a side, 0 for none ({THUMBNAIL_SIDE})"
        )
    query = commands.add_parser("query", help="find images")
    query.add_argument("index", help="the index")
    query.add_argument("text", nargs="?", help="what to look for")
    query.add_argument("--image", help="find images like this one, alone or with the text")
    query.add_argument(
        "--image_weight", type=float, default=0.5, help="the image's weight beside the text, 0 to 1 (0.5)"
    )
    query.add_argument("--top", type=int, default=12, help="how many (12)")
    query.add_argument("--html", help="write a page of thumbnails to this file")
    delete = commands.add_parser("delete", help="remove images from the index")
    delete.add_argument("index", help="the index")
    delete.add_argument("names", nargs="*", help="their paths, or their names as `query` prints them")
    for command in (query, delete):
        command.add_argument(
            "--where", action="append", metavar="CONDITION", help="'year >= 2020'; may be given several times"
        )
    rebuild = commands.add_parser("rebuild", help="change the index type and free deleted entries; embeds nothing")
    rebuild.add_argument("index", help="the index")
    rebuild.add_argument("--engine", help="the new index type; by default the index keeps its own")
    for command in (add, query):
        command.add_argument("--model", help="where to load the index's model from, if it has moved")
    for command in (index, add, query):
        command.add_argument("--backend", choices=BACKENDS, default="torch", help="what runs the model (torch)")
        command.add_argument("--dtype", help=f"of torch {', '.join(TORCH_DTYPES)}; of onnx {', '.join(ONNX_DTYPES)}")
        command.add_argument(
            "--revision",
            "--model_revision",
            help="branch, tag or commit of a model on the Hub; by default the commit that the index was made with",
        )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command, of `argv` or of the command line. Raises `ValueError` for what the user can correct."""
    args = build_parser().parse_args(argv)
    commands = {"index": run_index, "add": run_add, "query": run_query, "delete": run_delete, "rebuild": run_rebuild}
    commands[args.command](args)


def run_index(args: argparse.Namespace) -> None:
    """Make the index, or continue it."""
    dataset, source = open_images(args)
    state = process_state()
    is_new = not store_exists(args.index)
    state.wait_for_everyone()  # no process makes the index before all have looked
    model, processor = load_model(
        *((args.model, args.revision) if is_new else model_of(args)), args.backend, args.dtype
    )
    if state.is_main_process and is_new:
        SearchIndex.create(args.index, model, processor, engine=args.engine or "exact").close()
    state.wait_for_everyone()
    with SearchIndex(args.index, model, processor) as index:
        if args.engine not in (None, engine := index.store.info["engine"]):
            raise ValueError(
                f"{args.index!r} has the index type {engine!r}: change it with `cots-search rebuild {args.index} "
                f"--engine {args.engine}`."
            )
        add_images(index, dataset, source, args)
    process_state().destroy_process_group()  # else gloo's threads may abort a process at its exit


def run_add(args: argparse.Namespace) -> None:
    """Embed more images into an existing index."""
    dataset, source = open_images(args)
    with open_index(args) as index:
        add_images(index, dataset, source, args)
    process_state().destroy_process_group()  # else gloo's threads may abort a process at its exit


def run_query(args: argparse.Namespace) -> None:
    """Print the images found, and write the page."""
    with open_index(args) as index:
        hits = index.search(args.text, args.image, image_weight=args.image_weight, top=args.top, where=args.where)
        num_images = len(index)
    for place, hit in enumerate(hits, start=1):
        caption = f'  "{hit["captions"][0]}"' if hit["captions"] else ""
        print(f"{place:3}. {hit['score']:6.3f}  {hit['name']}{caption}")
    if not hits:
        print("Nothing fits.")
    if gone := [hit for hit in hits if os.path.isabs(hit["name"]) and not os.path.exists(hit["name"])]:
        print(
            f"{len(gone)} of these images are no longer at their paths: if {gone[0]['source']} has moved, index the "
            f"folder at its new place, and remove the old entries by cots-search delete {args.index} --where "
            f"{shlex.quote(_condition_on_source(gone[0]['source']))}",
            file=sys.stderr,
        )
    if args.html:
        asked = " and ".join(([f"“{args.text}”"] if args.text else []) + ([f"{args.image}"] if args.image else []))
        note = f"{len(hits)} of {num_images:,} images" + (f", where {' and '.join(args.where)}" if args.where else "")
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(results_page(f"Images for {asked}", hits, note))
        print(f"The page is in {args.html}.")


def run_delete(args: argparse.Namespace) -> None:
    """Remove images from the index; this needs no model."""
    with closing(open_store(args.index)) as store:
        names = [known_names(name) for name in args.names]
        is_there = [store.has(row_ids_of(known)).any() for known in names]
        all_names = [name for known in names for name in known]
        print(f"Deleted {delete_entries(store, all_names, args.where):,} images; {len(store):,} are left.")
    unknown = [name for name, found in zip(args.names, is_there, strict=True) if not found]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(names)} names are not in the index ({and_more(unknown, MAX_REPORTED)}): give the "
            "names as `cots-search query` prints them."
        )


def _condition_on_source(source: str) -> str:
    """The condition that all entries of a source satisfy."""
    return f"source == {json.dumps(source, ensure_ascii=False)}"


def run_rebuild(args: argparse.Namespace) -> None:
    """Change the index type; this needs no model."""
    with closing(open_store(args.index)) as store:
        store.rebuild(args.engine or store.info["engine"])
        print(f"{args.index} has the index type {store.info['engine']!r} and {len(store):,} images.")


def open_images(args: argparse.Namespace):
    """The data set that `data` names, and the `source` that its entries get."""
    if as_image_folder(args.data) is not None:
        refuse_version(args.data, args.dataset_config, args.dataset_revision)
        dataset = ImageFolder(args.data)
        return dataset, dataset.name
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    version = {"dataset_config": args.dataset_config, "revision": args.dataset_revision}
    dataset = open_dataset(args.data, args.split, **columns, **version, keep_uncaptioned=True)
    place = os.path.realpath(args.data) if os.path.exists(args.data) else args.data
    # Rows of another configuration or revision have the same numbers, and are other images.
    place += "".join(
        f"{mark}{value}" for mark, value in ((":", args.dataset_config), ("@", args.dataset_revision)) if value
    )
    return dataset, f"{place}[{args.split}]"


def add_images(index: SearchIndex, dataset, source: str, args: argparse.Namespace) -> None:
    """Embed the new images, and print how many these were."""
    num_added = index.add(
        dataset,
        source=source,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        thumbnail_side=args.thumbnails,
    )
    if process_state().is_main_process:
        print(f"Added {num_added:,} images; {args.index} has {len(index):,}.")


def open_index(args: argparse.Namespace) -> SearchIndex:
    """The index with its model, loaded from the index's own record or from `--model`."""
    return SearchIndex(args.index, *load_model(*model_of(args), args.backend, args.dtype))


def model_of(args: argparse.Namespace) -> tuple[str, str | None]:
    """Where the index's model is, and at which revision: as the options say, or else as the index has recorded."""
    with closing(open_store(args.index)) as store:
        info = store.info
    name = args.model or info["model"]
    return name, args.revision or (info.get("model_commit") if name == info["model"] else None)


def load_model(name: str, revision: str | None = None, backend: str = "torch", dtype: str | None = None) -> tuple:
    """Load model and processor of one revision, the model onto this process's device."""
    check_revision("model", name, revision)
    check_backend(backend, dtype)
    try:
        return load_encoders(name, revision, process_state().device, backend, dtype)
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at the revision {revision!r}"
        raise ValueError(f"There is no COTS model in {name!r}{at}; name one with --model. ({error})") from error
