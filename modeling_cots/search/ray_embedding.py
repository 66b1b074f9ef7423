"""`embed_with_ray`: embed a collection on the machines of a Ray cluster into parquet files, which `load` takes.

The files have the columns of an index's entries, and in their metadata which model made them. How they are written,
each entry once whatever is killed, is in `data/ray_data.py`.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.ray_data import map_to_parquet
from ..data.ray_parts import ROWS_PER_PART, SHARD_ROWS, NumberedReader, numbered_parts, read_shard_rows, shard_parts
from ..data.streaming.names import display_name, is_url
from .embedding import Embedder, ImageFolder, entry_names, item_of_file, row_ids_of
from .index import describe_model
from .parquet_rows import INFO_KEY
from .rows import fixed_features, join_tables

Reader = Callable[[pa.Table], list[dict]]


def embed_with_ray(
    args: argparse.Namespace,
    open_images: Callable[[argparse.Namespace], tuple[Dataset, str]],
    load_model: Callable[..., tuple],
) -> tuple[int, int]:
    """
    Embed what `args.data` names, but for what `args.checkpoint` has from an earlier run.

    Args:
        args: The options of `cots-search embed`.
        open_images: Gives the data set that `args.data` names, and the `source` of its entries.
        load_model: Loads model and processor by name, revision, backend and precision.

    Returns how many entries were written, and how many there are in all. Raises `ValueError` as `open_images`,
    `load_model` and `map_to_parquet` do.
    """
    parts, read, source = _find_parts(args, open_images)
    model, processor = load_model(args.model, args.revision, args.backend, args.dtype, torch.device("cpu"))
    info = describe_model(model, processor)
    load = partial(load_model, args.model, info["model_commit"] or args.revision, args.backend, args.dtype)
    del model, processor  # the actors load their own
    is_light = not is_url(args.data)
    worker = partial(_EmbeddingWorker, load, read, source, info, args.batch_size, args.num_workers, args.thumbnails)
    return map_to_parquet(
        parts,
        worker,
        output=args.output,
        checkpoint=args.checkpoint,
        metadata=(INFO_KEY, info),
        num_actors=args.actors,
        gpus_per_actor=args.gpus_per_actor,
        cpus_per_actor=1 + args.num_workers,
        rows_per_call=max(ROWS_PER_PART if is_light else SHARD_ROWS, args.batch_size),
    )


def _find_parts(args: argparse.Namespace, open_images) -> tuple[list, Reader, str]:
    """The parts of a collection, what reads their rows, and the `source` of its entries."""
    if is_url(args.data):
        options = args.image_column, args.caption_column, args.dataset_config, args.dataset_revision
        parts = shard_parts(args.data, args.split, row_ids_of, *options)
        return parts, read_shard_rows, f"{display_name(args.data)}[{args.split}]"
    dataset, source = open_images(args)
    names = entry_names(dataset, source)
    if isinstance(dataset, ImageFolder):
        paths = [os.fsencode(dataset.paths[number]) for number in range(len(dataset))]
        return numbered_parts(names, row_ids_of, path=paths), _read_files, source
    return numbered_parts(names, row_ids_of), NumberedReader(partial(_open_quietly, open_images, args)), source


def _open_quietly(open_images, args: argparse.Namespace) -> Dataset:
    """The data set once more, in an actor: what is odd in it has been said by the first process."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return open_images(args)[0]
    finally:
        logging.set_verbosity(verbosity)


def _read_files(rows: pa.Table) -> list[dict]:
    """The items of files in a folder."""
    return [item_of_file(os.fsdecode(path), number) for number, path in enumerate(rows["path"].to_pylist())]


class _Items(Dataset):
    """Items that are in memory, with their `metadata`."""

    def __init__(self, items: list[dict]):
        self._items = items
        self.modality = "video" if all("video" in item for item in items) else "image"

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> dict:
        return self._items[number]

    def metadata(self, number: int) -> dict:
        return self._items[number].get("metadata", {})


class _EmbeddingWorker:
    """
    Embeds rows of parts, in an actor.

    Args:
        load: Loads model and processor.
        read: Gives the items of rows.
        source: The `source` of the entries.
        info: What `describe_model` says of the model in the first process.
        batch_size, num_workers, thumbnail_side: See [`Embedder`].

    Raises `ValueError` for another model than that of the first process.
    """

    def __init__(
        self,
        load: Callable[[], tuple],
        read: Reader,
        source: str,
        info: dict,
        batch_size: int,
        num_workers: int,
        thumbnail_side: int,
    ):
        model, processor = load()
        here = describe_model(model, processor)["model_identity"]
        if here != info["model_identity"]:
            raise ValueError(
                f"The model {info['model']!r} is another one on {os.uname().nodename} ({here[:12]}) than where the "
                f"command was started ({info['model_identity'][:12]}): copy one and the same to all machines."
            )
        self._read, self._source, self._dim = read, source, info["dim"]
        self._embedder = Embedder(
            model, processor, batch_size=batch_size, num_workers=num_workers, thumbnail_side=thumbnail_side
        )

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, list[tuple[str, str]]]:
        dataset, names = _Items(self._read(rows)), rows["name"].to_pylist()
        with tqdm(disable=True) as bar:
            tables = list(self._embedder.tables(dataset, np.arange(len(names)), names, self._source, bar))
        skipped, self._embedder.skipped = self._embedder.skipped, []
        empty = fixed_features(self._dim).arrow_schema.empty_table()
        return join_tables(tables) if tables else empty, skipped
