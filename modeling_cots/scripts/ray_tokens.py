"""`tokenize_with_ray`: what `examples/tokenize_images.py --ray` does on a Ray cluster."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from ..configuration_cots import COTSConfig
from ..data.image_token_cache import TokenSource
from ..data.image_token_writing import TokenWorker
from ..data.ray_data import map_to_parquet
from ..data.ray_parts import ROWS_PER_PART, SHARD_ROWS, NumberedReader, numbered_parts, read_shard_rows, shard_parts
from ..search.embedding import entry_names, row_ids_of
from .factory import MAIN, build_image_tokenizer
from .kmeans_fitting import FOLDER_NAME, KMEANS


def tokenize_with_ray(
    args: argparse.Namespace,
    config: COTSConfig,
    open_images: Callable[[], Dataset],
    dataset: Dataset | None,
    image_tokenizer,
) -> tuple[int, int]:
    """
    Write `row_id`, `name`, `pair_id`, `image_tokens` and `image_tokens_source` of every image to parquet files.

    Row ids and names are those of an index; the pair id is the one by which a stream of the images finds the tokens,
    wherever its shards are.

    Args:
        args: The options of the script.
        config: The model's, with `image_size`, `patch_size` and `image_vocab_size`.
        open_images: Opens the data set.
        dataset: The data set; `None` for addresses of shards.
        image_tokenizer: The one that the actors have to load, too.

    Returns how many images were computed, and how many there are in all. Raises `ValueError` as `map_to_parquet` does.
    """
    if dataset is None:
        if args.image_folder is not None:
            raise ValueError("image_folder is for Karpathy's form, and not for addresses: leave it out.")
        options = args.image_column, args.caption_column, args.dataset_config, args.dataset_revision
        parts = shard_parts(args.dataset, args.split, row_ids_of, *options)
        read, num_rows = read_shard_rows, SHARD_ROWS
    else:
        parts = numbered_parts(entry_names(dataset, dataset.name), row_ids_of)
        read, num_rows = NumberedReader(open_images), ROWS_PER_PART
    is_fitted = args.image_tokenizer.startswith(KMEANS)
    name = str(Path(args.output_dir, FOLDER_NAME)) if is_fitted else args.image_tokenizer
    num_gpus, revision = args.gpus_per_actor or 0, args.image_tokenizer_revision or MAIN
    load = partial(_load, name, config.image_vocab_size, revision, "cuda" if num_gpus else "cpu")
    source = TokenSource.of(image_tokenizer, config.image_size, config.patch_size)
    return map_to_parquet(
        parts,
        partial(TokenWorker, load, read, source, args.mirrored, args.batch_size, args.num_workers),
        output=args.output_dir,
        checkpoint=args.checkpoint,
        metadata=(b"cots.tokens", {"source": source.to_json(), "flipped": args.mirrored}),
        num_actors=args.actors or 1,
        gpus_per_actor=num_gpus,
        cpus_per_actor=1 + args.num_workers,
        rows_per_call=max(num_rows, args.batch_size),
    )


def _load(name: str, vocab_size: int, revision: str, device: str):
    return build_image_tokenizer(name, None, vocab_size, revision).to(device)
