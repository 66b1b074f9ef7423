"""What a training step costs beside its parts, and what each optimization of it is worth.

    python benchmarks/step.py --device cpu     # base size, 2 pairs with images of 192 pixels: minutes
    python benchmarks/step.py --device cuda    # base size in bf16, 256 pairs with images of 384 pixels

A step is COTSTrainer's own: losses, finite check, backward pass, clipping, optimizer, momentum update. Weights and
pairs are random, and loading pairs is not part of it. Where a GPU has too little memory, all is measured again with
half the batch. Compiled layers take turns with eager ones, two trainers with half the batch each.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from side_by_side import free, medians, row, run_alone, speed
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertTokenizer

from modeling_cots import (
    COTSConfig,
    COTSForPreTraining,
    COTSModel,
    COTSTrainer,
    COTSTrainingArguments,
    ImageTokenizer,
    ScenesDataset,
    compile_layers,
    modeling_cots_pretraining,
)
from modeling_cots.evaluation.text_encoding import encode_texts
from modeling_cots.method.losses import masked_token_loss
from modeling_cots.method.momentum import MomentumEncoder
from modeling_cots.scripts.factory import build_processor

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
DVAE_WIDTH = 256
CAPTIONS_OF_A_BATCH = 320  # five each of 64 images
GIB = 2**30


@dataclass
class Sizes:
    """What is timed: fields of the encoders' configurations, and how many pairs of how many tokens."""

    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    batch: int = 256
    text_length: int = 32
    codebook_width: int = DVAE_WIDTH
    image_vocab_size: int = 8192
    queue_size: int = 12_800
    rounds: int = 7
    did_not_fit: int | None = None  # the batch before this one

    def describe(self) -> str:
        vision = {"num_hidden_layers": 12, "hidden_size": 768, "image_size": 384, **self.vision}
        described = (
            f"{vision['num_hidden_layers']} layers of {vision['hidden_size']}, {vision['image_size']} pixels, "
            f"{self.batch} pairs"
        )
        return described if self.did_not_fit is None else f"{described}, as {self.did_not_fit} did not fit"

    def halve(self) -> "Sizes":
        return replace(self, batch=self.batch // 2)


def choose_sizes(device: str, quick: bool) -> Sizes:
    if quick:
        vision = {**TINY, "image_size": 64, "patch_size": 16}
        return Sizes(TINY, vision, 4, 8, codebook_width=8, image_vocab_size=64, queue_size=64, rounds=1)
    if device == "cpu":
        # All layers, so that encoders, image tokenizer and optimizer keep their proportions; few and small images.
        return Sizes(vision={"image_size": 192}, batch=2, text_length=16, rounds=5)
    # Row 5 counts 515 MB a pair: 256 of them need 132 GB, and an H100 has 80.
    return Sizes(batch=256 if torch.cuda.mem_get_info()[1] > 128 * GIB else 128)


class Step:
    """A trainer with one batch, and its step as the training loop takes it."""

    def __init__(self, device: str, sizes: Sizes, folder: str, optim: str = "adamw_torch_fused", **arguments):
        torch.manual_seed(0)
        config = COTSConfig(text_config=sizes.text, vision_config=sizes.vision)
        config.image_vocab_size = sizes.image_vocab_size
        self.device, self.sizes, self.config = device, sizes, config
        processor = build_processor(config, BertTokenizer(), None)
        normalization = processor.image_processor.image_mean, processor.image_processor.image_std
        self.trainer = COTSTrainer(
            model=COTSForPreTraining(config),
            args=COTSTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=sizes.batch,
                queue_size=sizes.queue_size,
                optim=optim,
                bf16=device == "cuda",
                use_cpu=device == "cpu",
                report_to="none",
                **arguments,
            ),
            train_dataset=ScenesDataset("train", sizes.batch, config.image_size[0]),
            processing_class=processor,
            image_tokenizer=ImageTokenizer.random(
                sizes.image_vocab_size, *normalization, hidden_size=sizes.codebook_width
            ),
        )
        accelerator = self.trainer.accelerator
        self.trainer.current_gradient_accumulation_steps = 1
        self.model, self.optimizer = accelerator.prepare(self.trainer.model, self.trainer.create_optimizer())
        self.model.train()
        self.batch = self.draw_batch()
        self.tokens = self.trainer.image_tokenizer(self.batch["pixel_values"], config.patch_size)

    def draw_batch(self) -> dict[str, torch.Tensor]:
        sizes, (height, width) = self.sizes, self.config.image_size
        num_patches = height // self.config.patch_size[0] * (width // self.config.patch_size[1])
        input_ids = torch.randint(5, self.config.text_config.vocab_size, (sizes.batch, sizes.text_length))
        words = torch.rand(input_ids.shape) < 0.15
        batch = {
            "pixel_values": torch.randn(sizes.batch, 3, height, width),
            "bool_masked_pos": torch.rand(sizes.batch, num_patches) < 0.4,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "masked_input_ids": input_ids.masked_fill(words, 4),
            "text_targets": input_ids.masked_fill(~words, -100),
            "pair_ids": torch.arange(sizes.batch),
            "valid": torch.ones(sizes.batch, dtype=torch.bool),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def take(self) -> None:
        self.optimizer.zero_grad()
        self.trainer.finite_check.begin_step()
        self.trainer.training_step(self.model, self.batch)
        self.move()

    def move(self) -> None:
        """What comes after the backward pass."""
        self.trainer.check_step(self.clip())
        self.optimizer.step()
        self.update()

    def clip(self) -> torch.Tensor:
        return self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)

    def update(self) -> None:
        self.trainer.momentum_state.encoder.update_(self.trainer.model.cots, 0.99)

    def take_with_cached_tokens(self) -> None:
        """The step without the image tokenizer, whose answer is at hand."""
        made_on_line, self.batch = self.batch, {**self.batch, "image_tokens": self.tokens}
        self.take()
        self.batch = made_on_line

    # ------------------------------------------------------------------------------------------- its parts, alone

    def parts(self) -> dict[str, Callable]:
        """Everything that a step has to compute, each part from tensors that are there already."""
        cots, batch, trainer = self.trainer.model.cots, self.batch, self.trainer
        pixels, ids, mask = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
        return {
            "vision, unmasked": self.with_backward(lambda: cots.run_vision_model(pixels).last_hidden_state),
            "vision, masked": self.with_backward(
                lambda: cots.run_vision_model(pixels, batch["bool_masked_pos"]).last_hidden_state
            ),
            "text, unmasked": self.with_backward(lambda: cots.run_text_model(ids, mask).last_hidden_state),
            "text, masked": self.with_backward(
                lambda: cots.run_text_model(batch["masked_input_ids"], mask).last_hidden_state
            ),
            "momentum encoders": lambda: trainer.cots_objective.momentum_encode(batch),
            "image tokenizer": lambda: trainer.image_tokenizer(pixels, self.config.patch_size),
            "contrast and KL": self.with_backward(self.contrast),
            "patch head": self.with_backward(self.patch_head()),
            "word head": self.with_backward(self.word_head()),
            "clipping": self.clip,
            "optimizer": self.optimizer.step,
            "momentum update": self.update,
        }

    def with_backward(self, part: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run():
            with self.trainer.accelerator.autocast():
                output = part()
            output.sum().backward()

        return run

    def contrast(self) -> torch.Tensor:
        objective, size = self.trainer.cots_objective, self.sizes.batch
        query = torch.zeros(size, self.config.projection_dim, device=self.device, requires_grad=True)
        gathered, local = objective.gather(query.detach(), query.detach(), self.batch)
        logits, _ = objective.contrast(query, query, gathered, local)
        return sum(objective.contrastive_losses(*logits, gathered.valid, size).values())

    def patch_head(self) -> Callable[[], torch.Tensor]:
        masked, model = self.batch["bool_masked_pos"], self.trainer.model
        return self.head(masked, self.tokens[masked], model.cmvm_head, self.config.vision_config.hidden_size)

    def word_head(self) -> Callable[[], torch.Tensor]:
        masked, model = self.batch["text_targets"] != -100, self.trainer.model
        targets = self.batch["text_targets"][masked]
        return self.head(masked, targets, model.cmlm_head, self.config.text_config.hidden_size)

    def head(self, masked, targets, head: nn.Module, size: int) -> Callable[[], torch.Tensor]:
        hidden_states = torch.randn(*masked.shape, size, device=self.device, requires_grad=True)
        keep = torch.ones_like(targets, dtype=torch.bool)
        return lambda: masked_token_loss(head(hidden_states[masked]), targets, keep, len(targets))


def step_rows(device: str, sizes: Sizes, step: Step) -> list[dict]:
    """3a, 3c and 4."""
    sides = {"step": step.take, "cached": step.take_with_cached_tokens, **step.parts()}
    times = medians(sides, device, sizes.rounds)
    whole, cached = times.pop("step"), times.pop("cached")
    largest = sorted(times, key=times.get, reverse=True)[:4]
    shares = ", ".join(f"{name} {times[name] / whole:.0%}" for name in largest)
    rows = [
        row(
            "3a",
            "training step / sum of its parts",
            whole / sum(times.values()),
            "<= 1.05",
            f"{sizes.describe()}: {shares}",
        ),
        row("3c", "step with image tokens made on line / cached", whole / cached, "<= 1.22", sizes.describe()),
    ]
    for batch, goal in ((256, "<= 0.2"), (48, "<= 1")):
        # The update does not depend on the batch, nor does the optimizer; the rest of a step grows with it.
        fixed = times["momentum update"] + times["optimizer"] + times["clipping"]
        scaled = fixed + (cached - fixed) * batch / sizes.batch
        note = f"from {sizes.describe()}, cached image tokens; the passes are scaled to {batch} pairs"
        title = f"momentum update, % of a step of {batch} pairs"
        rows.append(row("4", title, 100 * times["momentum update"] / scaled, goal, note))
    return rows


def measured_speed_rows(device: str, sizes: Sizes, step: Step) -> list[dict]:
    """3b; nothing is measured on a CPU."""
    if device == "cpu":
        return speed_rows(device, sizes, 0.0, 0.0)
    times = medians({"step": step.take, "cached": step.take_with_cached_tokens}, device, sizes.rounds)
    return speed_rows(device, sizes, times["step"], times["cached"])


def speed_rows(device: str, sizes: Sizes, whole: float, cached: float) -> list[dict]:
    """3b, from the seconds of a step with image tokens made on line and with cached ones."""
    rows = []
    for tokens, seconds, goal in (("cached", cached, 625), ("made on line", whole, 494)):
        ratio, note = None, "a GPU's row"
        if device != "cpu":
            ratio = sizes.batch / seconds
            note = f"{torch.cuda.get_device_name()}: {sizes.describe()}, {sizes.text_length} tokens, eager layers"
        rows.append(row("3b", f"pairs/s of a step, image tokens {tokens}", ratio, f">= {goal} on an H200", note))
    return rows


def pass_rows(device: str, sizes: Sizes, step: Step) -> list[dict]:
    """Unmasked and masked pass as one batch, beside one after the other, for images and for texts."""
    model, batch, limit = step.trainer.model, step.batch, modeling_cots_pretraining.MAX_JOINED_POSITIONS
    texts = (batch["masked_input_ids"], batch["attention_mask"], None)
    rows = []
    for size in sorted({1, min(4, sizes.batch), sizes.batch}):

        def run(joined_up_to: int, encoder: str, size=size) -> None:
            modeling_cots_pretraining.MAX_JOINED_POSITIONS = joined_up_to
            with step.trainer.accelerator.autocast():
                if encoder == "images":
                    passes = model._run_vision_passes(batch["pixel_values"][:size], batch["bool_masked_pos"][:size])
                else:
                    tensors = [None if tensor is None else tensor[:size] for tensor in texts]
                    passes = model._run_text_passes(batch["input_ids"][:size], *tensors)
            sum(each.last_hidden_state.float().square().mean() for each in passes).backward()

        for encoder, width in (("images", batch["bool_masked_pos"].shape[1]), ("texts", sizes.text_length)):
            joined, apart = (lambda n=n, s=encoder: run(n, s) for n in (2**40, 0))
            try:
                ratio = 1 / speed(joined, apart, device, sizes.rounds)
            finally:  # where memory ends, too
                modeling_cots_pretraining.MAX_JOINED_POSITIONS = limit
            note = f"{size} pairs, {2 * size * width} positions; joined up to {limit}"
            rows.append(row("views", f"{encoder}: both passes joined / one after the other", ratio, "<= 1", note))
    return rows


def optimizer_row(device: str, sizes: Sizes, step: Step, folder: str) -> dict:
    plain = Step(device, sizes, folder, optim="adamw_torch")
    for one in (step, plain):
        one.take()
        one.trainer.training_step(one.model, one.batch)
    ratio = 1 / speed(step.optimizer.step, plain.optimizer.step, device, sizes.rounds)
    return row("optim", "optimizer: fused / adamw_torch", ratio, "<= 1", sizes.describe())


def update_row(device: str, quick: bool, sizes: Sizes) -> dict:
    """On parameter lists of the full size in any case."""
    config = COTSConfig(text_config=sizes.text, vision_config=sizes.vision) if quick else COTSConfig()
    online = COTSForPreTraining(config).cots.to(device)
    slow, by_loop = MomentumEncoder(online), copy.deepcopy(online)

    @torch.no_grad()
    def loop():
        for parameter, moving in zip(by_loop.parameters(), online.parameters(), strict=True):
            parameter.data = parameter.data * 0.99 + moving.data * (1 - 0.99)

    ratio = 1 / speed(lambda: slow.update_(online, 0.99), loop, device, sizes.rounds)
    num_millions = sum(parameter.numel() for parameter in online.parameters()) / 1e6
    return row("update", "momentum update: foreach / loop", ratio, "<= 0.23", f"{num_millions:.1f}M parameters")


def layout_row(device: str, quick: bool, sizes: Sizes) -> dict:
    """The image tokenizer with weights in channels-last order, as it is, beside the plain order."""
    grid = 8 if quick else 24
    ours = ImageTokenizer.random(sizes.image_vocab_size, [0.5] * 3, [0.5] * 3, hidden_size=sizes.codebook_width)
    ours = ours.to(device)
    plain = copy.deepcopy(ours)
    plain.codebook.to(memory_format=torch.contiguous_format)
    pixels = torch.randint(256, (min(sizes.batch, 32), 3, 16 * grid, 16 * grid), dtype=torch.uint8, device=device)
    ratio = speed(lambda: ours(pixels, (16, 16)), lambda: plain(pixels, (16, 16)), device, sizes.rounds)
    note = f"dVAE {sizes.codebook_width} wide, {len(pixels)} images, {grid} x {grid} tokens, float32"
    return row("dvae", "image tokenizer: plain memory layout / channels last", ratio, ">= 1.41", note)


@torch.no_grad()
def text_row(device: str, quick: bool, sizes: Sizes) -> dict:
    """Captions as `embed_pairs` encodes them, beside those of 64 images at a time, padded to their longest."""
    layers = {} if device == "cuda" else {"num_hidden_layers": 1}
    config = COTSConfig(text_config={**sizes.text, **layers}, vision_config={**TINY, "image_size": 64})
    model = COTSModel(config).eval().to(device)
    lengths = torch.empty(64 if quick else 1280).log_normal_(2.627, 0.283).round().clamp(5, 36).int().tolist()
    texts = [torch.randint(5, 30_000, (length,)) for length in lengths]

    def padded():
        for start in range(0, len(texts), CAPTIONS_OF_A_BATCH):
            input_ids = pad_sequence(texts[start : start + CAPTIONS_OF_A_BATCH], batch_first=True).to(device)
            model.encode_text(input_ids, (input_ids > 0).long()).cpu()

    ratio = speed(lambda: encode_texts(model, texts), padded, device, sizes.rounds)
    note = f"{len(texts)} captions of Flickr8k's lengths, mean {sum(lengths) / len(lengths):.1f}, "
    note += f"{config.text_config.num_hidden_layers} layers; padded: {CAPTIONS_OF_A_BATCH} at a time"
    return row("texts", "captions: padded to the longest of a batch / by length", ratio, ">= 1", note)


def compiled_row(device: str, sizes: Sizes, folder: str) -> dict:
    """Layers are compiled for good, so the sides are two trainers; both are on the device, hence half the batch."""
    title, goal = "step: layers compiled / eager", "<= 0.85"
    if device == "cpu":
        return row("compile", title, None, goal, "an optimization for GPUs")
    half = sizes.halve()
    eager, compiled = Step(device, half, folder), Step(device, half, folder)
    try:
        compile_layers(compiled.trainer.model)
        compile_layers(compiled.trainer.momentum_state.encoder)
    except ValueError as error:  # no compiler here
        return row("compile", title, None, goal, str(error)[:200])
    sides = {"eager": eager.take, "compiled": compiled.take}
    for take in sides.values():  # layers are compiled in the first call; `medians` makes a second that does not count
        take()
    times = medians(sides, device, sizes.rounds)
    note = f"half the batch: {half.describe()}; {half.batch / times['compiled']:,.0f} pairs/s compiled, tokens on line"
    return row("compile", title, times["compiled"] / times["eager"], goal, note)


def recomputed_row(device: str, sizes: Sizes, folder: str) -> dict:
    """The step that computes what is cheap again, to save its memory; layers are set for good, hence two trainers."""
    sizes = sizes if device == "cpu" else sizes.halve()
    plain, again = (Step(device, sizes, folder, recompute_activations=flag) for flag in (False, True))
    times = medians({"plain": plain.take, "again": again.take}, device, sizes.rounds)
    title = "step: activations computed again / kept"
    return row("recompute", title, times["again"] / times["plain"], "none", sizes.describe())


def first_rows(device: str, sizes: Sizes) -> list[dict]:
    """The speed of a step, and of one with compiled layers."""
    with tempfile.TemporaryDirectory() as folder:
        step = Step(device, sizes, folder)
        rows = measured_speed_rows(device, sizes, step)
        del step
        free(device)
        return [*rows, compiled_row(device, sizes, folder)]


def other_rows(device: str, sizes: Sizes) -> list[dict]:
    """All other rows that need the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        step = Step(device, sizes, folder)
        rows = step_rows(device, sizes, step) + pass_rows(device, sizes, step)
        rows.append(optimizer_row(device, sizes, step, folder))
        del step
        free(device)
        return [*rows, recomputed_row(device, sizes, folder)]


def of_largest_batch(rows_of: Callable[[str, Sizes], list[dict]], device: str, quick: bool) -> list[dict]:
    """What `rows_of` measures with the first batch that fits, each half as large as the one before."""
    sizes = choose_sizes(device, quick)
    while True:
        free(device)
        try:
            return rows_of(device, sizes)
        except torch.cuda.OutOfMemoryError:
            if sizes.batch < 4:  # the compiled layers take half of it
                raise
            sizes = replace(sizes.halve(), did_not_fit=sizes.batch)


def measure_first(device: str, quick: bool) -> Iterator[dict]:
    """Rows 3b, and compiled layers, which a GPU is needed for."""
    yield from of_largest_batch(first_rows, device, quick)


def measure_rest(device: str, quick: bool) -> Iterator[dict]:
    """Rows 3a, 3c and 4, and one for each optimization."""
    sizes = choose_sizes(device, quick)
    yield update_row(device, quick, sizes)
    yield text_row(device, quick, sizes)
    yield layout_row(device, quick, sizes)
    yield from of_largest_batch(other_rows, device, quick)


def measure(device: str, quick: bool) -> Iterator[dict]:
    """All of them."""
    yield from measure_first(device, quick)
    yield from measure_rest(device, quick)


if __name__ == "__main__":
    run_alone(measure, __doc__)
