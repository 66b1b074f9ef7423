"""Measure how well a COTS model finds images, or videos, and captions; nothing is trained.

    cots-evaluate [retrieval] [CONFIG.yaml] --dataset COCO/ --model runs/photos --eval_split test \\
        --zero_shot_protocol pretrained --output_dir runs/measured
    cots-evaluate video_retrieval [CONFIG.yaml] --dataset MSRVTT/ --model runs/photos --eval_split test \\
        --zero_shot_protocol pretrained --output_dir runs/measured

The first word says of what; without one it is `retrieval`, of images. `--train_split none` is set, also where a
configuration says otherwise. `cots-evaluate WORD --help` lists all options. Several processes:
`torchrun --nproc_per_node 8 -m modeling_cots.scripts.cots_evaluate ...`.
"""

import importlib
import sys

from .error_boundary import run_script

TASKS = ("retrieval", "video_retrieval")


def main() -> None:
    """Run the evaluation that `sys.argv` describes."""
    run_script(_evaluate)


def _evaluate() -> None:
    argv = sys.argv[1:]
    if argv in (["-h"], ["--help"]):
        print(__doc__)
    task = argv.pop(0) if argv and argv[0] in TASKS else TASKS[0]
    given = [word for word in argv if word.partition("=")[0] == "--train_split"]
    if given:
        raise ValueError(f"cots-evaluate trains on nothing: leave out --train_split, or use `cots-train {task}`.")
    importlib.import_module(f"{__package__}.{task}").main([*argv, "--train_split", "none"])


if __name__ == "__main__":
    main()
