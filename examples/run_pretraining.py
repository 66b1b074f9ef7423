"""Pre-train COTS on pairs of images and captions.

    python examples/run_pretraining.py examples/configs/quickstart.yaml
    python examples/run_pretraining.py examples/configs/quickstart.yaml --num_train_epochs 2 --output_dir runs/short
    torchrun --nproc_per_node 8 examples/run_pretraining.py --dataset PHOTOS/ --output_dir runs/photos

Options may stand in a YAML file; those on the command line win. Beside the script's own options below, the arguments
of `COTSTrainingArguments` work, and those of transformers' `TrainingArguments` as docs/training.md says. At the end
`output_dir` is a folder that `COTSModel.from_pretrained` and `AutoProcessor` load; its `checkpoint-*` hold what
resuming needs.

The steps are `main` of modeling_cots/scripts/pretraining.py, which an installed package has as
`cots-train`.
"""

from modeling_cots.scripts.error_boundary import GO_ON_TRAINING, run_script
from modeling_cots.scripts.pretraining import main

if __name__ == "__main__":
    run_script(main, go_on=GO_ON_TRAINING)
