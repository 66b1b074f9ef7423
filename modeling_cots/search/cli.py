"""The commands of `cots-search`: index images, query them, serve them, add, delete, rebuild. Options: `options.py`.

What can be refused is refused before a model is loaded, and what a command does not need is not imported.
"""

import argparse
import importlib.util
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing

import torch

from ..data.revisions import check_revision, refuse_version
from ..data.skip_report import and_more
from ..image_reading_cots import read_image
from .backends import check_backend, load_encoders
from .conditions import as_conditions
from .embedding import MAX_REPORTED, ImageFolder, as_image_folder, check_text, known_names, row_ids_of
from .index import SearchIndex, chosen_entries, process_state, state_notes, target_to_reach, tune_by_vectors
from .index_types import FAISS, check_index_type
from .milvus_store import is_milvus_server
from .options import build_parser
from .page import results_page
from .stores import check_can_create, check_can_tune, create_store, open_store, store_exists

WORTH_AN_IMPORT = 100_000  # images; docs/scale.md has what was measured


def main(argv: list[str] | None = None) -> None:
    """Run one command, of `argv` or of the command line. Raises `ValueError` for what the user can correct."""
    run(build_parser().parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Run one command with its options."""
    commands = {
        "index": run_index,
        "add": run_add,
        "query": run_query,
        "serve": run_serve,
        "delete": run_delete,
        "rebuild": run_rebuild,
        "embed": run_embed,
        "load": run_load,
    }
    commands[args.command](args)


def run_index(args: argparse.Namespace) -> None:
    """Make the index, or continue it."""
    is_new = not store_exists(args.index)
    if is_new:
        _check_new(args)
    else:
        _check_engine(args)
    dataset, source = open_images(args)
    state = process_state()
    state.wait_for_everyone()  # no process makes the index before all have looked
    name, revision = (args.model, args.revision) if is_new else model_of(args)
    model, processor = load_model(name, revision, args.backend, args.dtype)
    if state.is_main_process and is_new:
        options = {"engine": args.engine or "exact", "target_recall": args.target_recall}
        SearchIndex.create(args.index, model, processor, **options).close()
    state.wait_for_everyone()
    with SearchIndex(args.index, model, processor) as index:
        add_images(index, dataset, source, args)
    process_state().destroy_process_group()  # else gloo's threads may abort a process at its exit


def _check_new(args: argparse.Namespace) -> None:
    """Raise `ValueError` where no such index can be made."""
    check_can_create(args.index, args.engine or "exact")
    if args.target_recall is not None:
        check_can_tune(args.index, args.engine or "exact", args.target_recall)


def _check_engine(args: argparse.Namespace) -> None:
    """Raise `ValueError` for another index type or target of recall than those that the index has."""
    with closing(open_store(args.index)) as store:
        engine, target = store.info["engine"], store.info.get("target_recall")
    if args.engine not in (None, engine):
        raise ValueError(
            f"{args.index!r} has the index type {engine!r}: change it with `cots-search rebuild {args.index} "
            f"--engine {args.engine}`."
        )
    if args.target_recall not in (None, target):
        check_can_tune(args.index, engine, args.target_recall)
        has = "no target of recall" if target is None else f"the target of recall {target}"
        raise ValueError(
            f"{args.index!r} has {has}: change it with `cots-search rebuild {args.index} --target_recall "
            f"{args.target_recall}`."
        )


def run_add(args: argparse.Namespace) -> None:
    """Embed more images into an existing index."""
    open_store(args.index).close()
    dataset, source = open_images(args)
    with open_index(args) as index:
        add_images(index, dataset, source, args)
    process_state().destroy_process_group()  # else gloo's threads may abort a process at its exit


def run_query(args: argparse.Namespace) -> None:
    """Print the images found, and write the page; without a text and an image, answer the lines of the input."""
    with closing(open_store(args.index)) as store:
        _refuse_query(args, store)
        if len(store) == 0:
            print("\n".join(state_notes(store, args.index)))
            return
    with open_index(args) as index:
        for note in state_notes(index.store, args.index):
            print(note, file=sys.stderr)
        if args.text is None and args.image is None:
            _answer_lines(index, args)
        else:
            _answer(index, args.text, args)


def _refuse_query(args: argparse.Namespace, store) -> None:
    """Raise `ValueError` for what no model is needed to refuse."""
    if args.text is not None:
        check_text(args.text)
    if args.image is not None:
        read_image(args.image)
    if args.where and len(store):
        store.find(as_conditions(args.where))


def _answer_lines(index: SearchIndex, args: argparse.Namespace) -> None:
    """Answer each line of the standard input as it comes. Raises `ValueError` at the end if any was refused."""
    num_lines = num_refused = 0
    for line in _lines():
        num_lines += 1
        print(f"{line}:")
        try:
            _answer(index, line, args)
        except ValueError as error:
            num_refused += 1
            print(error, file=sys.stderr)
        sys.stdout.flush()  # for a program that waits for the answer before it asks again
    if num_lines == 0:
        raise ValueError("There is no query: give a text or --image, or one text a line of the standard input.")
    if num_refused:
        raise ValueError(f"{num_refused:,} of {num_lines:,} queries were refused.")


def _lines() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="backslashreplace")  # a line that is not UTF-8 costs no other line
    if sys.stdin.isatty():
        print("One query a line; Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _is_file_of(hit: dict) -> bool:
    """Whether the name of a hit is a path in the folder that was indexed; a data set's items have other names."""
    return os.path.isabs(hit["source"]) and hit["name"].startswith(os.path.join(hit["source"], ""))


def _answer(index: SearchIndex, text: str | None, args: argparse.Namespace) -> None:
    """Search for one query, and print what is found."""
    hits = index.search(text, args.image, image_weight=args.image_weight, top=args.top, where=args.where)
    if text is not None and (note := index.words_note(text)):
        print(note, file=sys.stderr)
    for place, hit in enumerate(hits, start=1):
        caption = f'  "{hit["captions"][0]}"' if hit["captions"] else ""
        copies = f"  (copies: {and_more(hit['copies'], MAX_REPORTED)})" if hit["copies"] else ""
        print(f"{place:3}. {hit['score']:6.3f}  {hit['name']}{caption}{copies}")
    if not hits:
        print("Nothing fits.")
    if gone := [hit for hit in hits if _is_file_of(hit) and not os.path.exists(hit["name"])]:
        print(
            f"{len(gone)} of these images are no longer at their paths: if {gone[0]['source']} has moved, index the "
            f"folder at its new place, and remove the old entries by cots-search delete {args.index} --where "
            f"{shlex.quote(_condition_on_source(gone[0]['source']))} --yes",
            file=sys.stderr,
        )
    if args.html:
        asked = " and ".join(([f"“{text}”"] if text else []) + ([f"{args.image}"] if args.image else []))
        note = f"{len(hits)} of {len(index):,} images" + (f", where {' and '.join(args.where)}" if args.where else "")
        with open(args.html, "w", encoding="utf-8") as file:
            file.write(results_page(f"Images for {asked}", hits, note))
        print(f"The page is in {args.html}.")


def run_serve(args: argparse.Namespace) -> None:
    """Answer over HTTP until Ctrl-C, with model and index in memory."""
    from .server import SearchServer

    open_store(args.index).close()
    with SearchServer(args.host, args.port) as server, open_index(args) as index:
        server.answer_from(index, args.index)
        try:
            for note in state_notes(index.store, args.index):
                print(note, file=sys.stderr)
            print(f"{args.index} ({len(index):,} images) is at {server.address} (JSON: {server.address}/search).")
            print("Ctrl-C ends it.", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("Ended.", file=sys.stderr)


def run_delete(args: argparse.Namespace) -> None:
    """Remove images from the index; this needs no model."""
    with closing(open_store(args.index)) as store:
        names = [known_names(name) for name in args.names]
        is_there = [store.has(row_ids_of(known)).any() for known in names]
        row_ids = chosen_entries(store, [name for known in names for name in known], args.where)
        found = store.names_of(row_ids)
        if args.dry_run:
            print("\n".join(found), end="\n" if found else "")
            print(f"These {len(found):,} of {len(store):,} images would be deleted; nothing is.")
        elif args.where and found and not args.yes:
            raise ValueError(
                f"--where finds {len(found):,} of {len(store):,} images ({and_more(found, MAX_REPORTED)}): nothing is "
                "deleted. Add --yes to delete them, or --dry-run to see them all."
            )
        else:
            print(f"Deleted {store.delete(row_ids):,} images; {len(store):,} are left.")
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
    """Change the index type or the target of recall; this needs a model for the latter alone."""
    with closing(open_store(args.index)) as store:
        engine = args.engine or store.info["engine"]
        if args.target_recall is not None:
            check_index_type(engine, FAISS)
            check_can_tune(args.index, engine, args.target_recall)
        store.rebuild(engine)
        print(f"{args.index} has the index type {store.info['engine']!r} and {len(store):,} images.")
        target = target_to_reach(store) if args.target_recall is None else args.target_recall
        if target is not None:
            print(_tune(args, store, target))


def _tune(args: argparse.Namespace, store, target: float) -> str:
    """Reach a target of recall, by captions if the index's model can be loaded; returns a sentence about it."""
    info = store.info
    try:
        loaded = load_model(info["model"], info.get("model_commit"))
        index = SearchIndex(args.index, *loaded)
    except ValueError:
        return tune_by_vectors(store, target, f"its model {info['model']!r} cannot be loaded")
    with index:
        return index.tune(target)


def run_embed(args: argparse.Namespace) -> None:
    """Embed on the machines of a Ray cluster, into parquet files."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("`embed` needs Ray: pip install 'modeling_cots[ray]'.")
    from .ray_embedding import embed_with_ray

    num_added, num_all = embed_with_ray(args, open_images, load_model)
    print(f"Embedded {num_added:,} images; {args.output} has {num_all:,}.")
    print(f"Take them into an index by `cots-search load IDX {shlex.quote(args.output)}`.")


def run_load(args: argparse.Namespace) -> None:
    """Take what `embed` has written into an index; this needs no model."""
    from .parquet_rows import check_same_model, load_files, open_files, read_info

    is_server = is_milvus_server(args.index)
    if args.bulk_import is not None and not is_server:
        raise ValueError(
            f"--bulk_import is of a Milvus server (http://...), and {args.index!r} is none: leave it out."
        )
    files = open_files(args.files)
    info = read_info(files)
    if is_server and args.bulk_import is None and sum(file.num_rows for file in files) >= WORTH_AN_IMPORT:
        print(
            "Images are inserted. A Milvus server takes so many faster by its bulk import, from a folder of its "
            "storage: --bulk_import s3://bucket/prefix (docs/scale.md)."
        )
    if not store_exists(args.index):
        _check_new(args)
        target = {} if args.target_recall is None else {"target_recall": args.target_recall}
        create_store(args.index, {**info, **target}, args.engine or "exact").close()
    else:
        _check_engine(args)
    with closing(open_store(args.index)) as store:
        check_same_model(args.index, store.info, files)
        num_added = load_files(store, files, restore=args.restore, bulk_import=args.bulk_import)
        print(f"Added {num_added:,} images; {args.index} has {len(store):,}.")
        if (target_recall := target_to_reach(store)) is not None:
            print(_tune(args, store, target_recall))


def open_images(args: argparse.Namespace):
    """The data set that `data` names, and the `source` that its entries get."""
    if as_image_folder(args.data, args.split) is not None:
        refuse_version(args.data, args.dataset_config, args.dataset_revision)
        # Of several processes the main one lists the folder, when it comes to adding.
        dataset = ImageFolder(args.data, list_now=process_state().num_processes == 1)
        return dataset, dataset.name
    # Data sets take seconds to import, which no other command needs.
    from ..data.files import names_videos
    from ..data.msrvtt import is_msrvtt
    from ..data.opening import open_dataset
    from ..data.videos import open_videos

    if is_msrvtt(args.data) or names_videos(args.data, args.split):
        refuse_version(args.data, args.dataset_config, args.dataset_revision)
        dataset = open_videos(
            args.data,
            args.split,
            video_column=args.image_column,
            caption_column=args.caption_column,
            keep_uncaptioned=True,
        )
    else:
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
    try:
        num_added = index.add(
            dataset,
            source=source,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            thumbnail_side=args.thumbnails,
            restore=args.restore,
        )
    except KeyboardInterrupt:
        if process_state().is_main_process:
            print("\n".join(["", *state_notes(index.store, args.index)]), file=sys.stderr)
        raise
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


def load_model(
    name: str,
    revision: str | None = None,
    backend: str = "torch",
    dtype: str | None = None,
    device: torch.device | None = None,
) -> tuple:
    """Load model and processor of one revision, the model onto a device, by default this process's."""
    check_revision("model", name, revision)
    check_backend(backend, dtype)
    try:
        return load_encoders(name, revision, device or process_state().device, backend, dtype)
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at the revision {revision!r}"
        raise ValueError(f"There is no COTS model in {name!r}{at}; name one with --model. ({error})") from error
