"""A million embeddings distributed like a trained model's: 50,000 embeddings of images, enlarged, and of captions.

A model with embeddings of 256 numbers is trained by the quick start's recipe, unless it exists already. It embeds
50,000 generated images; their captions are not used. Every further vector starts at an image's embedding, moves by
random shares towards two of its ten nearest neighbors, gets noise of a twentieth of the distance to the first of the
two, and is scaled to unit length. Queries are embeddings of captions of the validation split, whose scenes have
combinations that training never saw. They are of another modality than the vectors, and distributed differently.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from modeling_cots import COTSModel, COTSProcessor, ScenesDataset

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "runs" / "quickstart_256"
NUM_IMAGES, NUM_NEIGHBORS, NOISE, DIM = 50_000, 10, 0.05, 256


def train_model(folder: Path, max_steps: int | None = None) -> None:
    """The quick start with 256 numbers an embedding; minutes on a CPU."""
    config = json.loads((ROOT / "examples/configs/quickstart_model.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "model.json"
        path.write_text(json.dumps({**config, "projection_dim": DIM}), encoding="utf-8")
        options = {"model_config": path, "output_dir": folder, "disable_tqdm": "true"}
        if max_steps is not None:
            options["max_steps"] = max_steps
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        command = [sys.executable, "examples/run_pretraining.py", "examples/configs/quickstart.yaml", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


@torch.inference_mode()
def embed_scenes(folder: Path, num_images: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(num_images, d) embeddings of training images and (num_queries, d) of validation captions."""
    model, processor = COTSModel.from_pretrained(folder).eval(), COTSProcessor.from_pretrained(folder)
    scenes = ScenesDataset("train", num_images, model.config.image_size[0])
    chunks = []
    for start in range(0, num_images, 250):
        images = [scenes[index]["image"] for index in range(start, min(start + 250, num_images))]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        chunks.append(model.encode_image(pixels))
    captions = list(ScenesDataset("validation").iter_captions())
    chosen = np.random.default_rng(0).permutation(len(captions))[:num_queries]
    texts = processor.tokenizer([captions[index] for index in chosen], padding=True, return_tensors="pt")
    queries = model.encode_text(texts["input_ids"], texts["attention_mask"])
    return torch.cat(chunks).numpy(), queries.numpy()


def enlarge(real: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """(num, d) unit vectors, the real ones first; see the module's docstring."""
    vectors = np.empty((num, real.shape[1]), dtype=np.float32)
    vectors[: len(real)] = real[:num]
    neighbors = _nearest(real)
    for start in range(len(real), num, 50_000):
        part = vectors[start : start + 50_000]
        chosen = rng.integers(0, len(real), len(part))
        picks = neighbors[chosen[:, None], rng.integers(0, neighbors.shape[1], (len(part), 2))]
        steps = real[picks] - real[chosen, None]
        shares = rng.random((len(part), 2, 1), dtype=np.float32)
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        noise *= NOISE * np.linalg.norm(steps[:, 0], axis=1, keepdims=True) / real.shape[1] ** 0.5
        part[:] = real[chosen] + (shares * steps).sum(axis=1) + noise
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def _nearest(real: np.ndarray) -> np.ndarray:
    """(N, 10) positions of the ten nearest other vectors of each vector."""
    rows = []
    for start in range(0, len(real), 1000):
        scores = real[start : start + 1000] @ real.T
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -np.inf
        rows.append(np.argpartition(-scores, NUM_NEIGHBORS, axis=1)[:, :NUM_NEIGHBORS])
    return np.concatenate(rows)
