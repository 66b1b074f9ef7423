"""The cost model beside what one real training step counts, and beside the closed formula of a transformer."""

import re
from pathlib import Path

import pytest
import torch

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainingArguments
from modeling_cots.scripts import cost
from modeling_cots.scripts.cost import estimate_training_cost, flop_counter, kept_bytes
from modeling_cots.training.recomputed_activations import IS_SEEN

UNFROZEN = {"freeze_vision": "none", "freeze_text": "none"}
FROZEN = [
    {"freeze_vision": "1"},
    {"freeze_vision": "1", "freeze_text": "1"},
    {"freeze_vision": "all", "freeze_text": "1"},
    {"freeze_vision": "all", "freeze_text": "all", "cmvm_weight": 0, "cmlm_weight": 0},
]


@pytest.fixture
def arguments(tmp_path):
    def build(**options) -> COTSTrainingArguments:
        return COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)

    return build


def real_batch(trainer) -> dict:
    """A batch for a step whose momentum copy lags behind, as the estimate counts it."""
    trainer.momentum_state.encoder.is_copy = False
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_flop_are_those_of_a_real_training_step(make_trainer, arguments, tiny_config):
    trainer = make_trainer()
    batch = real_batch(trainer)
    with flop_counter() as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    measured = counter.get_total_flops() / len(batch["valid"])
    text_length = batch["input_ids"].shape[1]
    cost = estimate_training_cost(
        tiny_config, arguments(queue_size=20), text_length=text_length, image_tokenizer_hidden_size=8
    )
    # The numbers of masked words and patches are drawn; their heads are small.
    assert cost.total_flop == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("options", FROZEN, ids=str)
def test_frozen_layers_cost_what_they_cost_a_real_step(make_trainer, arguments, tiny_config, options):
    trainer = make_trainer(**options)
    batch = real_batch(trainer)
    with flop_counter() as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    measured = counter.get_total_flops() / len(batch["valid"])
    shapes = {"text_length": batch["input_ids"].shape[1], "image_tokenizer_hidden_size": 8}
    cost = estimate_training_cost(tiny_config, arguments(queue_size=20, **options), **shapes)
    assert cost.total_flop == pytest.approx(measured, rel=0.05)
    heads_off = "cmvm_weight" in options
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    heads = cost.num_parameters["heads"] if heads_off else 0  # those of losses that are off count as trained here
    assert cost.num_trained_parameters == trained + heads
    whole = estimate_training_cost(tiny_config, arguments(queue_size=20, **options | UNFROZEN), **shapes)
    assert cost.total_flop < whole.total_flop and cost.fixed_bytes < whole.fixed_bytes
    assert cost.bytes_per_pair < whole.bytes_per_pair


def test_what_is_frozen_whole_goes_forward_once(arguments, tiny_config):
    options = {"cmvm_weight": 0, "cmlm_weight": 0}
    plain = estimate_training_cost(tiny_config, arguments(**options)).flop_per_pair
    frozen = estimate_training_cost(tiny_config, arguments(freeze_vision="all", **options)).flop_per_pair
    projection = 2 * 32 * 16  # of a FLOP count of width 32 to 16; backward, its weights alone
    assert frozen["vision, momentum"] == projection
    assert frozen["vision, unmasked"] == plain["vision, momentum"] + projection
    assert frozen["text, unmasked"] == plain["text, unmasked"]


@pytest.mark.parametrize("text", ["all", "1"])
def test_cached_features_cost_no_encoder(make_trainer, arguments, tiny_config, tmp_path, text):
    cache = {"feature_cache": str(tmp_path / "features"), "min_crop_scale": 1.0}
    # A comparison with the batch depends on its size, and would be a tenth of what is left to count.
    options = {**FROZEN[3], **cache, "freeze_text": text, "batch_candidates": False}
    trainer = make_trainer(**options)
    batch = real_batch(trainer)
    with flop_counter() as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    measured = counter.get_total_flops() / len(batch["valid"])
    length = 24 if text == "all" else batch["input_ids"].shape[1]
    cost = estimate_training_cost(tiny_config, arguments(queue_size=20, **options), text_length=length)
    assert cost.total_flop == pytest.approx(measured, rel=0.05)
    assert cost.flop_per_pair["vision, momentum"] == 2 * 32 * 16


