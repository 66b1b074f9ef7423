"""The cost model beside what one real training step counts, and beside the closed formula of a transformer."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_cots import COTSConfig, COTSForPreTraining, COTSTrainingArguments
from modeling_cots.training_cost import ATTENTION_FLOP, estimate_training_cost


@pytest.fixture
def arguments(tmp_path):
    def build(**options) -> COTSTrainingArguments:
        return COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)

    return build


def real_batch(trainer) -> dict:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def kept_bytes(trainer, batch: dict) -> int:
    """What autograd keeps of a real step, weights excluded; storages are told apart by their address."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, batch)
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    size = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    del loss
    return size


def test_flop_are_those_of_a_real_training_step(make_trainer, arguments, tiny_config):
    trainer = make_trainer()
    batch = real_batch(trainer)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOP) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    measured = counter.get_total_flops() / len(batch["valid"])
    text_length = batch["input_ids"].shape[1]
    cost = estimate_training_cost(
        tiny_config, arguments(queue_size=20), text_length=text_length, image_tokenizer_hidden_size=8
    )
    # The numbers of masked words and patches are drawn; their heads are small.
    assert cost.total_flop == pytest.approx(measured, rel=0.05)


def test_memory_is_what_a_real_training_step_keeps(make_trainer, arguments, tiny_config):
    trainer = make_trainer()
    batch = real_batch(trainer)
    half = {name: tensor[: len(tensor) // 2] for name, tensor in batch.items()}
    measured = (kept_bytes(trainer, batch) - kept_bytes(trainer, half)) / (len(batch["valid"]) - len(half["valid"]))
    cost = estimate_training_cost(tiny_config, arguments(queue_size=20), text_length=batch["input_ids"].shape[1])
    assert cost.bytes_per_pair == pytest.approx(measured, rel=0.1)


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


def test_a_video_costs_its_frames(arguments, tiny_config):
    options = arguments(queue_size=20, cmvm_weight=0, cmlm_weight=0)
    costs = [estimate_training_cost(tiny_config, options, num_frames=number) for number in (1, 2, 3)]
    for part in ("vision, clean", "vision, momentum"):
        assert costs[2].flop_per_pair[part] == pytest.approx(3 * costs[0].flop_per_pair[part], rel=0.01)
    assert costs[2].flop_per_pair["text, clean"] == costs[0].flop_per_pair["text, clean"]
    kept = [cost.bytes_per_pair for cost in costs]
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=0.01) and kept[1] > 1.2 * kept[0]
    assert costs[2].fixed_bytes == costs[0].fixed_bytes
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        estimate_training_cost(tiny_config, options, num_frames=0)
    with pytest.raises(ValueError, match="for videos set cmvm_weight and cmlm_weight to 0"):
        estimate_training_cost(tiny_config, arguments(queue_size=20), num_frames=4)


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


def test_batch_and_rate_follow_from_the_counts(arguments, tiny_config):
    cost = estimate_training_cost(tiny_config, arguments(queue_size=20))
    assert cost.largest_batch(cost.fixed_bytes - 1) == 0
    assert cost.largest_batch(cost.fixed_bytes + 7 * cost.bytes_per_pair) == 7
    assert cost.pairs_per_second(10 * cost.total_flop) == 10


def test_a_text_without_a_word_is_refused(arguments, tiny_config):
    with pytest.raises(ValueError, match="text_length must be at least 3"):
        estimate_training_cost(tiny_config, arguments(), text_length=2)
