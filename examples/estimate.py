"""What a training run will cost, before it is started: parameters, FLOP, memory, batch size, hours.

    python examples/estimate.py examples/configs/quickstart.yaml
    python examples/estimate.py examples/configs/msrvtt.yaml --num_pairs 6513
    python examples/estimate.py my.yaml --num_pairs 5300000 --gpu_memory_gib 80 --gpu_tflops 300 --num_gpus 8
    python examples/estimate.py --script run_retrieval --dataset COCO/ --num_pairs 113287 --num_train_epochs 15

Takes the configuration of a training script, and any of its options. `--script` names the script whose options and
defaults are meant: `run_pretraining`, `run_retrieval` or `run_video_retrieval`. Without it, that is the first of the
three that knows all options given. Of a video, a pair is one caption with all frames.

Nothing is trained and no data is opened: shapes run through the model, values do not. Of pre-trained encoders only the
configuration is read, of timm's and of BERT-base only the name, so that the paper's recipes need no hub. FLOP and
bytes are counted on the real modules. Pairs a second are as true as the rate that is given. Captions count as
`max_text_length` tokens each. The vocabulary counts as the configuration has it; a tokenizer trained on the captions
may have fewer tokens. With `--image_tokenizer none` image tokens are those of the data set, and cost nothing.
"""

import argparse
import sys
from dataclasses import dataclass, field, fields

from transformers import BertConfig

from modeling_cots import COTSTrainingArguments
from modeling_cots.scripts import pretraining, retrieval, video_retrieval
from modeling_cots.scripts.command_line import option_names
from modeling_cots.scripts.cost import TrainingCost, estimate_training_cost
from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.factory import build_config, config_options
from modeling_cots.scripts.kmeans_fitting import KMEANS
from modeling_cots.scripts.steps import parse_options
from modeling_cots.training.sharding import check_shards

SCRIPTS = {"run_pretraining": pretraining, "run_retrieval": retrieval, "run_video_retrieval": video_retrieval}
BERT_BASE = "google-bert/bert-base-uncased", "bert-base-uncased"  # the defaults of BertConfig are its configuration
TOKENIZER_WIDTHS = {"random": 8, "none": None}  # width of the image tokenizer, where it is not the dVAE


@dataclass
class EstimateArguments:
    script: str | None = field(
        default=None,
        metadata={
            "help": "The training script whose options and defaults are meant; found by the options if not given.",
            "choices": list(SCRIPTS),
        },
    )
    num_pairs: int | None = field(default=None, metadata={"help": "Pairs of the training set; without it no hours."})
    num_gpus: int = field(default=1, metadata={"help": "Devices that share a batch."})
    gpu_memory_gib: float = field(default=80.0, metadata={"help": "Memory of one device."})
    gpu_tflops: float = field(
        default=300.0,
        metadata={"help": "Rate that one device reaches, about 0.3 to 0.5 of the bf16 peak in its data sheet."},
    )


