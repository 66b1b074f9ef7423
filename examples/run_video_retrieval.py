"""Fine-tune COTS for text-to-video retrieval and measure it, or only measure it.

    python examples/run_video_retrieval.py examples/configs/moving_scenes.yaml
    python examples/run_video_retrieval.py examples/configs/msrvtt.yaml --dataset MSRVTT/ --model MODEL
    python examples/run_video_retrieval.py --dataset MSRVTT/ --model MODEL --train_split none --eval_split test \
        --protocol msrvtt-full --zero_shot_protocol pretrained --output_dir runs/measured

Options may stand in a YAML file; those on the command line win. Beside the script's own options below, every argument
of `COTSTrainingArguments`, and so of transformers' `TrainingArguments`, works. Defaults are the supplement's for
MSR-VTT. At the end `output_dir` holds `results.json` and, where a model was trained, the model and its card.
"""

import os
from dataclasses import dataclass, field

from transformers import set_seed

from modeling_cots import COTSTrainer, COTSTrainingArguments
from modeling_cots.command_line import parse_config_and_options
from modeling_cots.datasets_opening import open_video_dataset
from modeling_cots.reporting import format_example_retrievals, format_recall
from modeling_cots.retrieval_results import (
    check_test_set,
    stated_zero_shot_protocol,
    write_card_of_measured,
    write_results,
)
from modeling_cots.script_steps import ModelArguments, build_parts, read_config
from modeling_cots.video_collator import check_videos_readable

# Their sources stand in examples/configs/msrvtt.yaml.
DEFAULTS = {
    "num_train_epochs": 20,
    "per_device_train_batch_size": 48,
    "per_device_eval_batch_size": 16,
    "lr_hold_epochs": 1,
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
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "`msrvtt-full` or `msrvtt-1ka`: which split of MSR-VTT; the counts of `eval_split` must fit."
        },
    )
    zero_shot_protocol: str | None = field(
        default=None,
        metadata={
            "help": "Of a model that is only measured: `pretrained`, `fine-tuned-elsewhere`, or `none` if it was "
            "fine-tuned on this data set."
        },
    )
    video_folder: str | None = field(
        default=None, metadata={"help": "Folder of the video files, if they are not where the annotations are."}
    )
    video_column: str | None = field(default=None, metadata={"help": "Column of the paths; found if not given."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, one or a list for each video; found if not given."}
    )
    num_frames: int = field(default=16, metadata={"help": "Frames that are sampled of a video."})
    temperature: float | None = field(
        default=None, metadata={"help": "Divides the similarities in the losses; by default as in the model."}
    )


@dataclass
class ScriptArguments(ModelArguments, VideoArguments):
    """The data set comes first, as it alone has no default."""


def open_split(options: ScriptArguments, split: str, args: COTSTrainingArguments, image_size: int):
    """A split of which some video can be read; generated videos are written by the first process."""
    with args.main_process_first(local=False, desc="opening the videos"):
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


def main() -> None:
    script_args, args = parse_config_and_options(ScriptArguments, COTSTrainingArguments, defaults=DEFAULTS)
    set_seed(args.seed)
    trains = script_args.train_split != "none"
    zero_shot_protocol = stated_zero_shot_protocol(script_args.zero_shot_protocol, trains)
    if not trains and script_args.model is None:
        raise ValueError("There is nothing to measure: give `model`, or a `train_split` to train on.")

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
    if script_args.temperature is not None:
        parts.model.config.temperature = script_args.temperature

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

    # 5. What was learnt, and the folder to share.
    metrics = trainer.evaluate()
    if trains:
        trainer.export_model(args.output_dir)
    num_captions = sum(1 for _ in eval_dataset.iter_captions())
    if trainer.is_world_process_zero():
        results = write_results(
            os.path.join(args.output_dir, "results.json"),
            {name.replace("i2t", "v2t").replace("t2i", "t2v"): value for name, value in metrics.items()},
            protocol=script_args.protocol,
            zero_shot_protocol=zero_shot_protocol,
            measured_on=eval_dataset.name,
            num_videos=len(eval_dataset),
            num_captions=num_captions,
            num_frames=script_args.num_frames,
            model=script_args.model,
            trained_on=f"{train_dataset.name} {script_args.train_split}" if trains else None,
            num_steps=trainer.state.global_step,
        )
        if not trains:
            write_card_of_measured(args.output_dir, script_args.model, results, unit="video")
    examples = format_example_retrievals(
        parts.model.cots, eval_dataset, parts.processor, script_args.max_text_length, unit="video"
    )
    if trainer.is_world_process_zero():
        print("", format_recall(metrics, len(eval_dataset), num_captions, "video"), examples, sep="\n\n")
        print(
            f"\nProtocol: {results['protocol']}; zero-shot: {zero_shot_protocol}; skipped: {results['num_skipped']}."
        )
        print(f"The numbers are in {os.path.join(args.output_dir, 'results.json')}.")
    if trains and trainer.is_world_process_zero():
        print(f"The model is in {args.output_dir}: load it with COTSModel.from_pretrained({args.output_dir!r}).")
    trainer.end()


if __name__ == "__main__":
    main()
