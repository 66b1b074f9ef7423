"""A pre-training run that its test can kill: the example script in its own process, with a tiny model.

`start` forks it from a server that has imported everything, so that a start costs no imports; the process is a real
one, killed by a real SIGKILL, from outside at any moment or by itself at a chosen moment of saving.
"""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.1,  # a random number out of place would show
    "initializer_range": 0.1,
}
MODEL = {
    "text_config": {**ENCODER, "vocab_size": 150},
    "vision_config": {**ENCODER, "image_size": 32, "patch_size": 8},
    "projection_dim": 16,
    "image_vocab_size": 30,
}
NUM_IMAGES, NUM_EPOCHS = 22, 4
NUM_STEPS = 12  # batches of 4 make 6 an epoch, two of them a step
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "timm.data", "datasets", "modeling_cots.training.trainer", "killed_run"])


def write_data(folder: Path) -> Path:
    """Images with captions, and the configuration of the model."""
    from modeling_cots import ScenesDataset

    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(MODEL))
    scenes = ScenesDataset("train", NUM_IMAGES, 32)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for index in range(NUM_IMAGES):
            scenes[index]["image"].save(folder / f"{index}.png")
            row = {"file_name": f"{index}.png", "captions": scenes[index]["captions"]}
            metadata.write(json.dumps(row) + "\n")
    return folder


def start(data: Path, output_dir: Path, *, die_at: str | None = None, **options):
    """The running process, and a connection that tells when a batch is computed and a checkpoint begun."""
    here, there = CONTEXT.Pipe(duplex=False)
    arguments = (str(data), str(output_dir), die_at, options, there)
    process = CONTEXT.Process(target=_train, args=arguments, daemon=True)  # ends with the tests, whatever happens
    process.start()
    there.close()
    return process, here


def _train(data: str, output_dir: str, die_at: str | None, options: dict, connection) -> None:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import run_pretraining

    _tell(connection)
    if die_at is not None:
        _die_in_save(die_at)
    options = {
        "dataset": data,
        "model_config": f"{data}/model.json",
        "image_tokenizer": "random",
        "eval_split": "none",
        "max_text_length": 24,
        "output_dir": output_dir,
        "num_train_epochs": NUM_EPOCHS,
        "lr_hold_epochs": 1,
        "learning_rate": 1e-3,
        "queue_size": 10,
        "filter_num_std": 0.5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 5,  # not a multiple of the next: averages live on through a checkpoint
        "save_steps": 2,
        "save_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "use_cpu": "true",
        "disable_tqdm": "true",
        **options,
    }
    sys.argv = ["run_pretraining.py", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    run_pretraining.main()


def _tell(connection) -> None:
    from modeling_cots import COTSTrainer

    def telling(name: str, word: str):
        original = getattr(COTSTrainer, name)

        def method(self, *args, **kwargs):
            connection.send(word)
            return original(self, *args, **kwargs)

        setattr(COTSTrainer, name, method)

    telling("compute_loss", "batch")
    telling("_save_checkpoint", "save")


def _die_in_save(moment: str) -> None:
    """Arrange for this process to kill itself in its third save, when the run has something to lose."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils

    from modeling_cots.training import checkpoints, recovery
    from modeling_cots.training.checkpoints import MANIFEST_NAME

    place, name, is_meant, num_calls_before = {
        "in the model": (transformers.modeling_utils, "safe_save_file", lambda *args: True, 2),
        "in the optimizer": (torch, "save", lambda _, path: path.endswith("optimizer.pt"), 2),
        "in the momentum state": (safetensors.torch, "save_model", lambda *args: True, 2),
        "before the manifest": (recovery, "commit_checkpoint", lambda *args: True, 2),
        "in the manifest": (checkpoints.os, "replace", lambda _, path: path.name == MANIFEST_NAME, 2),
        "before older ones go": (recovery, "rotate_checkpoints", lambda *args: True, 2),
        "while older ones go": (checkpoints, "_delete", lambda folder: folder.name == "checkpoint-4", 0),
    }[moment]
    original = getattr(place, name)

    def deadly(*args, **kwargs):
        nonlocal num_calls_before
        if not is_meant(*args):
            return original(*args, **kwargs)
        if num_calls_before > 0:
            num_calls_before -= 1
            return original(*args, **kwargs)
        _half_do(moment, original, args, kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, deadly)


def _half_do(moment: str, original, args: tuple, kwargs: dict) -> None:
    if moment in ("in the model", "in the optimizer", "in the momentum state"):
        original(*args, **kwargs)
        path = next(arg for arg in args if isinstance(arg, str | os.PathLike))
        os.truncate(path, os.path.getsize(path) // 2)
    elif moment == "while older ones go":
        (args[0] / "checkpoint_manifest.json").unlink()
        next(path for path in args[0].iterdir() if path.suffix == ".safetensors").unlink()
