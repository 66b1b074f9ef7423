"""Rank the pairs of a data set by momentum similarity: which captions do not belong to their images?

    python examples/visualize_filter.py PHOTOS/ --model runs/mine/checkpoint-900 --output_dir scores

PHOTOS/ is anything that run_pretraining.py takes, `scenes` included. Writes contact_sheet.jpg (lowest, middle and
highest scores with their captions), histogram.png (all scores and the threshold of the adaptive momentum filter) and
scores.parquet (every pair with its score, and whether the filter keeps it), to clean the data set with.
"""

import os

from accelerate import Accelerator
from transformers import AutoProcessor

from modeling_cots.data.opening import open_dataset
from modeling_cots.evaluation.pair_scores import PairScores, load_scoring_model, score_pairs, write_scores
from modeling_cots.image_reading_cots import read_image
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.plain_parser import PlainParser
from modeling_cots.training.arguments import FILTER_NUM_STD, FILTER_RULES
from modeling_cots.visualization.figures import new_figure
from modeling_cots.visualization.score_figures import band_positions, draw_contact_sheet, draw_histogram


def main() -> None:
    parser = PlainParser(__doc__)
    parser.add_argument("dataset", help="scenes, a Hub id, a folder or a file, as run_pretraining.py takes it")
    parser.add_argument("--model", default="runs/quickstart", help="checkpoint-*, or any COTS checkpoint")
    parser.add_argument("--revision", "--model_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--dataset_config", help="configuration of a Hub id, if it has several")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--image_column", help="found if not given")
    parser.add_argument("--caption_column", help="found if not given")
    parser.add_argument("--filter_rule", choices=FILTER_RULES, default="deviation", help="as in training")
    parser.add_argument("--num_std", type=float, help="k of the threshold mean - k * std, 2 if not given")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output_dir", default="scores", help="folder to write to")
    args = parser.parse_args()
    if args.num_std is not None and not args.num_std >= 0:
        parser.error(f"--num_std must not be negative, got {args.num_std}.")
    if args.num_std is not None and args.filter_rule == "mixture":
        parser.error("--num_std belongs to --filter_rule deviation: leave it out.")
    num_std = None if args.filter_rule == "mixture" else FILTER_NUM_STD if args.num_std is None else args.num_std
    new_figure(1, 1)  # without matplotlib stop here, before the work

    # 1. The model and the data.
    accelerator = Accelerator()
    model, description = load_scoring_model(args.model, args.revision)
    processor = AutoProcessor.from_pretrained(args.model, revision=args.revision or "main")
    columns = {"image_column": args.image_column, "caption_column": args.caption_column}
    version = {"dataset_config": args.dataset_config, "revision": args.dataset_revision}
    dataset = open_dataset(args.dataset, args.split, image_size=model.config.image_size[0], **columns, **version)
    accelerator.print(f"Pairs are scored by {description}.")

    # 2. The scores, on every process; the first process does the rest.
    pairs = score_pairs(
        model.to(accelerator.device),
        dataset,
        processor,
        accelerator,
        batch_size=args.batch_size,
        max_text_length=processor.tokenizer.model_max_length,
        num_std=num_std,
    )
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    os.makedirs(args.output_dir, exist_ok=True)
    scores_path = os.path.join(args.output_dir, "scores.parquet")
    write_scores(scores_path, dataset, pairs, {"model": description, "dataset": args.dataset, "split": args.split})

    # 3. The images.
    draw_contact_sheet(pairs_of_bands(dataset, pairs), pairs.threshold).savefig(
        os.path.join(args.output_dir, "contact_sheet.jpg"), dpi=80, pil_kwargs={"quality": 85}
    )
    rule = "the mixture's" if num_std is None else f"mean − {num_std:g} std"
    histogram = draw_histogram(pairs.scores, pairs.threshold, rule)
    histogram.savefig(os.path.join(args.output_dir, "histogram.png"), dpi=100)

    # 4. The summary.
    num_dropped = int((~pairs.keep).sum())
    print(f"{num_dropped:,} of {len(pairs.scores):,} pairs score below the threshold {pairs.threshold:.4f}.")
    if pairs.num_skipped_images > 0:
        print(f"{pairs.num_skipped_images:,} images could not be read and are left out.")
    print(f"All scores are in {scores_path}, the images beside it.")


def pairs_of_bands(dataset, pairs: PairScores) -> dict[str, list[tuple]]:
    """For each band of scores the (image, caption, score) triples that the contact sheet shows."""
    order = pairs.scores.argsort(stable=True).tolist()
    bands = {}
    for band, places in band_positions(len(order)).items():
        bands[band] = []
        for row in (order[place] for place in places):
            item = dataset[int(pairs.pair_ids[row])]
            caption = item["captions"][int(pairs.caption_numbers[row])]
            bands[band].append((read_image(item["image"]), caption, pairs.scores[row].item()))
    return bands


if __name__ == "__main__":
    run_script(main)
