"""Fine-tune COTS for image-text retrieval and measure it, or only measure it.

    python examples/run_retrieval.py examples/configs/flickr30k.yaml --dataset FLICKR30K/ --model MODEL
    python examples/run_retrieval.py --dataset COCO/ --model MODEL --train_split none --eval_split test \
        --protocol coco-5k --zero_shot_protocol pretrained --output_dir runs/measured
    python examples/run_retrieval.py --dataset scenes --model runs/quickstart --train_split none \
        --zero_shot_protocol none --output_dir runs/measured

`dataset` is Flickr30k or COCO in Karpathy's JSON form, or whatever pre-training takes. Options may stand in a YAML
file; those on the command line win. Beside the script's own options below, the arguments of `COTSTrainingArguments`
work, and those of transformers' `TrainingArguments` as docs/training.md says. The token losses are off unless their
weights are given. At the end `output_dir` holds `results.json`, and the model with its card where one was trained, or
the card of the measured model with the new numbers in it.

The steps are `main` of modeling_cots/scripts/retrieval.py, which an installed package has as
`cots-train retrieval` and `cots-evaluate`.
"""

from modeling_cots.scripts.error_boundary import GO_ON_TRAINING, run_script
from modeling_cots.scripts.retrieval import main

if __name__ == "__main__":
    run_script(main, go_on=GO_ON_TRAINING)
