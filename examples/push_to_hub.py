"""Make a Hub repository of a COTS model: the whole model, or one of the two parts that hosted widgets can run.

    python examples/push_to_hub.py --model runs/quickstart --repo_id cots-quickstart --private true --tag v1.0
    python examples/push_to_hub.py --model runs/quickstart --output_dir out/quickstart
    python examples/push_to_hub.py --model runs/quickstart --onnx true --output_dir out/quickstart
    python examples/push_to_hub.py --model runs/quickstart --kind onnx --repo_id cots-quickstart-onnx
    python examples/push_to_hub.py --model runs/quickstart --kind text_encoder --repo_id cots-quickstart-text
    python examples/push_to_hub.py --model runs/quickstart --kind zero_shot_classifier \\
        --labels "a red circle" "a blue star" --images PHOTOS/ --repo_id cots-quickstart-shapes

The token is that of `hf auth login`, or of `HF_TOKEN`. `--output_dir` writes the repository to a folder; with
`--repo_id` it is pushed as well. `--onnx true` writes ONNX files into the repository of the model, in the same commit;
`--kind onnx` makes a repository of them alone. A card that somebody edited in the repository stays, unless
`--overwrite_card true`.

The steps are `main` of modeling_cots/scripts/hub_repository.py, which an installed package has as
`cots-export`.
"""

from modeling_cots.scripts.error_boundary import run_script
from modeling_cots.scripts.hub_repository import main

if __name__ == "__main__":
    run_script(main)
