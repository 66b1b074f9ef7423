"""Pre-train COTS on pairs of images and captions.

    cots-train --dataset PHOTOS/ --output_dir runs/photos
    cots-train my.yaml --num_train_epochs 2
    cots-train my.yaml --resume_from_checkpoint latest

Options may stand in a YAML file; those on the command line win. Beside the options of the data and the model, the
arguments of `COTSTrainingArguments` work, and those of transformers' `TrainingArguments` as docs/training.md says. At
the end `output_dir` is a folder that `COTSModel.from_pretrained` and `AutoProcessor` load; its `checkpoint-*` hold
what resuming needs.
"""

import os
from dataclasses import dataclass

from transformers import set_seed

from ..data.streaming.mixture import is_mixture
from ..evaluation.report import format_report
from ..training.trainer import COTSTrainer
from .held_out import hold_out_if_missing
from .steps import (
    DataArguments,
    ModelArguments,
    OutcomeArguments,
    StreamArguments,
    build_parts,
    describe_output,
    held_out_options,
    open_split,
    open_train_stream,
    parse_options,
    read_config,
    tell_whether_learned,
)


@dataclass
class ScriptArguments(StreamArguments, ModelArguments, OutcomeArguments, DataArguments):
    """Paths and columns; the data set comes first, as it alone has no default."""


def main(argv: list[str] | None = None) -> None:
    """Read the options in `argv` (by default the command line), and do what they say."""
    script_args, args = parse_options(ScriptArguments, argv=argv, description=__doc__)
    set_seed(args.seed)

    # 1. The configuration: of the checkpoint, of the given encoders, of a file, or the paper's.
    config = read_config(script_args)

    # 2. The data.
    opening = {"image_size": config.image_size[0], "seed": args.data_seed}
    if script_args.streaming:
        train_dataset = open_train_stream(script_args, args)
    elif script_args.shuffle_buffer is not None:
        raise ValueError("shuffle_buffer belongs to --streaming; without it everything is shuffled.")
    elif script_args.image_tokens is not None:
        raise ValueError("image_tokens belongs to --streaming; without it open the data with its tokens as dataset.")
    elif is_mixture(script_args.dataset):
        raise ValueError(f"{script_args.dataset} is a mixture, which is streamed: add --streaming.")
    else:
        train_dataset = open_split(script_args, script_args.train_split, **opening)
    eval_options = held_out_options(script_args)
    if script_args.eval_dataset is None:
        train_dataset, eval_dataset = hold_out_if_missing(eval_options, train_dataset, **opening)
    else:
        eval_dataset = open_split(eval_options, script_args.eval_split, **opening)

    # 3. Tokenizers, model and processor, made to agree.
    parts = build_parts(script_args, config, args, train_dataset)

    # 4. Training.
    trainer = COTSTrainer(
        model=parts.model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=parts.processor,
        image_tokenizer=parts.image_tokenizer,
        max_text_length=script_args.max_text_length,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 5. What was learned, and the folder to share.
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.export_model(args.output_dir)
    if script_args.lora_rank is not None:
        trainer.export_adapters(os.path.join(args.output_dir, "adapters"))
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        if eval_dataset is not None:
            assert trainer.example_retrievals is not None, "the trainer has evaluated"
            print("", format_report(metrics, trainer.example_retrievals, eval_dataset), sep="\n\n")
        print(f"\n{describe_output(args.output_dir)}")
    trainer.end()
    tell_whether_learned(trainer, script_args.strict)
