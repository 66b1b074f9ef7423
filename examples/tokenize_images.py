"""Compute the image tokens of a data set once, so that pre-training need not run the dVAE at every step.

    python examples/tokenize_images.py PHOTOS/ --output_dir photos_tokenized
    python examples/run_pretraining.py --dataset photos_tokenized --min_crop_scale 1 --eval_dataset PHOTOS/ ...

PHOTOS/ is anything that run_pretraining.py opens without --streaming, `scenes` included. The script writes parquet
files with the unchanged images, their captions, and their tokens, 2 bytes for each patch. Pre-training uses the tokens
if they fit, and refuses them otherwise: they are those of the whole image, so that images must not be cropped, and
belong to one image tokenizer, image size and patch size. With --without_images it writes the ids of the images and
their tokens alone, and a stream of the same images takes them by `--streaming --image_tokens photos_tokenized`. After
an interruption, run the same command again: it writes what is missing.

With --ray the actors of a Ray cluster share the images, and the files hold ids, names and tokens alone. PHOTOS/ may
then also be addresses of shards:

    python examples/tokenize_images.py "s3://photos/{00000..00999}.tar" --output_dir s3://tokens/photos \
        --ray --checkpoint s3://checkpoints/tokens --actors 8 --gpus_per_actor 1

Without the dVAE's weights take `--image_tokenizer kmeans:MODEL`: k-means over the patch features of a vision encoder,
whose centers are saved in photos_tokenized/image_tokenizer.
"""

import argparse
import importlib.util
import shlex
from functools import partial

import torch
from torch.utils.data import Dataset

from modeling_cots import COTSConfig, ImageTokenizer
from modeling_cots.data.image_token_writing import TokenWriter
from modeling_cots.data.opening import open_dataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.data.streaming.names import is_url
from modeling_cots.method.kmeans_tokenizer import KMeansImageTokenizer
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.factory import MAIN, build_config, build_image_tokenizer
from modeling_cots.scripts.kmeans_fitting import KMEANS, VOCAB_SIZE, find_or_fit
from modeling_cots.scripts.plain_parser import PlainParser


