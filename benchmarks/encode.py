"""Encoding images and texts: ratios 1a, 1b, 1c and 2, and COTSModel beside the models people would use instead.

    python benchmarks/encode.py                  # ViT-B/16 at 384; on a CPU one image at a time
    python benchmarks/encode.py --device cuda    # batches of 256 in bfloat16, compiled layers too

All weights are random and all sides get the same inputs, so this is about time alone. Texts have the lengths of
Flickr8k's captions (see `caption_lengths`). Printed are ratios of medians: above 1 COTSModel is faster.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from side_by_side import batches_to_time, free, medians, optional, row, run_alone, seconds_a_batch, speed
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from modeling_cots import COTSConfig, COTSModel, compile_layers
from modeling_cots.evaluation.text_encoding import encode_texts
from modeling_cots.search.embedding import Embedder, ImageFolder

QUICK_ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
VOCAB_SIZE, FIRST_WORD = 30_522, 1000  # no special token above


@dataclass
class Sizes:
    """What is encoded, and by models of which depth."""

    encoder: dict
    text_encoder: dict
    images: int
    image_size: int
    texts: int
    text_batch: int
    rounds: int
    dtype: torch.dtype
    files: int

    @property
    def note(self) -> str:
        layers = self.encoder.get("num_hidden_layers", 12)
        return f"{layers} layers, {self.images} x {self.image_size} px, {str(self.dtype).removeprefix('torch.')}"


def choose_sizes(device: str, quick: bool) -> Sizes:
    """Full batches on a GPU, what a CPU does in minutes, or next to nothing."""
    if quick:
        return Sizes(QUICK_ENCODER, QUICK_ENCODER, 2, 32, 16, 8, 2, torch.float32, 4)
    if device == "cpu":
        return Sizes({}, {"num_hidden_layers": 2}, 1, 384, 320, 16, 5, torch.float32, 2)
    return Sizes({}, {}, 256, 384, 5000, 256, 7, torch.bfloat16, 2048)


def caption_lengths(num: int) -> np.ndarray:
    """(num,) tokens a caption: log-normal with Flickr8k's figures: mean 14.4, 95 % below 22, at most 36."""
    shares = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    normal = torch.special.ndtri(shares).numpy()
    lengths = np.clip(np.rint(np.exp(2.627 + 0.283 * normal)), 5, 36).astype(int)
    return np.random.default_rng(0).permutation(lengths)


def draw_captions(num: int, device: str) -> list[torch.Tensor]:
    """`num` token id sequences of those lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(FIRST_WORD, VOCAB_SIZE, (int(length),), generator=generator).to(device)
        for length in caption_lengths(num)
    ]


def encode_padded(bert: BertModel, captions: list[torch.Tensor], batch_size: int, length: int) -> None:
    """What is done without thinking: every caption padded, or cut, to `length`."""
    for start in range(0, len(captions), batch_size):
        input_ids = pad_sequence(captions[start : start + batch_size], batch_first=True)
        input_ids = torch.nn.functional.pad(input_ids, (0, length - input_ids.shape[1]))
        bert(input_ids, attention_mask=(input_ids > 0).long())


def build_image_peers(sizes: Sizes) -> dict[str, tuple]:
    """By name: a function from pixels to embeddings, and the side of its images."""
    size = sizes.image_size
    clip = CLIPModel(CLIPConfig(vision_config={**sizes.encoder, "image_size": size, "patch_size": 16, **_wide(sizes)}))
    vit = ViTConfig(**sizes.encoder, image_size=size, patch_size=16)
    pair = VisionTextDualEncoderModel(
        VisionTextDualEncoderConfig.from_vision_text_configs(vit, BertConfig(**QUICK_ENCODER))
    )
    peers = {
        "HF CLIPModel": (clip, clip.get_image_features, size),
        "HF VisionTextDualEncoder": (pair, pair.get_image_features, size),
    }
    open_clip = optional("open_clip")
    if open_clip is not None and not sizes.encoder:
        for name in ("ViT-B-16", "ViT-B-16-SigLIP-384"):
            model = open_clip.create_model(name, pretrained=None)
            peers[f"open_clip {name}"] = (model, model.encode_image, model.visual.image_size[0])
    return peers


def _wide(sizes: Sizes) -> dict:
    """CLIP's own configuration is ViT-B/32's, as wide as BERT-base unless told otherwise."""
    return {} if sizes.encoder else {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def image_rows(device: str, sizes: Sizes, model: COTSModel) -> Iterator[dict]:
    """1a against timm, and the peers' image encoders, each on images of its own size."""
    timm = optional("timm")
    quick = bool(sizes.encoder)
    pixels = torch.randn(sizes.images, 3, sizes.image_size, sizes.image_size, device=device, dtype=sizes.dtype)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2} if quick else {}
    vit = timm.create_model("vit_base_patch16_384", num_classes=0, img_size=sizes.image_size, **shape)
    vit = vit.eval().to(device, sizes.dtype)
    ratio = speed(lambda: model.encode_image(pixels), lambda: vit.forward_features(pixels), device, sizes.rounds)
    title = "image encoding, ours / timm vit_base_patch16_384.forward_features, eager"
    yield row("1a", title, ratio, ">= 0.99", f"timm {timm.__version__}; {sizes.note}")
    for name, (peer, encode, size) in build_image_peers(sizes).items():
        peer.eval().to(device, sizes.dtype)
        own = pixels[:, :, :size, :size].contiguous()
        interpolate = {} if size == sizes.image_size else {"interpolate_pos_encoding": True}
        ratio = speed(lambda: model.encode_image(own, **interpolate), lambda: encode(own), device, sizes.rounds)  # noqa: B023
        note = f"both on {size} px; {sizes.note}"
        yield row("1p", f"image encoding, ours / {name}", ratio, "peer", note)
        free(device)
    if not quick and optional("open_clip") is None:
        yield row("1p", "image encoding, ours / open_clip", None, "peer", "open_clip_torch is not installed")


