"""Encoding on a CPU in one thread: eager, bfloat16, onnxruntime, OpenVINO and torchao, with recall beside speed.

    python benchmarks/encode_cpu.py --device cpu    # ViT-B/16 at 384 and BERT-base, random weights

Images are held against timm's eager float32, texts against sentence-transformers with BERT of the same size. Ratios
are of the process time of the fastest rounds, which other programs on the machine disturb least. Recall is that of
the quick start's model (`runs/quickstart`) on the validation split of `scenes`. What is not installed is left out,
and a row says so.
"""

import copy
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from encode import QUICK_ENCODER, VOCAB_SIZE, draw_captions
from side_by_side import optional, row, run_alone

from modeling_cots import COTSConfig, COTSModel, COTSProcessor
from modeling_cots.data.opening import open_dataset
from modeling_cots.encoders_cots import use_bfloat16_
from modeling_cots.evaluation.retrieval_metrics import retrieval_metrics
from modeling_cots.hub import onnx_export
from modeling_cots.image_reading_cots import read_image
from modeling_cots.onnx_cots import DTYPES

Arms = dict[str, tuple[Callable, Callable]]

ROUNDS = 3
GOAL = ">= 3 in one of these rows, at most 0.5 points of R@10 lost"
PACKAGES = {"onnxruntime": "onnxruntime", "OpenVINO": "openvino", "torchao": "torchao"}  # by the first word of an arm
TRAINED = Path(__file__).parents[1] / "runs" / "quickstart"


def build_arms(model: COTSModel, folder: Path) -> Arms:
    """By name: functions from pixels (B, 3, H, W), and from token ids and mask (B, L), to embeddings."""
    arms = {"eager float32": torch_arm(model)}
    rounded = copy.deepcopy(model)
    use_bfloat16_(rounded)
    arms["linear layers in bfloat16"] = torch_arm(rounded)
    arms["bfloat16 throughout"] = torch_arm(copy.deepcopy(model).bfloat16())
    if optional("onnx") is not None and optional("onnxruntime") is not None:
        arms |= export_arms(model, folder)
    if optional("torchao") is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantized = copy.deepcopy(model)
        quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
        arms["torchao int8"] = torch_arm(quantized)
    return arms


def export_arms(model: COTSModel, folder: Path) -> Arms:
    """What runs the ONNX files of a model, which are written to the folder."""
    arms = {}
    (folder / "onnx").mkdir()
    onnx_export._export_text(model, folder / "onnx/text_model.onnx")
    onnx_export._export_vision(model, folder / "onnx/vision_model.onnx")
    arms["onnxruntime float32"] = onnxruntime_arm(folder, "float32")
    for recipe, name in ((onnx_export.RECIPES[0], "all"), (onnx_export.UNMEASURED, "attention in float32")):
        onnx_export._quantize(folder, "int8", recipe)
        arms[f"onnxruntime int8, {name}"] = onnxruntime_arm(folder, "int8")
    openvino = optional("openvino")
    if openvino is not None:
        arms["OpenVINO, its own precision"] = openvino_arm(openvino, folder)
    return arms


