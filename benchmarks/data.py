"""From JPEG bytes to a batch on the device: decoding beside PIL and others, bytes sent, loader beside step.

    OMP_NUM_THREADS=1 python benchmarks/data.py --device cpu
    python benchmarks/data.py --device cuda    # the loader beside a step of the base model

Images are generated, with the grain of photographs: about two bits of JPEG a pixel. Ratios 8 are of process time with
one thread, all sides on the same images in turn; ratio 9 is of the clock, with the workers that this machine has cores
for, and their head start does not count. Crops are drawn as in training, from half of the image to all of it, the
same on both sides. Our tensors keep the images' order of memory, (H, W, 3), and the device transposes them.
"""

import io
import os
import random
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from side_by_side import (
    batches_to_time,
    free,
    medians,
    optional,
    row,
    run_alone,
    seconds_a_batch,
    version_of,
    wait_for,
)
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from modeling_cots import (
    COTSConfig,
    COTSForPreTraining,
    COTSTrainer,
    COTSTrainingArguments,
    ImageTokenizer,
    image_reading_cots,
)
from modeling_cots.data.image_augmentation import ImageTransform, resize
from modeling_cots.image_reading_cots import read_image
from modeling_cots.scripts.factory import build_processor, train_tokenizer

cv2, pyvips, turbojpeg, simplejpeg = (optional(name) for name in ("cv2", "pyvips", "turbojpeg", "simplejpeg"))
MEAN = [0.5] * 3
CAPTION = "two dogs run along the beach while a child throws a ball"
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def draw_jpeg(width: int, seed: int) -> bytes:
    """An image of 4 : 3 with smooth shades, edges and grain."""
    height = width * 3 // 4
    rng = np.random.default_rng(seed)
    shades = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(shades.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    for _ in range(12):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 5, left : left + width // 6] *= rng.uniform(0.4, 1.2)
    pixels += rng.normal(0, 4, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------- 8: decoding


def over(images: list[bytes], transform):
    """All images, with draws that are the same for every side."""

    def run() -> None:
        random.seed(0)
        torch.manual_seed(0)
        for image in images:
            transform(image)

    return run


def timm_transform(side: int, normalize: bool):
    """
    The training transform of timm: PIL's crop and resize, to bytes or to normalized floats.

    timm's own loader takes bytes, which its prefetcher normalizes on the device; a loader of the user's gets floats.
    """
    return create_transform(
        (3, side, side),
        is_training=True,
        scale=(0.5, 1.0),
        hflip=0.0,
        color_jitter=None,
        interpolation="bicubic",
        mean=MEAN,
        std=MEAN,
        normalize=normalize,
    )


@contextmanager
def one_thread():
    """torch with one thread, so that no other one takes part in what this one's time is the time of."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@one_thread()
def decoding_rows(side: int, quick: bool) -> list[dict]:
    rows = []
    for width in (50, 130) if quick else (500, 1280):
        images = [draw_jpeg(width, seed) for seed in range(2 if quick else 16)]
        fast = ImageTransform((side, side), MEAN)
        with_pil, normalized = (timm_transform(side, normalize) for normalize in (False, True))

        sides = {
            "ours": over(images, fast),
            "without": over(images, without_simplejpeg(fast)),
            "PIL": over(images, lambda image, transform=with_pil: transform(read_image(image))),
            "floats": over(images, lambda image, transform=normalized: transform(read_image(image))),
            **{name: over(images, peer_transform(decode, fast)) for name, decode in DECODERS.items() if decode},
        }
        with warnings.catch_warnings():  # that torchvision's decoder will be removed
            warnings.simplefilter("ignore", DeprecationWarning)
            times = medians(sides, "cpu", 1 if quick else 11)
        bits = 8 * statistics.mean(map(len, images)) / (width * (width * 3 // 4))
        note = f"random crops to {side} px, JPEGs of {bits:.1f} bits a pixel, {len(images)} images, one thread"
        compared = [
            ("PIL", "PIL and timm, bytes", ">= 3", f"{note}; theirs as timm's prefetcher takes it; {used_decoder()}"),
            ("floats", "PIL and timm, normalized", ">= 3", "theirs by timm's default, without its prefetcher"),
        ]
        compared.append(("without", "ours without simplejpeg", "none", "the decoder of PIL"))
        compared += [(name, NAMES[name], "none", NOTES[name]) for name in DECODERS]
        title = f"JPEG of {width} px to training pixels, images/s a core, ours"
        for name, theirs, goal, said in compared:
            ratio = times[name] / times["ours"] if name in times else None
            rows.append(row("8", f"{title} / {theirs}", ratio, goal, said if name in times else MISSING[name]))
    return rows


def used_decoder() -> str:
    """The library that decodes JPEGs on our side, with its version."""
    return "without simplejpeg" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"


def without_simplejpeg(transform):
    """Our transform where simplejpeg is not installed."""

    def run(image: bytes) -> None:
        installed, image_reading_cots.simplejpeg = image_reading_cots.simplejpeg, None
        try:
            transform(image)
        finally:
            image_reading_cots.simplejpeg = installed

    return run


def peer_transform(decode, transform: ImageTransform):
    """Our transform with another decoder: `decode(bytes, factor)` -> (height, width, 3) at 1/factor of the size."""
    side = transform.image_size[0]

    def run(image: bytes) -> torch.Tensor:
        with Image.open(io.BytesIO(image)) as opened:
            top, left, height, width = transform._draw_box(*opened.size)
        factor = max((each for each in (2, 4, 8) if each <= min(height, width) // side), default=1)
        pixels = decode(image, factor)
        factor = round(opened.size[0] / pixels.shape[1])  # 1 of a decoder that has no fractions
        rows, columns = slice(top // factor, (top + height) // factor), slice(left // factor, (left + width) // factor)
        return resize(pixels[rows, columns], (side, side))

    return run


def decode_by_opencv(image: bytes, factor: int) -> np.ndarray:
    fractions = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
    if factor == 1:
        return cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(image, np.uint8), fractions[factor]), cv2.COLOR_BGR2RGB)


def decode_by_vips(image: bytes, factor: int) -> np.ndarray:
    return pyvips.Image.new_from_buffer(image, "", shrink=factor, access="sequential").numpy()


def decode_by_turbojpeg(image: bytes, factor: int) -> np.ndarray:
    return TURBOJPEG.decode(image, pixel_format=turbojpeg.TJPF_RGB, scaling_factor=(1, factor))


def decode_by_torchvision(image: bytes, factor: int) -> np.ndarray:
    pixels = decode_jpeg(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)
    return pixels.permute(1, 2, 0).numpy()


def load_turbojpeg():
    """PyTurboJPEG with the library that it calls; `None` where either is missing."""
    if turbojpeg is None:
        return None
    try:
        return turbojpeg.TurboJPEG()
    except RuntimeError:  # without libturbojpeg, which no package of Python brings
        return None


TURBOJPEG = load_turbojpeg()
DECODERS = {
    "opencv": decode_by_opencv if cv2 else None,
    "vips": decode_by_vips if pyvips else None,
    "turbojpeg": decode_by_turbojpeg if TURBOJPEG else None,
    "torchvision": decode_by_torchvision,
}
NAMES = {
    "opencv": "OpenCV's decoder",
    "vips": "libvips' decoder",
    "turbojpeg": "PyTurboJPEG",
    "torchvision": "torchvision's decoder",
}
NOTES = {
    "opencv": f"opencv-python-headless {cv2.__version__ if cv2 else ''}, and our resize",
    "vips": f"pyvips {pyvips.__version__ if pyvips else ''}, and our resize; all of its threads counted",
    "turbojpeg": f"PyTurboJPEG {version_of('PyTurboJPEG') or ''} with the system's libjpeg-turbo, and our resize",
    "torchvision": "and our resize; deprecated since torchvision 0.29; reads every image in full",
}
MISSING = {
    "opencv": "pip install opencv-python-headless",
    "vips": "pip install pyvips pyvips-binary",
    "turbojpeg": "it needs libturbojpeg, which no package of Python brings",
}


# ---------------------------------------------------------------------------------------------- 9: the loader


class Pairs(Dataset):
    """Encoded images in memory, over and over, with a caption each."""

    def __init__(self, images: list[bytes], length: int):
        self.images, self.length = images, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        image = {"bytes": self.images[index % len(self.images)], "path": None}
        return {"image": image, "captions": [CAPTION], "pair_id": index, "name": str(index), "seed": index}


def build_trainer(device: str, quick: bool, dataset: Dataset, batch_size: int, folder: str) -> COTSTrainer:
    """The base model on a GPU, and one of 6 layers of 384 on a CPU, which would need minutes for a step of it."""
    encoder = TINY if quick else SMALL if device == "cpu" else {}
    config = COTSConfig(text_config=encoder, vision_config={**encoder, "image_size": 64 if quick else 384})
    tokenizer = train_tokenizer([CAPTION] * 2, 300)
    config.text_config.vocab_size, config.image_vocab_size = len(tokenizer), 64 if quick else 8192
    processor = build_processor(config, tokenizer, None)
    settings = processor.image_processor
    args = COTSTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        max_steps=4,
        lr_hold_epochs=0,
        queue_size=64 if quick else 12_800,
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    return COTSTrainer(
        model=COTSForPreTraining(config),
        args=args,
        train_dataset=dataset,
        processing_class=processor,
        # Narrow, so that it costs next to nothing: as if the tokens were cached, which is the faster step.
        image_tokenizer=ImageTokenizer.random(config.image_vocab_size, settings.image_mean, settings.image_std),
    )


def loader_rows(device: str, quick: bool) -> list[dict]:
    batch_size = 2 if quick else 64 if device == "cuda" else 4
    num_workers = 0 if quick else min(16, os.cpu_count() or 1)
    images = [draw_jpeg(80 if quick else 500, seed) for seed in range(4 if quick else 32)]
    dataset = Pairs(images, batch_size * batches_to_time(num_workers))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(device, quick, dataset, batch_size, folder)
        loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=trainer.data_collator)
        loading = seconds_a_batch(iter(loader), num_workers, device)
        batch = trainer.data_collator([dataset[index] for index in range(batch_size)])
        trainer.current_gradient_accumulation_steps = 1
        # Prepared as the training loop does: without it the forward pass would not be in bfloat16.
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        model.train()

        def step() -> None:
            trainer.finite_check.begin_step()
            trainer.training_step(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            trainer.momentum_state.encoder.update_(trainer.model.cots, 0.99)

        stepping = medians({"step": step}, device, 1 if quick else 5, timer=clock_seconds)
        pixels = trainer.pixel_normalizer({"pixel_values": batch["pixel_values"].to(device)})["pixel_values"]
    free(device)
    vision = trainer.model.config.vision_config
    layers = f"{vision.num_hidden_layers} layers of {vision.hidden_size}"
    note = f"{layers}, batch {batch_size}, {num_workers} workers, images of {'80' if quick else '500'} px"
    if device == "cpu":
        note += "; the workers' cores are those of the step, and the base model's step needs a GPU"
    return [
        row("9", "loader pairs/s / step pairs/s", stepping["step"] / loading, ">= 3", note),
        row(
            "bytes",
            "bytes of pixels to the device, floats / ours",
            pixels.nbytes / batch["pixel_values"].nbytes,
            ">= 4",
            f"{batch['pixel_values'].nbytes / batch_size / 1024:.0f} KiB an image of {pixels.shape[-1]} px",
        ),
    ]


def clock_seconds(function, device: str) -> float:
    """Seconds on the clock, as the loader's; a GPU is waited for."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def measure(device: str, quick: bool) -> list[dict]:
    """Rows 8 and 9, and the bytes sent."""
    return [*decoding_rows(32 if quick else 384, quick), *loader_rows(device, quick)]


if __name__ == "__main__":
    run_alone(measure, __doc__)