def main() -> None:
    parser = PlainParser(__doc__)
    parser.add_argument("dataset", help="scenes, a Hub id, a folder or a file, as run_pretraining.py takes it")
    parser.add_argument("--output_dir", required=True, help="folder to write to")
    parser.add_argument("--dataset_config", help="configuration of a Hub id, if it has several")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--image_folder", help="images of a Karpathy file, if they are not beside it")
    parser.add_argument("--image_column", help="found if not given")
    parser.add_argument("--caption_column", help="found if not given")
    parser.add_argument("--model", help="a COTS checkpoint whose image and patch size to take")
    parser.add_argument("--model_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--model_config", help="or a JSON file of COTSConfig fields; by default the paper's, 384 and 16"
    )
    parser.add_argument("--vision_model", help="or a pre-trained vision encoder, as in training")
    parser.add_argument("--vision_model_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--image_size", type=int, help="side of the images, if not that of the model, as in training")
    parser.add_argument(
        "--image_tokenizer",
        default="facebook/flava-image-codebook",
        help="Hub id or folder of the dVAE; kmeans:MODEL, fitted to the data and saved in output_dir; or random",
    )
    parser.add_argument("--image_tokenizer_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--mirrored", action="store_true", help="also of flipped images, for horizontal_flip")
    parser.add_argument(
        "--without_images", action="store_true", help="write ids and tokens alone, for --streaming --image_tokens"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--ray", action="store_true", help="compute on a Ray cluster, and write no images")
    parser.add_argument("--checkpoint", help="with --ray: folder or address of the ids that are written")
    parser.add_argument("--actors", type=int, help="with --ray: processes that compute (1)")
    parser.add_argument("--gpus_per_actor", type=float, help="with --ray: GPUs of each (0: on CPUs)")
    parser.add_argument("--device", help="without --ray; by default the GPU if there is one")
    args = parser.parse_args()
    if args.model is not None and (args.model_config is not None or args.vision_model is not None):
        parser.error("--model is a whole checkpoint: leave out --model_config and --vision_model, or --model.")
    if args.ray != (args.checkpoint is not None):
        parser.error("--ray and --checkpoint belong together: give both, or neither.")
    if is_url(args.dataset) and not args.ray:
        parser.error("Shards at addresses are read with --ray alone: add it, or name files on this machine.")
    if args.ray and importlib.util.find_spec("ray") is None:
        parser.error("--ray needs Ray: pip install 'modeling_cots[ray]'.")
    if args.ray and args.without_images:
        parser.error("--ray writes no images in any case: leave --without_images out.")
    if args.ray and args.device is not None:
        parser.error("--device is for one machine: with --ray give --gpus_per_actor, or nothing for CPUs.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not args.ray and (args.actors, args.gpus_per_actor) != (None, None):
        parser.error("--actors and --gpus_per_actor are for --ray: add it, or leave them out.")
    check_revision("model", args.model, args.model_revision)
    check_revision("vision_model", args.vision_model, args.vision_model_revision)
    check_revision("image_tokenizer", args.image_tokenizer, args.image_tokenizer_revision)

    # 1. The sizes, the tokenizer, the data.
    revisions = {"model": args.model_revision or MAIN, "vision_model": args.vision_model_revision or MAIN}
    config = build_config(
        args.model, args.model_config, None, args.vision_model, revisions, image_size=args.image_size
    )
    columns = {
        name: getattr(args, name) for name in ("image_folder", "image_column", "caption_column", "dataset_config")
    }
    open_images = partial(
        open_dataset,
        args.dataset,
        args.split,
        image_size=config.image_size[0],
        revision=args.dataset_revision,
        **columns,
    )
    dataset = None if is_url(args.dataset) else open_images()
    image_tokenizer = build(args, config, dataset)

    # 2. The tokens.
    if args.ray:
        from modeling_cots.scripts.ray_tokens import tokenize_with_ray

        num_written, num_all = tokenize_with_ray(args, config, open_images, dataset, image_tokenizer)
        print(f"Computed the tokens of {num_written:,} images; {args.output_dir} has {num_all:,}.")
        return
    writer = TokenWriter(
        image_tokenizer.to(args.device),
        config.image_size,
        config.patch_size,
        flipped=args.mirrored,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        with_images=not args.without_images,
    )
    paths = writer.write(dataset, args.output_dir, args.split.split("[")[0])

    # 3. What to do with them.
    print(f"{len(dataset):,} images with their tokens are in {len(paths)} files of {args.output_dir}.")
    data = f"--dataset {shlex.quote(args.dataset)} --streaming --image_tokens" if args.without_images else "--dataset"
    print(f"Train with `{data} {args.output_dir} --min_crop_scale 1`.")


def build(
    args: argparse.Namespace, config: COTSConfig, dataset: Dataset | None
) -> ImageTokenizer | KMeansImageTokenizer:
    revision = args.image_tokenizer_revision or MAIN
    if not args.image_tokenizer.startswith(KMEANS):
        return build_image_tokenizer(args.image_tokenizer, None, config.image_vocab_size, revision)
    if dataset is None or is_url(args.output_dir):
        raise ValueError(
            f"{args.image_tokenizer} is fitted to a data set on this machine, and saved in a folder of it: run this "
            "command without --ray on some of the images first, and name its folder as --image_tokenizer."
        )
    raw = [0.0] * 3, [1.0] * 3  # of pixels that nothing has normalized
    return find_or_fit(
        args.image_tokenizer,
        dataset,
        config,
        VOCAB_SIZE,
        *raw,
        args.output_dir,
        revision=revision,
        device=args.device,
    )


if __name__ == "__main__":
    run_script(main, go_on="To write what is missing: {command}")