def torch_arm(model: COTSModel) -> tuple[Callable, Callable]:
    dtype = model.dtype

    def encode_image(pixels):
        return model.encode_image(torch.from_numpy(pixels).to(dtype)).numpy()

    def encode_text(ids, mask):
        return model.encode_text(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()

    return encode_image, encode_text


def onnxruntime_arm(folder: Path, dtype: str) -> tuple[Callable, Callable]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    text, vision = (
        onnxruntime.InferenceSession(folder / f"onnx/{encoder}_model{DTYPES[dtype]}.onnx", options)
        for encoder in ("text", "vision")
    )
    return (
        lambda pixels: vision.run(None, {"pixel_values": pixels})[0],
        lambda ids, mask: text.run(None, {"input_ids": ids, "attention_mask": mask})[0],
    )


def openvino_arm(openvino, folder: Path) -> tuple[Callable, Callable]:
    options = {"INFERENCE_NUM_THREADS": 1}
    text, vision = (
        openvino.compile_model(folder / f"onnx/{encoder}_model.onnx", "CPU", options) for encoder in ("text", "vision")
    )
    return (
        lambda pixels: vision({"pixel_values": pixels})[0],
        lambda ids, mask: text({"input_ids": ids, "attention_mask": mask})[0],
    )


def fastest(sides: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of some rounds, in which the sides take turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def measure_speed(model: COTSModel, rounds: int) -> dict[str, tuple[float, float]]:
    """By arm: how many times as fast as timm eager on one image, and as sentence-transformers on 64 captions."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertTokenizer

    timm, library = optional("timm"), optional("sentence_transformers")
    pixels = np.random.default_rng(0).standard_normal((1, 3, *model.config.image_size), dtype=np.float32)
    # A word for every id, so that a string has as many tokens as words.
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += [f"word{number}" for number in range(len(names), VOCAB_SIZE)]
    tokenizer = BertTokenizer(vocab={name: number for number, name in enumerate(names)})
    texts = sorted((" ".join(names[i] for i in ids[2:]) for ids in draw_captions(64, "cpu")), key=len)
    vision, text = model.config.vision_config, model.config.text_config
    shape = {
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
    }
    vit = timm.create_model("vit_base_patch16_384", num_classes=0, img_size=vision.image_size, **shape).eval()
    with tempfile.TemporaryDirectory() as name:
        model.text_model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        peer = library.SentenceTransformer(modules=[Transformer(name), Pooling(text.hidden_size)], device="cpu")
        (Path(name) / "arms").mkdir()
        arms = build_arms(model, Path(name) / "arms")

        def strings(encode: Callable) -> None:
            for start in range(0, len(texts), 16):
                inputs = tokenizer(texts[start : start + 16], padding=True, return_tensors="np")
                encode(inputs["input_ids"], inputs["attention_mask"])

        of_images = {arm: partial(encode, pixels) for arm, (encode, _) in arms.items()}
        of_texts = {arm: partial(strings, encode) for arm, (_, encode) in arms.items()}
        images = fastest({"peer": lambda: vit.forward_features(torch.from_numpy(pixels)), **of_images}, rounds)
        captions = fastest(
            {"peer": lambda: peer.encode(texts, batch_size=16, show_progress_bar=False), **of_texts}, rounds
        )
    return {arm: (images["peer"] / images[arm], captions["peer"] / captions[arm]) for arm in arms}


def measure_recall(folder: str) -> dict[str, tuple[float, float]]:
    """By arm: R@10 from images to texts and back, of a trained model on the validation split of `scenes`."""
    model, processor = COTSModel.from_pretrained(folder).eval(), COTSProcessor.from_pretrained(folder)
    scenes = open_dataset("scenes", "validation", image_size=model.config.image_size[0])
    items = [scenes[number] for number in range(len(scenes))]
    pixels = processor(images=[read_image(item["image"]) for item in items], return_tensors="pt")[
        "pixel_values"
    ].numpy()
    texts = processor(
        text=[c for item in items for c in item["captions"]], padding=True, truncation=True, return_tensors="np"
    )
    ids, mask = texts["input_ids"], texts["attention_mask"]
    owners = torch.arange(len(items)).repeat_interleave(torch.tensor([len(item["captions"]) for item in items]))
    recalls = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (encode_image, encode_text) in build_arms(model, Path(temporary)).items():
            image_embeds = [encode_image(pixels[start : start + 32]) for start in range(0, len(pixels), 32)]
            text_embeds = [encode_text(ids[n : n + 32], mask[n : n + 32]) for n in range(0, len(ids), 32)]
            embeds = (torch.from_numpy(np.concatenate(parts)) for parts in (image_embeds, text_embeds))
            metrics = retrieval_metrics(*embeds, torch.arange(len(items)), owners)
            recalls[name] = metrics["i2t_recall_at_10"], metrics["t2i_recall_at_10"]
    return recalls


@torch.no_grad()
def measure(device: str, quick: bool) -> list[dict]:
    """Rows 1q and 2q: every way to encode images and texts, and one row for each package that is missing."""
    if device != "cpu":
        return [row("1q", "image and text encoding on a CPU", None, GOAL, "a CPU's row: --device cpu")]
    absent = [name for name in ("timm", "sentence_transformers") if optional(name) is None]
    if absent:
        note = f"{' and '.join(absent)} not installed"
        return [row("1q", "image and text encoding on a CPU", None, GOAL, note)]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {**QUICK_ENCODER, "image_size": 32} if quick else {"image_size": 384}
    text = QUICK_ENCODER if quick else {}
    model = COTSModel(COTSConfig(text_config=text, vision_config={**sizes, "patch_size": 16})).eval()
    speeds = measure_speed(model, 2 if quick else ROUNDS)
    recalls = measure_recall(str(TRAINED)) if TRAINED.is_dir() and not quick else {}
    return rows_of(speeds, recalls)


def rows_of(speeds: dict[str, tuple[float, float]], recalls: dict[str, tuple[float, float]]) -> list[dict]:
    """Rows of ratios, with recall in their notes; images first."""
    rows = []
    kinds = ("image", "image to text"), ("text", "text to image")
    peers = "timm eager float32", "sentence-transformers with BERT of the same size"
    for number, ((kind, direction), peer) in enumerate(zip(kinds, peers, strict=True)):
        for arm, ratios in speeds.items():
            package = PACKAGES.get(arm.split()[0].rstrip(","))
            version = [] if package is None else [f"{package} {importlib.metadata.version(package)}"]
            recall = "recall not measured: no runs/quickstart"
            if arm in recalls:
                recall = f"R@10 {direction} of the quick start {recalls[arm][number]:.1f}"
            title = f"{kind} encoding on a CPU, {arm} / {peer}"
            note = "; ".join([*version, recall, "one thread"])
            rows.append(row(f"{number + 1}q", title, ratios[number], GOAL, note))
    for name, package in PACKAGES.items():
        if not any(arm.startswith(name) for arm in speeds):
            rows.append(
                row("1q", f"image and text encoding on a CPU, {name}", None, GOAL, f"{package} is not installed")
            )
    return rows


if __name__ == "__main__":
    run_alone(measure, __doc__)