def compiled_row(device: str, sizes: Sizes, model: COTSModel) -> dict:
    """1b: our layers compiled, timm as it comes."""
    title = "image encoding, ours with compiled layers / timm eager"
    goal = ">= 1.20, and >= 4,700 images/s on an H200"
    if device == "cpu":
        return row("1b", title, None, goal, "a GPU's row")
    pixels = torch.randn(sizes.images, 3, sizes.image_size, sizes.image_size, device=device, dtype=sizes.dtype)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2} if sizes.encoder else {}
    vit = optional("timm").create_model("vit_base_patch16_384", num_classes=0, img_size=sizes.image_size, **shape)
    vit = vit.eval().to(device, sizes.dtype)
    try:
        compile_layers(model)
    except ValueError as error:  # no compiler here
        return row("1b", title, None, goal, str(error)[:200])
    sides = {"ours": lambda: model.encode_image(pixels), "timm": lambda: vit.forward_features(pixels)}
    times = medians(sides, device, sizes.rounds)
    note = f"{sizes.images / times['ours']:,.0f} images/s; {sizes.note}"
    return row("1b", title, times["timm"] / times["ours"], goal, note)


def write_jpegs(folder: str, num: int) -> None:
    """`num` images of 500 x 375, smooth with some noise, as photographs compress."""
    rng = np.random.default_rng(0)
    for number in range(num):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-12, 13, (375, 500, 3))
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(f"{folder}/{number:05d}.jpg", quality=90)


def end_to_end_row(device: str, sizes: Sizes, model: COTSModel, num_workers: int) -> dict:
    """
    1c: files on the disk to embeddings, as a search index is filled, beside pixels that lie on the device.

    The files are read over and over, so that every worker has many batches and starting it does not count.
    """
    side = {"height": sizes.image_size, "width": sizes.image_size}
    processor = SimpleNamespace(image_processor=ViTImageProcessor(size=side))  # texts are none of its business
    embedder = Embedder(model, processor, batch_size=sizes.images, num_workers=num_workers, thumbnail_side=0)
    pixels = torch.randn(sizes.images, 3, sizes.image_size, sizes.image_size, device=device, dtype=sizes.dtype)
    num_images = sizes.images * batches_to_time(num_workers)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder, sizes.files)
        images = ImageFolder(folder)
        positions = np.resize(np.arange(len(images)), num_images)
        progress = SimpleNamespace(update=lambda count: None)

        def from_files():
            return embedder.tables(images, positions, images.names(), "jpegs", progress), num_workers

        def on_device():
            return (model.encode_image(pixels) for _ in range(batches_to_time(0))), 0

        # Sides give batches that have not begun yet: a call of one that does not count costs nothing.
        ratio = speed(
            from_files, on_device, device, min(sizes.rounds, 5), lambda side, _: seconds_a_batch(*side(), device)
        )
    note = f"{num_images:,} images from {sizes.files} JPEGs of 500 x 375, {num_workers} workers; {sizes.note}"
    return row("1c", "images/s from JPEG files / from tensors on the device", ratio, ">= 0.95", note)


