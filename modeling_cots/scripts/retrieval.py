"""Fine-tune COTS for image-text retrieval and measure it, or only measure it.

    cots-train retrieval my.yaml --dataset COCO/ --model runs/photos
    cots-evaluate --dataset COCO/ --model runs/photos --eval_split test --protocol coco-5k \
        --zero_shot_protocol pretrained --output_dir runs/measured

`dataset` is Flickr30k or COCO in Karpathy's JSON form, or whatever pre-training takes. Options may stand in a YAML
file; those on the command line win. Beside the options of the data and the model, the arguments of
`COTSTrainingArguments` work, and those of transformers' `TrainingArguments` as docs/training.md says. The token losses
are off unless their weights are given. At the end `output_dir` holds `results.json`, and the model with its card where
one was trained, or the card of the measured model with the new numbers in it.
"""

from dataclasses import dataclass

from transformers import set_seed

from ..evaluation.results import check_test_set
from ..training.trainer import COTSTrainer
from .held_out import hold_out_if_missing
from .steps import (
    DataArguments,
    MeasuringArguments,
    ModelArguments,
    OutcomeArguments,
    build_parts,
    check_measuring,
    finish_retrieval,
    open_split,
    parse_options,
    read_config,
    tell_whether_learned,
)

# Their sources stand in examples/configs/flickr30k.yaml.
DEFAULTS = {"lr_hold_epochs": 1, "queue_size": 4096, "cmvm_weight": 0, "cmlm_weight": 0, "adaptive_filter": False}


@dataclass
class ScriptArguments(ModelArguments, MeasuringArguments, OutcomeArguments, DataArguments):
    """The data set comes first, as it alone has no default."""


def main(argv: list[str] | None = None) -> None:
    """Read the options in `argv` (by default the command line), and do what they say."""
    script_args, args = parse_options(ScriptArguments, argv=argv, defaults=DEFAULTS, description=__doc__)
    set_seed(args.seed)
    zero_shot_protocol = check_measuring(script_args, args)
    trains = script_args.train_split != "none"

    # 1. The configuration: of the checkpoint, of the given encoders, of a file, or the paper's.
    config = read_config(script_args)

    # 2. The data.
    opening = {"image_size": config.image_size[0], "seed": args.data_seed}
    train_dataset = open_split(script_args, script_args.train_split, **opening)
    train_dataset, eval_dataset = hold_out_if_missing(script_args, train_dataset, **opening)
    check_test_set(eval_dataset, script_args.protocol)
    eval_dataset.name += f" {script_args.eval_split}"

    # 3. Tokenizers, model and processor, made to agree.
    parts = build_parts(script_args, config, args, train_dataset if trains else eval_dataset)

    # 4. Training.
    trainer = COTSTrainer(
        model=parts.model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=parts.processor,
        image_tokenizer=parts.image_tokenizer,
        max_text_length=script_args.max_text_length,
        eval_protocol=script_args.protocol,
    )
    if trains:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)

    # 5. What was learned, and the folder to share.
    trained_on = f"{train_dataset.name} {script_args.train_split}" if trains else None
    finish_retrieval(trainer, script_args, zero_shot_protocol, trained_on=trained_on)
    trainer.end()
    tell_whether_learned(trainer, script_args.strict)
