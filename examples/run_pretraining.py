"""Pre-train COTS on pairs of images and captions.

    python examples/run_pretraining.py examples/configs/quickstart.yaml
    python examples/run_pretraining.py examples/configs/quickstart.yaml --num_train_epochs 2 --output_dir runs/short
    torchrun --nproc_per_node 8 examples/run_pretraining.py --dataset PHOTOS/ --output_dir runs/photos

Options may stand in a YAML file; those on the command line win. Beside the script's own options below, every argument
of `COTSTrainingArguments`, and so of transformers' `TrainingArguments`, works. At the end `output_dir` is a folder
that `COTSModel.from_pretrained` and `AutoProcessor` load; its `checkpoint-*` hold what resuming needs.
"""

import os
from dataclasses import dataclass, field

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_cots import COTSTrainer, COTSTrainingArguments
from modeling_cots.building import (
    build_config,
    build_image_tokenizer,
    build_model,
    build_processor,
    build_tokenizer,
)
from modeling_cots.command_line import parse_config_and_options
from modeling_cots.datasets_opening import open_dataset
from modeling_cots.image_reading import check_readable
from modeling_cots.reporting import format_example_retrievals, format_recall


@dataclass
class ScriptArguments:
    dataset: str = field(
        metadata={
            "help": "`scenes` (built in), a Hub id, a folder of images with metadata.jsonl or metadata.csv, or "
            ".parquet, .jsonl, .csv or WebDataset .tar files."
        }
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default="validation", metadata={"help": "Split to measure retrieval on; `none` to measure nothing."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found if not given."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the captions, one or a list for each image; found if not given."}
    )
    model: str | None = field(default=None, metadata={"help": "A COTS checkpoint to go on from (Hub id or folder)."})
    text_model: str | None = field(default=None, metadata={"help": "A pre-trained text encoder (Hub id or folder)."})
    vision_model: str | None = field(
        default=None, metadata={"help": "A pre-trained vision encoder (Hub id, folder, or timm/NAME)."}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "A JSON file of COTSConfig fields for what is not pre-trained."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder; by default the text model's, or one trained on the captions."},
    )
    image_tokenizer: str = field(
        default="facebook/flava-image-codebook",
        metadata={"help": "Hub id or folder of the dVAE, or `random` for a small randomly initialised codebook."},
    )
    max_text_length: int = field(default=64, metadata={"help": "Captions are cut to so many word pieces."})


def main() -> None:
    script_args, args = parse_config_and_options(ScriptArguments, COTSTrainingArguments)
    set_seed(args.seed)

    # 1. The configuration: of the checkpoint, of the given encoders, of a file, or the paper's.
    config = build_config(
        script_args.model, script_args.model_config, script_args.text_model, script_args.vision_model
    )

    # 2. The data.
    columns = {"image_column": script_args.image_column, "caption_column": script_args.caption_column}
    opening = {"seed": args.data_seed, "image_size": config.image_size[0], **columns}
    train_dataset = open_dataset(script_args.dataset, script_args.train_split, **opening)
    check_readable(train_dataset)
    eval_dataset = None
    if script_args.eval_split not in (None, "none"):
        eval_dataset = open_dataset(script_args.dataset, script_args.eval_split, **opening)
        check_readable(eval_dataset)

    # 3. Tokenizers, model and processor, made to agree.
    tokenizer = build_tokenizer(
        script_args.tokenizer or script_args.model,
        script_args.text_model,
        train_dataset.iter_captions(),
        script_args.max_text_length,
        config.text_config.vocab_size,
    )
    processor = build_processor(config, tokenizer, script_args.vision_model)
    image_tokenizer = None
    if args.cmvm_weight > 0:
        image_tokenizer = build_image_tokenizer(script_args.image_tokenizer, processor, config.image_vocab_size)
    model = build_model(
        model=script_args.model,
        text_model=script_args.text_model,
        vision_model=script_args.vision_model,
        config=config,
        num_word_pieces=len(tokenizer),
        num_image_tokens=config.image_vocab_size if image_tokenizer is None else image_tokenizer.vocab_size,
        max_text_length=script_args.max_text_length,
    )

    # 4. Training.
    trainer = COTSTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        image_tokenizer=image_tokenizer,
        max_text_length=script_args.max_text_length,
    )
    checkpoint = args.resume_from_checkpoint
    if checkpoint == "latest":
        checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        print(f"Going on from {checkpoint}." if checkpoint else f"No checkpoint in {args.output_dir}: a new run.")
    trainer.train(resume_from_checkpoint=checkpoint)

    # 5. What was learnt, and the folder to share.
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.export_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    report = []
    if eval_dataset is not None:
        num_captions = sum(1 for _ in eval_dataset.iter_captions())
        report.append(format_recall(metrics, len(eval_dataset), num_captions))
        report.append(format_example_retrievals(model.cots, eval_dataset, processor, script_args.max_text_length))
    if trainer.is_world_process_zero():
        print("", *report, sep="\n\n")
        print(f"\nThe model is in {args.output_dir}: load it with COTSModel.from_pretrained({args.output_dir!r}).")


if __name__ == "__main__":
    main()