def text_rows(device: str, sizes: Sizes) -> Iterator[dict]:
    """2: captions of real lengths, bucketed by ours, padded to one length by BertModel."""
    config = COTSConfig(text_config=sizes.text_encoder, vision_config={**QUICK_ENCODER, "image_size": 32})
    model = COTSModel(config).eval().to(device, sizes.dtype)
    bert = BertModel(BertConfig(**sizes.text_encoder), add_pooling_layer=False).eval().to(device, sizes.dtype)
    captions = draw_captions(sizes.texts, device)
    sides = {"ours": lambda: encode_texts(model, captions)}
    for length in (77, 32):
        # At 32 the few longer captions are cut, as a tokenizer would.
        cut = [caption[:length] for caption in captions]
        sides[length] = lambda cut=cut, length=length: encode_padded(bert, cut, sizes.text_batch, length)
    times = medians(sides, device, sizes.rounds)
    lengths = caption_lengths(sizes.texts)
    layers = config.text_config.num_hidden_layers
    note = (
        f"{sizes.texts} captions, mean {lengths.mean():.1f}, theirs in batches of {sizes.text_batch}, {layers} layers"
    )
    for length, goal in ((77, ">= 4.8"), (32, ">= 2.0")):
        title = f"text encoding of real captions, ours / BertModel padded to {length}"
        most = length / lengths.mean()
        yield row("2", title, times[length] / times["ours"], goal, f"{note}; {most:.2f} tokens to one")
    yield sentence_transformers_row(device, sizes, model)


def sentence_transformers_row(device: str, sizes: Sizes, model: COTSModel) -> dict:
    """Its `encode` and ours on the same texts, tokenizing included on both sides."""
    title = "text encoding from strings, ours / sentence-transformers with BERT of the same size"
    library = optional("sentence_transformers")
    if library is None:
        return row("2p", title, None, "peer", "sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertTokenizer

    # A word for every id, so that a string has as many tokens as words.
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += [f"word{number}" for number in range(len(names), VOCAB_SIZE)]
    tokenizer = BertTokenizer(vocab={name: number for number, name in enumerate(names)})
    texts = [" ".join(names[number] for number in ids[2:]) for ids in draw_captions(sizes.texts, "cpu")]

    def ours():
        ids = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
        encode_texts(model, ids)

    with tempfile.TemporaryDirectory() as folder:
        bert = BertModel(BertConfig(**sizes.text_encoder))
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        modules = [Transformer(folder), Pooling(bert.config.hidden_size)]
        peer = library.SentenceTransformer(modules=modules, device=device).to(sizes.dtype)

        def theirs():
            peer.encode(texts, batch_size=sizes.text_batch, show_progress_bar=False)

        ratio = speed(ours, theirs, device, sizes.rounds)
    return row("2p", title, ratio, "peer", f"{sizes.texts} texts, {library.__version__}, which sorts by length too")


def build_image_model(device: str, sizes: Sizes) -> COTSModel:
    """With the vision encoder that is timed, and next to no text encoder."""
    torch.manual_seed(0)
    vision = {**sizes.encoder, "image_size": sizes.image_size, "patch_size": 16}
    return COTSModel(COTSConfig(text_config=QUICK_ENCODER, vision_config=vision)).eval().to(device, sizes.dtype)


@torch.no_grad()  # weights made in inference mode would be another kind of tensor to what compiles them
def measure_first(device: str, quick: bool) -> Iterator[dict]:
    """Row 1b, which a GPU is needed for; compiling changes its model for good."""
    sizes = choose_sizes(device, quick)
    yield compiled_row(device, sizes, build_image_model(device, sizes))


@torch.no_grad()
def measure_rest(device: str, quick: bool) -> Iterator[dict]:
    """Rows 1a, 1c, 2 and the peers'."""
    sizes = choose_sizes(device, quick)
    model = build_image_model(device, sizes)
    yield from image_rows(device, sizes, model)
    yield end_to_end_row(device, sizes, model, num_workers=0 if device == "cpu" else 14)
    del model
    free(device)
    yield from text_rows(device, sizes)


def measure(device: str, quick: bool) -> Iterator[dict]:
    """All of them."""
    yield from measure_first(device, quick)
    yield from measure_rest(device, quick)


if __name__ == "__main__":
    run_alone(measure, __doc__)
