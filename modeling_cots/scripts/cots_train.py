"""Train a COTS model.

    cots-train [pretraining] [CONFIG.yaml] --dataset PHOTOS/ --output_dir runs/photos ...
    cots-train retrieval [CONFIG.yaml] --dataset COCO/ --model runs/photos --output_dir runs/coco ...
    cots-train video_retrieval [CONFIG.yaml] --dataset MSRVTT/ --model runs/photos --output_dir runs/videos ...

The first word says what for, and with it which options there are and their defaults: `cots-train WORD --help` lists
them. Without such a word it is `pretraining`. Several processes:
`torchrun --nproc_per_node 8 -m modeling_cots.scripts.cots_train ...`.
"""

import importlib
import sys

from .error_boundary import GO_ON_TRAINING, run_script

TASKS = ("pretraining", "retrieval", "video_retrieval")


def main() -> None:
    """Run the training that `sys.argv` describes."""
    run_script(_train, go_on=GO_ON_TRAINING)


def _train() -> None:
    argv = sys.argv[1:]
    if argv in (["-h"], ["--help"]):
        print(__doc__)
    task = argv.pop(0) if argv and argv[0] in TASKS else TASKS[0]
    importlib.import_module(f"{__package__}.{task}").main(argv)


if __name__ == "__main__":
    main()
