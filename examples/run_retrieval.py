"""Fine-tune COTS for image-text retrieval and measure it, or only measure it.

    python examples/run_retrieval.py examples/configs/flickr30k.yaml --dataset FLICKR30K/ --model MODEL
    python examples/run_retrieval.py --dataset COCO/ --model MODEL --train_split none --eval_split test \
        --protocol coco-5k --zero_shot_protocol pretrained --output_dir runs/measured
    python examples/run_retrieval.py --dataset scenes --model runs/quickstart --train_split none \
        --zero_shot_protocol none --output_dir runs/measured

`dataset` is Flickr30k or COCO in Karpathy's JSON form, or whatever pre-training takes. Options may stand in a YAML
file; those on the command line win. Beside the script's own options below, every argument of `COTSTrainingArguments`,
and so of transformers' `TrainingArguments`, works. The token losses are off unless their weights are given. At the end
`output_dir` holds `results.json`, and the model with its card where one was trained, or the card of the measured model
with the new numbers in it.
"""

import os
from dataclasses import dataclass, field

from transformers import set_seed

from modeling_cots import COTSTrainer, COTSTrainingArguments
from modeling_cots.command_line import parse_config_and_options
from modeling_cots.reporting import format_example_retrievals, format_recall
from modeling_cots.retrieval_metrics import COCO_NUM_FOLDS
from modeling_cots.retrieval_results import (
    check_test_set,
    stated_zero_shot_protocol,
    write_card_of_measured,
    write_results,
)
from modeling_cots.script_steps import (
    DataArguments,
    ModelArguments,
    build_parts,
    open_split,
    read_config,
)

# Their sources stand in examples/configs/flickr30k.yaml.
DEFAULTS = {"lr_hold_epochs": 1, "queue_size": 4096, "cmvm_weight": 0, "cmlm_weight": 0, "adaptive_filter": False}


@dataclass
class RetrievalArguments(DataArguments):
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "`flickr30k-1k`, `coco-5k`, `coco-1k` or `flickr8k-1k`: the counts of `eval_split` must fit."
        },
    )
    zero_shot_protocol: str | None = field(
        default=None,
        metadata={
            "help": "Of a model that is only measured: `pretrained`, `fine-tuned-elsewhere`, or `none` if it was "
            "fine-tuned on this data set."
        },
    )


@dataclass
class ScriptArguments(ModelArguments, RetrievalArguments):
    """The data set comes first, as it alone has no default."""


def main() -> None:
    script_args, args = parse_config_and_options(ScriptArguments, COTSTrainingArguments, defaults=DEFAULTS)
    set_seed(args.seed)
    trains = script_args.train_split != "none"
    zero_shot_protocol = stated_zero_shot_protocol(script_args.zero_shot_protocol, trains)
    if not trains and script_args.model is None:
        raise ValueError("There is nothing to measure: give `model`, or a `train_split` to train on.")
    if script_args.eval_split in (None, "none"):
        raise ValueError("There is nothing to measure on: give `eval_split`. To train only, use run_pretraining.py.")

    # 1. The configuration: of the checkpoint, of the given encoders, of a file, or the paper's.
    config = read_config(script_args)

    # 2. The data.
    opening = {"image_size": config.image_size[0], "seed": args.data_seed}
    train_dataset = open_split(script_args, script_args.train_split, **opening)
    eval_dataset = open_split(script_args, script_args.eval_split, **opening)
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

    # 5. What was learnt, and the folder to share.
    metrics = trainer.evaluate()
    if trains:
        trainer.export_model(args.output_dir)
    num_captions = sum(1 for _ in eval_dataset.iter_captions())
    if trainer.is_world_process_zero():
        results = write_results(
            os.path.join(args.output_dir, "results.json"),
            metrics,
            protocol=script_args.protocol,
            zero_shot_protocol=zero_shot_protocol,
            measured_on=eval_dataset.name,
            num_images=len(eval_dataset),
            num_captions=num_captions,
            model=script_args.model,
            trained_on=f"{train_dataset.name} {script_args.train_split}" if trains else None,
            num_steps=trainer.state.global_step,
        )
        if not trains:
            write_card_of_measured(args.output_dir, script_args.model, results)
    examples = format_example_retrievals(parts.model.cots, eval_dataset, parts.processor, script_args.max_text_length)
    if trainer.is_world_process_zero():
        folds = COCO_NUM_FOLDS if results["protocol"] == "coco-1k" else 1  # candidates are those of a fold
        recall = format_recall(metrics, len(eval_dataset) // folds, num_captions // folds)
        print("", recall, examples, sep="\n\n")
        print(
            f"\nProtocol: {results['protocol']}; zero-shot: {zero_shot_protocol}; skipped: {results['num_skipped']}."
        )
        print(f"The numbers are in {os.path.join(args.output_dir, 'results.json')}, and in the card beside it.")
    if trains and trainer.is_world_process_zero():
        print(f"The model is in {args.output_dir}: load it with COTSModel.from_pretrained({args.output_dir!r}).")
    trainer.end()


if __name__ == "__main__":
    main()
