"""The cosine between queued keys and the keys of the same pairs now."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from modeling_cots.method.global_batch import GlobalBatch
from modeling_cots.training.queue_freshness import NUM_PAIRS, QueueFreshness


class Rotation:
    """An objective whose embeddings are the inputs in a plane, turned by an angle in degrees that a test sets."""

    def __init__(self, queue_size: int):
        self.queue = SimpleNamespace(size=queue_size)
        self.degrees, self.num_encoded = 0.0, []

    def momentum_encode(self, inputs):
        self.num_encoded.append(len(inputs["pixel_values"]))
        angles = torch.deg2rad(inputs["pixel_values"] + self.degrees)
        embeds = torch.stack([angles.cos(), angles.sin()], dim=1)
        return embeds, embeds


def add(freshness: QueueFreshness, first: int, size: int = 4, valid: list[bool] | None = None) -> None:
    inputs = {"pixel_values": torch.arange(first, first + size).float(), "names": ["a"] * size}
    inputs["valid"] = torch.tensor([True] * size if valid is None else valid)
    images, texts = Rotation.momentum_encode(freshness.objective, inputs)
    freshness.objective.num_encoded.clear()
    ids = torch.arange(size)
    batch = GlobalBatch(images, texts, pair_ids=ids, caption_ids=ids, valid=inputs["valid"])
    freshness.add(inputs, SimpleNamespace(batch=batch, local=slice(0, size)))


def cosine_of(degrees: float) -> float:
    return torch.deg2rad(torch.tensor(degrees)).cos().item()


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_pairs_are_encoded_again_when_they_are_the_oldest(accelerator):
    freshness = QueueFreshness(Rotation(queue_size=12))
    for step, degrees in enumerate((0.0, 10.0, 20.0, 30.0, 40.0)):  # the keys of step 0 are overwritten in step 3
        freshness.objective.degrees = degrees
        add(freshness, 4 * step)
    assert freshness.drain(accelerator) == pytest.approx(cosine_of(30.0), abs=1e-6)
    assert freshness.drain(accelerator) is None


def test_a_line_of_logs_that_comes_first_measures_them_as_they_are(accelerator):
    freshness = QueueFreshness(Rotation(queue_size=1_000))
    add(freshness, 0, size=NUM_PAIRS + 4, valid=[True] * (NUM_PAIRS + 3) + [False])
    freshness.objective.degrees = 60.0
    assert freshness.drain(accelerator) == pytest.approx(0.5, abs=1e-6)
    assert freshness.objective.num_encoded == [NUM_PAIRS]


def test_pairs_that_could_not_be_read_do_not_count(accelerator):
    freshness = QueueFreshness(Rotation(queue_size=1_000))
    add(freshness, 0, size=2, valid=[False, False])
    assert freshness.drain(accelerator) is None
    add(freshness, 0, size=2)
    assert freshness.drain(accelerator) == pytest.approx(1.0)


@pytest.mark.parametrize("num_before", [0, 1, 4])
def test_what_is_remembered_survives_a_restart(accelerator, num_before):
    run, resumed = (QueueFreshness(Rotation(queue_size=12)) for _ in range(2))
    for step in range(num_before):
        run.objective.degrees = 10.0 * step
        add(run, 4 * step)
    resumed.load_state_dict({**run.state_dict(), "loss": torch.tensor(1.0)})
    for each in (run, resumed):
        each.objective.degrees = 70.0
        add(each, 100)
    assert run.drain(accelerator) == resumed.drain(accelerator)


def test_training_logs_it(make_trainer):
    """A model whose weights move has keys that are not quite fresh; one with a learning rate of 0 has fresh ones."""
    found = {}
    for rate in (0.0, 1e-2):
        trainer = make_trainer(learning_rate=rate, max_steps=6, logging_steps=3, queue_size=20)
        trainer.train()
        found[rate] = [line["queue_freshness"] for line in trainer.state.log_history if "queue_freshness" in line]
    assert found[0.0] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert len(found[1e-2]) == 2 and all(-1 < value < 0.9999 for value in found[1e-2])
