"""Fine-tune COTS for text-to-video retrieval and measure it, or only measure it.

    cots-train video_retrieval --dataset MSRVTT/ --model runs/photos --output_dir runs/videos
    cots-evaluate video_retrieval --dataset MSRVTT/ --model runs/photos --eval_split test --protocol msrvtt-full \
        --zero_shot_protocol pretrained --output_dir runs/measured

Options may stand in a YAML file; those on the command line win. Beside the options of the data and the model, the
arguments of `COTSTrainingArguments` work, and those of transformers' `TrainingArguments` as docs/training.md says.
Defaults are the supplement's for MSR-VTT. At the end `output_dir` holds `results.json`, and the model with its card
where one was trained, or the card of the measured model with the new numbers in it.
"""

import os
from dataclasses import dataclass, field

from transformers import set_seed

from ..data.opening import open_video_dataset
from ..data.video_collators import check_videos_readable
from ..evaluation.results import check_test_set
from ..training.arguments import COTSTrainingArguments
from ..training.trainer import COTSTrainer
from .steps import (
    MeasuringArguments,
    ModelArguments,
    OutcomeArguments,
    build_parts,
    check_measuring,
    explaining_splits,
    finish_retrieval,
    parse_options,
    read_config,
    tell_whether_learned,
)

# Their sources stand in examples/configs/msrvtt.yaml.
DEFAULTS = {
    "num_train_epochs": 20,
    "per_device_train_batch_size": 48,
    "per_device_eval_batch_size": 16,
    "lr_hold_epochs": 1,
    "max_grad_norm": 0,
    "queue_size": 1444,
    "cmvm_weight": 0,
    "cmlm_weight": 0,
    "adaptive_filter": False,
    "min_crop_scale": 1.0,
}


@dataclass
class VideoArguments:
    dataset: str = field(
        metadata={
            "help": "`moving_scenes` (generated), MSRVTT_data.json, train_val_videodatainfo.json or a folder with one "
            "of these, or a folder of videos with metadata.jsonl or metadata.csv."
        }
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; `none` only measures `model`."})
    eval_split: str = field(default="validation", metadata={"help": "Split to measure retrieval on."})
    video_folder: str | None = field(
        default=None, metadata={"help": "Folder of the video files, if they are not where the annotations are."}
    )
    video_column: str | None = field(default=None, metadata={"help": "Column of the paths; found if not given."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, one or a list for each video; found if not given."}
    )
    num_frames: int = field(default=16, metadata={"help": "Frames that are sampled of a video."})


@dataclass
class ScriptArguments(ModelArguments, MeasuringArguments, OutcomeArguments, VideoArguments):
    """The data set comes first, as it alone has no default."""


def open_split(options: ScriptArguments, split: str, args: COTSTrainingArguments, image_size: int):
    """A split of which some video can be read; generated videos are written by the first process."""
    with args.main_process_first(local=False, desc="opening the videos"), explaining_splits(options, split):
        opened = open_video_dataset(
            options.dataset,
            split,
            generated_folder=f"{os.path.normpath(args.output_dir)}_videos",  # not in the folder that is shared
            image_size=image_size,
            seed=args.data_seed,
            protocol=options.protocol,
            video_folder=options.video_folder,
            video_column=options.video_column,
            caption_column=options.caption_column,
        )
    check_videos_readable(opened)
    return opened


def main(argv: list[str] | None = None) -> None:
    """Read the options in `argv` (by default the command line), and do what they say."""
    script_args, args = parse_options(ScriptArguments, argv=argv, defaults=DEFAULTS, description=__doc__)
    set_seed(args.seed)
    zero_shot_protocol = check_measuring(script_args, args)
    trains = script_args.train_split != "none"

    # 1. The configuration: of the checkpoint, of the given encoders, of a file, or the paper's.
    config = read_config(script_args)

    # 2. The videos.
    train_dataset = open_split(script_args, script_args.train_split, args, config.image_size[0]) if trains else None
    eval_dataset = open_split(script_args, script_args.eval_split, args, config.image_size[0])
    check_test_set(eval_dataset, script_args.protocol)
    eval_dataset.name += f" {script_args.eval_split}"

    # 3. Tokenizer, model and processor, made to agree.
    parts = build_parts(script_args, config, args, train_dataset if trains else eval_dataset)
    parts.processor.video_processor.num_frames = script_args.num_frames

    # 4. Training.
    trainer = COTSTrainer(
        model=parts.model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=parts.processor,
        max_text_length=script_args.max_text_length,
        eval_protocol=script_args.protocol,
    )
    if trains:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 5. What was learned, and the folder to share.
    trained_on = f"{train_dataset.name} {script_args.train_split}" if trains else None
    finish_retrieval(
        trainer,
        script_args,
        zero_shot_protocol,
        trained_on=trained_on,
        modality="video",
        num_frames=script_args.num_frames,
    )
    trainer.end()
    tell_whether_learned(trainer, script_args.strict)
