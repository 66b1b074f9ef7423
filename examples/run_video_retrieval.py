"""Fine-tune COTS for text-to-video retrieval and measure it, or only measure it.

    python examples/run_video_retrieval.py examples/configs/moving_scenes.yaml
    python examples/run_video_retrieval.py examples/configs/msrvtt.yaml --dataset MSRVTT/ --model MODEL
    python examples/run_video_retrieval.py --dataset MSRVTT/ --model MODEL --train_split none --eval_split test \
        --protocol msrvtt-full --zero_shot_protocol pretrained --output_dir runs/measured

Options may stand in a YAML file; those on the command line win. Beside the script's own options below, the arguments
of `COTSTrainingArguments` work, and those of transformers' `TrainingArguments` as docs/training.md says. Defaults are
the supplement's for MSR-VTT. At the end `output_dir` holds `results.json`, and the model with its card where one was
trained, or the card of the measured model with the new numbers in it.

The steps are `main` of modeling_cots/scripts/video_retrieval.py, which an installed package has as
`cots-train video_retrieval` and `cots-evaluate video_retrieval`.
"""

from modeling_cots.scripts.error_boundary import GO_ON_TRAINING, run_script
from modeling_cots.scripts.video_retrieval import main

if __name__ == "__main__":
    run_script(main, go_on=GO_ON_TRAINING)
