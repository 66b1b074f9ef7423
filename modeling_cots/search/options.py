"""The commands and options of `cots-search`, and what can be refused before anything is imported.

The standard library alone, and nothing of the package: `cots_search.py` loads this file by its path, so that help and
a mistyped option or name need not wait for torch.
"""

import argparse
import glob
import os
import re
from typing import NoReturn

DESCRIPTION = """Index photographs and videos once, then find them by words, by an image, or by both.

    cots-search index PHOTOS/ --model MODEL --index IDX
    cots-search query IDX "a dog in the snow" --top 12 --html out.html
    cots-search query IDX --image like_this.jpg --where "year >= 2020"
    cots-search query IDX < queries.txt
    cots-search serve IDX
    cots-search add IDX MORE_PHOTOS/
    cots-search delete IDX PHOTOS/blurred.jpg
    cots-search rebuild IDX --engine hnsw
    cots-search rebuild IDX --engine ivfpq --target_recall 0.95
    cots-search embed "s3://photos/{00000..00999}.tar" --model MODEL --output s3://embeddings/photos \
        --checkpoint s3://checkpoints/photos --actors 8 --gpus_per_actor 1
    cots-search load IDX s3://embeddings/photos

MODEL is a folder or a Hub id of a model that was trained on photographs, such as runs/flickr8k_dinov2, which
examples/configs/flickr8k_dinov2.yaml trains. The model of the quick start is a toy: it knows drawn shapes alone.
IDX is a folder, a table of PostgreSQL (postgresql://user@host/database#photos, its password in PGPASSWORD or
~/.pgpass), a Milvus Lite file (photos.db) or a Milvus server (http://host:19530#photos, its token in MILVUS_TOKEN).
Several processes: `torchrun --nproc_per_node 8 -m modeling_cots.scripts.cots_search index ...`.
"""
INDEX_TYPES = "exact, hnsw, ivfpq, int8, binary, halfvec"  # those of index_types.py
BACKENDS = ("torch", "onnx", "openvino")
TORCH_DTYPES, ONNX_DTYPES = "float32, bfloat16", "float32, float16, int8"  # those of backends.py
THUMBNAIL_SIDE = 192
HOST, PORT = "127.0.0.1", 8765
MAX_TOP = 1_000
CONTINUING = ("index", "add", "embed", "load")  # the commands that go on where a stopped one was