def script_of(argv: list[str]):
    """
    The training script that `--script` names, or else the first one that knows all options of `argv` and its file.

    Raises `ValueError` for `script` in the file, which the training script itself would refuse.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--script", choices=list(SCRIPTS))
    named, given = parser.parse_known_args(argv)[0].script, option_names(argv)
    if named is not None:
        return SCRIPTS[named]
    if "script" in given:
        raise ValueError("`script` is no option of a training script: give --script on the command line.")
    known = {name: {option.name for option in fields(script.ScriptArguments)} for name, script in SCRIPTS.items()}
    every = set.union(*known.values())
    return SCRIPTS[min(SCRIPTS, key=lambda name: len(given & every - known[name]))]


def estimate(script_args, args: COTSTrainingArguments, num_gpus: int = 1) -> TrainingCost:
    """
    The cost of the model and the shapes that the options of a training script describe.

    Raises `ValueError` for adapters, which are not counted, and for devices that `shard_model` cannot be split among.
    """
    check_shards(args, num_gpus)
    if script_args.lora_rank is not None:
        raise ValueError("This counts runs that train whole encoders; LoRA needs less: leave lora_rank out.")
    is_bert_base = script_args.text_model in BERT_BASE
    config = build_config(
        script_args.model,
        script_args.model_config,
        None if is_bert_base else script_args.text_model,
        script_args.vision_model,
        script_args.revisions,
        **config_options(script_args),
    )
    if is_bert_base:
        config.text_config = BertConfig()
    shapes = {"text_length": script_args.max_text_length, "num_frames": getattr(script_args, "num_frames", None)}
    if args.cmvm_weight > 0 and script_args.image_tokenizer.startswith(KMEANS):
        raise ValueError(
            "The cost of image tokens by k-means is not counted: give --image_tokenizer none, as for tokens that "
            "examples/tokenize_images.py has made once."
        )
    if script_args.image_tokenizer in TOKENIZER_WIDTHS:
        shapes["image_tokenizer_hidden_size"] = TOKENIZER_WIDTHS[script_args.image_tokenizer]
    return estimate_training_cost(config, args, num_devices=num_gpus, **shapes)


def _advice(args: COTSTrainingArguments) -> str:
    """What to do where a batch does not fit; nothing saves more memory than `gradient_checkpointing`."""
    if args.gradient_checkpointing:
        return "take a smaller batch"
    option = "gradient_checkpointing instead" if args.recompute_activations else "recompute_activations"
    return f"set {option} or take a smaller batch"


def main() -> None:
    # The run is for another machine, so that the arguments are not checked against this one.
    argv = [*sys.argv[1:], "--use_cpu", "true"]
    script = script_of(argv)
    script_args, estimate_args, args = parse_options(
        script.ScriptArguments,
        EstimateArguments,
        argv=argv,
        defaults=getattr(script, "DEFAULTS", None),
        description=__doc__,
        writes=False,
    )

    # 1. Count.
    cost = estimate(script_args, args, estimate_args.num_gpus)

    # 2. What the model is.
    print(f"{'parameters':28s} {sum(cost.num_parameters.values()) / 1e6:12.1f} million")
    print(f"  {'of which train':26s} {cost.num_trained_parameters / 1e6:12.1f}")
    for part, count in cost.num_parameters.items():
        print(f"  {part:26s} {count / 1e6:12.1f}")

    # 3. What a pair costs.
    print(f"{'GFLOP a pair':28s} {cost.total_flop / 1e9:12.2f}")
    for part, flop in sorted(cost.flop_per_pair.items(), key=lambda item: -item[1]):
        print(f"  {part:26s} {flop / 1e9:12.2f} {flop / cost.total_flop:8.1%}")
    print(f"{'memory a pair':28s} {cost.bytes_per_pair / 2**20:12.1f} MiB")
    print(f"{'memory of weights and queue':28s} {cost.fixed_bytes / 2**30:12.2f} GiB")

    # 4. What a device does with it.
    largest = cost.largest_batch(int(estimate_args.gpu_memory_gib * 2**30))
    per_second = estimate_args.num_gpus * cost.pairs_per_second(estimate_args.gpu_tflops * 1e12)
    batch = args.per_device_train_batch_size
    print(f"{'largest batch of a device':28s} {largest:12d} pairs in {estimate_args.gpu_memory_gib:g} GiB")
    if batch > largest:
        print(f"  per_device_train_batch_size {batch} will not fit: {_advice(args)}.")
    print(
        f"{'pairs a second':28s} {per_second:12.1f} at {estimate_args.gpu_tflops:g} TFLOP/s x {estimate_args.num_gpus}"
    )
    if args.max_steps > 0:
        pairs = args.max_steps * batch * estimate_args.num_gpus * args.gradient_accumulation_steps
    elif estimate_args.num_pairs is not None:
        pairs = args.num_train_epochs * estimate_args.num_pairs
    else:
        print("hours: give --num_pairs")
        return
    print(f"{'hours':28s} {pairs / per_second / 3600:12.1f} for {pairs:,.0f} pairs seen")


if __name__ == "__main__":
    run_script(main)