def kept_by_real_step(trainer, batch: dict) -> float:
    """Bytes of one pair more."""
    half = {name: tensor[: len(tensor) // 2] for name, tensor in batch.items()}
    whole_size, half_size = (
        kept_bytes(lambda part=part: trainer.compute_loss(trainer.model, part), trainer.model)
        for part in (batch, half)
    )
    return (whole_size - half_size) / (len(batch["valid"]) - len(half["valid"]))


@pytest.mark.parametrize("options", [{}, *FROZEN], ids=str)
def test_memory_is_what_a_real_training_step_keeps(make_trainer, arguments, tiny_config, options):
    trainer = make_trainer(**options)
    batch = real_batch(trainer)
    measured, text_length = kept_by_real_step(trainer, batch), batch["input_ids"].shape[1]
    cost = estimate_training_cost(tiny_config, arguments(queue_size=20, **options), text_length=text_length)
    assert cost.bytes_per_pair == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(not IS_SEEN, reason="this torch does not tell what it keeps")
@pytest.mark.parametrize("options", [{}, FROZEN[1]], ids=str)
def test_what_is_computed_again_counts_for_one_layer(make_trainer, arguments, tiny_config, options):
    def pass_of(model) -> float:
        return kept_bytes(lambda: model.cots.vision_model(torch.zeros(4, 3, 32, 32)), model) / 4

    plain = make_trainer(**options).model
    trainer = make_trainer(**options, recompute_activations=True)
    trainer.frozen.eval_()  # as every step does
    num_layers = 1 if options else 2
    layer = (pass_of(plain) - pass_of(trainer.model)) / num_layers
    batch = real_batch(trainer)
    measured, text_length = kept_by_real_step(trainer, batch) + layer, batch["input_ids"].shape[1]
    costs = [
        estimate_training_cost(
            tiny_config,
            arguments(queue_size=20, recompute_activations=recompute, **options),
            text_length=text_length,
        )
        for recompute in (False, True)
    ]
    assert costs[1].bytes_per_pair == pytest.approx(measured, rel=0.1)
    assert costs[1].bytes_per_pair < costs[0].bytes_per_pair
    assert costs[1].flop_per_pair == costs[0].flop_per_pair


def test_a_split_model_leaves_a_device_its_part_and_what_runs_just_now(tiny_config, arguments):
    """Two layers of the larger encoder and all that is in no layer are whole, with their gradients."""
    options = {"queue_size": 20, "bf16": True}
    whole = estimate_training_cost(tiny_config, arguments(**options))
    split, groups = (
        estimate_training_cost(tiny_config, arguments(shard_model=True, shard_replicas=each, **options), num_devices=8)
        for each in (1, 2)
    )
    inside: dict[str, int] = {}
    for name, parameter in COTSForPreTraining(tiny_config).named_parameters():
        if layer := re.match(r".*\.layers?\.\d+\.", name):
            inside[layer.group()] = inside.get(layer.group(), 0) + parameter.numel()
    total = sum(whole.num_parameters.values())
    gathered = 2 * 2 * (total - sum(inside.values()) + sum(sorted(inside.values())[-2:]))
    queue = 20 * (2 * tiny_config.projection_dim + 1) * 4 + 20 * 8
    kept = whole.fixed_bytes - queue - 2 * total  # without what autocast keeps of each weight
    assert split.fixed_bytes == kept // 8 + gathered + queue
    assert groups.fixed_bytes == kept // 4 + gathered + queue
    assert split.bytes_per_pair == whole.bytes_per_pair


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a peak of memory needs a GPU")
@pytest.mark.parametrize("option", [None, "recompute_activations", "gradient_checkpointing"])
def test_memory_is_what_a_gpu_allocates(monkeypatch, option):
    """The base model's pair, as the slope between two batches: to a tenth, as the estimate promises."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from memory import estimate, peak_bytes

    options = {} if option is None else {option: True}
    few, many = (peak_bytes(COTSConfig(), batch_size, **options) for batch_size in (16, 32))
    assert estimate(COTSConfig(), bf16=True, **options).bytes_per_pair == pytest.approx((many - few) / 16, rel=0.1)


def test_the_papers_model_meets_the_closed_formula(arguments):
    cost = estimate_training_cost(COTSConfig(), arguments(bf16=True))
    width, layers = 768, 12

    def encoder(tokens: int) -> float:
        # Query, key, value, output: 4 matrices of width^2; the MLP: 8; scores and their use: 2 tokens^2 width.
        return layers * 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)

    patches = 24 * 24
    projection = 2 * width * 256
    vision = encoder(1 + patches) + 2 * patches * (16 * 16 * 3) * width + projection
    assert cost.flop_per_pair["vision, momentum"] == pytest.approx(vision, rel=1e-6)
    assert cost.flop_per_pair["text, momentum"] == pytest.approx(encoder(32) + projection, rel=1e-6)
    assert cost.num_parameters["projections"] == 2 * (width * 256 + 256)


def test_the_papers_pair_costs_what_the_documentation_says(arguments):
    """docs/performance.md: 976 GFLOP at 32 tokens and a queue of 16,384, and 823 with cached image tokens."""
    args = arguments(bf16=True, queue_size=16_384)
    cost = estimate_training_cost(COTSConfig(), args)
    assert cost.total_flop == pytest.approx(976e9, rel=1e-3)
    cached = estimate_training_cost(COTSConfig(), args, image_tokenizer_hidden_size=None)
    assert cached.total_flop == pytest.approx(823e9, rel=1e-3)
    assert cost.flop_per_pair["vision, masked"] == pytest.approx(332.2e9, rel=1e-3)


def test_videos_cost_a_image_for_each_frame(arguments, tiny_config):
    args = arguments(queue_size=20, cmvm_weight=0, cmlm_weight=0)
    images = estimate_training_cost(tiny_config, args)
    videos = estimate_training_cost(tiny_config, args, num_frames=4)
    assert videos.flop_per_pair["vision, unmasked"] == 4 * images.flop_per_pair["vision, unmasked"]
    assert videos.flop_per_pair["text, unmasked"] == images.flop_per_pair["text, unmasked"]
    assert images.bytes_per_pair < videos.bytes_per_pair < 4 * images.bytes_per_pair
    with pytest.raises(ValueError, match="without masked losses"):
        estimate_training_cost(tiny_config, arguments(), num_frames=4)
    with pytest.raises(ValueError, match="num_frames must be at least 1"):
        estimate_training_cost(tiny_config, args, num_frames=0)


def test_parameters_are_those_of_the_model(arguments, tiny_config):
    cost = estimate_training_cost(tiny_config, arguments())
    assert sum(cost.num_parameters.values()) == COTSForPreTraining(tiny_config).num_parameters()


def test_a_loss_that_is_off_costs_nothing(arguments, tiny_config):
    everything = estimate_training_cost(tiny_config, arguments(queue_size=20))
    contrast_only = estimate_training_cost(tiny_config, arguments(queue_size=20, cmvm_weight=0, cmlm_weight=0))
    assert set(everything.flop_per_pair) - set(contrast_only.flop_per_pair) == {
        "vision, masked",
        "text, masked",
        "patch head",
        "word head",
        "image tokenizer",
    }
    assert contrast_only.bytes_per_pair < 0.7 * everything.bytes_per_pair


def test_checkpointing_trades_memory_for_flop(arguments, tiny_config):
    plain = estimate_training_cost(tiny_config, arguments(queue_size=20))
    checkpointed = estimate_training_cost(tiny_config, arguments(queue_size=20, gradient_checkpointing=True))
    assert checkpointed.bytes_per_pair < plain.bytes_per_pair
    assert checkpointed.total_flop > plain.total_flop


def test_what_torch_does_not_tell_is_not_counted(arguments, tiny_config, monkeypatch):
    monkeypatch.setattr(cost, "IS_SEEN", False)
    with pytest.raises(ValueError, match="can be counted with torch 2.14, not with 2"):
        estimate_training_cost(tiny_config, arguments(recompute_activations=True))


def test_batch_and_rate_follow_from_the_counts(arguments, tiny_config):
    cost = estimate_training_cost(tiny_config, arguments(queue_size=20))
    assert cost.largest_batch(cost.fixed_bytes - 1) == 0
    assert cost.largest_batch(cost.fixed_bytes + 7 * cost.bytes_per_pair) == 7
    assert cost.pairs_per_second(10 * cost.total_flop) == 10


def test_a_text_without_a_word_is_refused(arguments, tiny_config):
    with pytest.raises(ValueError, match="text_length must be at least 3"):
        estimate_training_cost(tiny_config, arguments(), text_length=2)