class _Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, and takes no abbreviations of options; those of commands are alike."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. (--help lists all options.)\n")


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = _Parser(prog="cots-search", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    index = commands.add_parser("index", help="embed images and videos; run again to go on, or to add new ones")
    index.add_argument(
        "data", help="a folder of images and videos, or any data set (see docs/data.md): Hub id, file, shards"
    )
    index.add_argument("--model", required=True, help="a COTS checkpoint: folder or Hub id")
    index.add_argument("--index", required=True, help="the index to make or to continue")
    index.add_argument(
        "--engine", "--index_type", help=f"index type of a new index: {INDEX_TYPES} (exact); see docs/search.md"
    )
    add = commands.add_parser("add", help="embed more images, with the index's own model")
    add.add_argument("index", help="the index")
    add.add_argument("data", help="as for `index`")
    embed = commands.add_parser("embed", help="embed on the machines of a Ray cluster, into files for `load`")
    embed.add_argument("data", help="as for `index`, or addresses of shards (s3://photos/{00000..00999}.tar)")
    embed.add_argument("--model", required=True, help="a COTS checkpoint that all machines see: folder or Hub id")
    embed.add_argument("--output", required=True, help="folder or address to write parquet files to")
    embed.add_argument(
        "--checkpoint", required=True, help="folder or address of the ids that are written, to go on after a stop"
    )
    embed.add_argument("--actors", type=_positive, default=1, help="processes that embed, each with its model (1)")
    embed.add_argument("--gpus_per_actor", type=_gpus, default=0, help="GPUs of each; 0.5 shares one (0: on CPUs)")
    load = commands.add_parser("load", help="take what `embed` has written into an index; embeds nothing")
    load.add_argument("index", help="the index to make or to continue")
    load.add_argument("files", nargs="+", help="parquet files of `embed`: files, globs, folders or addresses")
    load.add_argument(
        "--engine", "--index_type", help=f"index type of a new index: {INDEX_TYPES} (exact); see docs/search.md"
    )
    load.add_argument(
        "--bulk_import",
        metavar="FOLDER",
        help="a folder in a Milvus server's own storage (s3://bucket/prefix), for its bulk import; see docs/scale.md",
    )
    for command in (index, add, embed):
        _add_data_options(command)
    for command in (index, add):
        command.add_argument("--restore", action="store_true", help="embed also what was deleted from the index")
    load.add_argument("--restore", action="store_true", help="take also what was deleted from the index")
    query = commands.add_parser("query", help="find images; without a text or an image, one text a line of the input")
    query.add_argument("index", help="the index")
    query.add_argument("text", nargs="?", help="what to look for")
    query.add_argument("--image", help="find images like this one, alone or with the text")
    query.add_argument(
        "--image_weight", type=_share, default=0.5, help="the image's weight beside the text, 0 to 1 (0.5)"
    )
    query.add_argument("--top", type=_positive, default=12, help="how many (12)")
    query.add_argument("--html", help="write a page of thumbnails to this file")
    serve = commands.add_parser("serve", help="keep model and index in memory, and answer a browser or JSON")
    serve.add_argument("index", help="the index")
    serve.add_argument(
        "--host", default=HOST, help=f"address to listen at ({HOST}: this machine alone; 0.0.0.0 lets everybody in)"
    )
    serve.add_argument("--port", type=_port, default=PORT, help=f"port to listen at, 0 for any that is free ({PORT})")
    delete = commands.add_parser("delete", help="remove images from the index; no file is touched")
    delete.add_argument("index", help="the index")
    delete.add_argument("names", nargs="*", help="their paths, or their names as `query` prints them")
    delete.add_argument("--yes", action="store_true", help="delete what --where finds")
    delete.add_argument("--dry-run", action="store_true", help="show what would be deleted, and delete nothing")
    for command in (query, delete):
        command.add_argument(
            "--where", action="append", metavar="CONDITION", help="'year >= 2020'; may be given several times"
        )
    rebuild = commands.add_parser("rebuild", help="change the index type and free deleted entries; embeds nothing")
    rebuild.add_argument("index", help="the index")
    rebuild.add_argument("--engine", "--index_type", help="the new index type; by default the index keeps its own")
    for command in (index, load, rebuild):
        command.add_argument(
            "--target_recall",
            type=_target,
            help="tune ivfpq, int8 or binary on the captions so that queries find this share of the ten best",
        )
    for command in (add, query, serve):
        command.add_argument("--model", help="where to load the index's model from, if it has moved")
    for command in (index, add, embed, query, serve):
        command.add_argument("--backend", choices=BACKENDS, default="torch", help="what runs the model (torch)")
        command.add_argument("--dtype", help=f"of torch {TORCH_DTYPES}; of onnx {ONNX_DTYPES}; of openvino float32")
        command.add_argument(
            "--revision",
            "--model_revision",
            help="branch, tag or commit of a model on the Hub; by default the commit that the index was made with",
        )
    return parser


def _add_data_options(command: argparse.ArgumentParser) -> None:
    """What `index`, `add` and `embed` have in common."""
    command.add_argument("--dataset_config", help="configuration of a Hub id, if it has several")
    command.add_argument("--dataset_revision", help="branch, tag or commit of a Hub id")
    command.add_argument("--split", default="train", help="split of a data set (train)")
    command.add_argument("--image_column", help="column of the images; found if not given")
    command.add_argument("--caption_column", help="column of the captions; found if not given")
    command.add_argument("--batch_size", type=_positive, default=32, help="images a forward pass (32)")
    command.add_argument("--num_workers", type=_count, default=0, help="processes that decode images (0)")
    command.add_argument(
        "--thumbnails", type=_count, default=THUMBNAIL_SIDE, help=f"pixels a side, 0 for none ({THUMBNAIL_SIDE})"
    )


def refuse_early(args: argparse.Namespace) -> None:
    """Raise `ValueError` for names of files that are not there, before anything is imported."""
    if args.command != "embed":
        is_server = is_postgres_uri(args.index) or args.index.startswith(("http://", "https://"))
        is_there = is_server or os.path.exists(args.index.partition("#")[0])
        if not is_there and args.command not in ("index", "load"):
            raise ValueError(f"There is no index in {args.index!r}: make one with `cots-search index`.")
    if args.command in ("index", "add", "embed") and args.data.startswith(("/", ".", "~")):
        if (
            not glob.has_magic(args.data)
            and "{" not in args.data
            and not os.path.exists(os.path.expanduser(args.data))
        ):
            raise ValueError(f"The data set {args.data!r} does not exist.")
    model = getattr(args, "model", None)
    if model is not None and _is_path(model) and not os.path.exists(os.path.expanduser(model)):
        raise ValueError(f"There is no COTS model in {model!r}: no such folder.")
    if getattr(args, "image", None) is not None and not os.path.isfile(args.image):
        raise ValueError(f"No such file: {args.image!r}; --image takes the path of an image on this machine.")
    if args.command == "query" and args.html is not None and args.text is None and args.image is None:
        raise ValueError("--html takes one query: give a text or --image, or leave --html out.")


def is_postgres_uri(index: str) -> bool:
    """Whether the name of an index is the address of a PostgreSQL server. Raises `ValueError` if it has a password."""
    scheme, separator, rest = index.partition("://")
    if not separator or scheme not in ("postgresql", "postgres"):
        return False
    user, at, _ = rest.rpartition("@")
    if (at and ":" in user) or re.search(r"[?&](ssl)?password=", rest):
        # A password here would show in the shell's history, in process lists and in error messages.
        raise ValueError(
            "The address of a PostgreSQL server has no password (postgresql://user@host/database#table): put it into "
            "PGPASSWORD or ~/.pgpass."
        )
    return True


def _is_path(name: str) -> bool:
    """Whether this can only be a path, and no id of a model on the Hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or os.path.isdir(name.partition("/")[0])


def go_on(words: list[str]) -> str:
    """The sentence that a stopped command ends with; `run_script` puts the command in."""
    return "To go on: {command}" if words[1:2] and words[1] in CONTINUING else "To start again: {command}"


def _positive(text: str) -> int:
    return _bounded(text, 1, "a whole number of at least 1")


def _count(text: str) -> int:
    return _bounded(text, 0, "a whole number of at least 0")


def _port(text: str) -> int:
    return _bounded(text, 0, "a port, 0 to 65535", 65_535)


def _bounded(text: str, least: int, words: str, most: float = float("inf")) -> int:
    try:
        if least <= int(text) <= most:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not {words}")


def _share(text: str) -> float:
    return _number(text, 1, "a number between 0 (the text alone) and 1")


def _target(text: str) -> float:
    words = "a share above 0 and at most 1, such as 0.95"
    if (target := _number(text, 1, words)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return target


def _gpus(text: str) -> float:
    return _number(text, float("inf"), "a number of at least 0")


def _number(text: str, most: float, words: str) -> float:
    try:
        if 0 <= float(text) <= most:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
