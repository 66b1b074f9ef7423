"""Running a training script of `examples/` in the process of the tests: a tiny model, two steps, on the CPU."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
USUAL = {
    "max_text_length": 24,
    "max_steps": 2,
    "lr_hold_epochs": 0,
    "queue_size": 6,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "overwrite_output_dir": "true",
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def script_runner(script: ModuleType, folder: Path, monkeypatch, *, image_size: int = 32, **usual) -> Callable:
    """
    A function `run(dataset, *config, **options)` that calls the script's `main` and returns the output folder.

    Args:
        folder: Where the configuration of what is not pre-trained is written, and by default the output, as `run`.
        image_size: Of the model that is built unless `model` is among the options.
        usual: What stands for options that a call does not name; one of `None` is left out.
    """
    model = {
        "text_config": {**ENCODER, "vocab_size": 150},
        "vision_config": {**ENCODER, "image_size": image_size, "patch_size": 16},
        "projection_dim": 16,
        "image_vocab_size": 30,
    }

    def run(dataset, *config: str, **options) -> Path:
        options = {
            "dataset": str(dataset),
            "model_config": None if "model" in options else str(folder / "model.json"),
            "output_dir": str(folder / "run"),
            **USUAL,
            **usual,
            **options,
        }
        pretrained = {f"{kind}_config" for kind in ("text", "vision") if options.get(f"{kind}_model") is not None}
        sizes = {name: value for name, value in model.items() if name not in pretrained}
        (folder / "model.json").write_text(json.dumps(sizes))
        argv = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *config, *argv])
        script.main()
        return Path(options["output_dir"])

    return run
