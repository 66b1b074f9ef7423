"""Captions that run in groups of similar length: what they give, when they do not, and that nothing else notices."""

import copy

import pytest
import torch
from encoder_kinds import PAIRS_OF_KINDS, cots_config
from trainer_states import state_of

from modeling_cots import COTSModel, ScenesDataset
from modeling_cots.training import short_captions
from modeling_cots.training.frozen_layers import replaced
from modeling_cots.training.short_captions import group_by_length, run_by_length

LENGTHS = [3, 12, 5, 4, 12, 3, 9, 7]


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    """Eight captions of 3 to 12 tokens, padded on the right."""
    torch.manual_seed(0)
    mask = (torch.arange(12) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.randint(5, 99, mask.shape) * mask, "attention_mask": mask}


@pytest.fixture(autouse=True)
def any_saving(monkeypatch):
    monkeypatch.setattr(short_captions, "MIN_SAVED", 1)


def test_groups_have_the_length_of_their_longest_caption(texts):
    groups = [(rows.tolist(), length) for rows, length in group_by_length(**texts, others={})]
    assert groups == [([0, 5], 3), ([3, 2], 5), ([7, 6], 9), ([1, 4], 12)]


@pytest.mark.parametrize("text", [text for text, _ in PAIRS_OF_KINDS])
def test_gives_every_kind_of_encoder_the_same_embeddings_and_gradients(texts, text):
    torch.manual_seed(0)
    plain = COTSModel(cots_config(text)).eval()
    grouped = copy.deepcopy(plain)
    sizes: list[tuple] = []
    grouped.text_model.get_input_embeddings().register_forward_hook(lambda m, args, out: sizes.append(out.shape[:2]))
    found = []
    for model in (plain, grouped):
        with run_by_length([model.text_model] if model is grouped else []):
            output = model.run_text_model(**texts)
        real = output.last_hidden_state * texts["attention_mask"].unsqueeze(-1)
        (output.pooler_output.sin().sum() + real.cos().sum()).backward()
        gradients = {name: p.grad for name, p in model.text_model.named_parameters() if p.grad is not None}
        found.append({"pooled": output.pooler_output, "real": real, **gradients})
    assert sizes == [(2, 3), (2, 5), (2, 9), (2, 12)]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": None},
        {"output_hidden_states": True},
        {"position_ids": torch.arange(12)[None]},
        {"attention_mask": torch.ones(8, 12, dtype=torch.long)},
        {"attention_mask": torch.ones(8, 12, dtype=torch.long).tril(0).flip(1)},
    ],
    ids=["no mask", "all layers", "positions of no batch", "no padding", "padded on the left"],
)
def test_whatever_cannot_be_grouped_runs_as_it_is(texts, change):
    encoder = COTSModel(cots_config()).eval().text_model
    expected = encoder(**{**texts, **change})
    runs: list[tuple] = []
    encoder.embeddings.register_forward_hook(lambda module, args, output: runs.append(output.shape[:2]))
    with run_by_length([encoder]):
        found = encoder(**{**texts, **change})
    assert runs == [(8, 12)] and torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert found.keys() == expected.keys()


def test_little_padding_is_not_worth_a_further_call(texts, monkeypatch):
    monkeypatch.setattr(short_captions, "MIN_SAVED", 39)
    assert sum(2 * length for length in (3, 5, 9, 12)) == 8 * 12 - 38
    assert group_by_length(**texts, others={}) is None


def test_outside_of_the_context_the_encoder_runs_whole(texts):
    """Inside of another replacement, as a frozen encoder has, too: what was there before comes back."""
    encoder = COTSModel(cots_config()).eval().text_model
    runs: list[tuple] = []
    encoder.embeddings.register_forward_hook(lambda module, args, output: runs.append(output.shape[:2]))
    with run_by_length([encoder]):
        with replaced(encoder, lambda **given: None):
            assert encoder(**texts) is None
        encoder(**texts)
        assert len(runs) == 4
    encoder(**texts)
    assert runs[4:] == [(8, 12)] and "forward" not in vars(encoder)


def test_token_types_are_those_of_the_captions(texts):
    texts["token_type_ids"] = torch.arange(96).reshape(8, 12) % 2
    encoder = COTSModel(cots_config()).eval().text_model
    expected = encoder(**texts).last_hidden_state
    real = texts["attention_mask"].bool()
    with run_by_length([encoder]):
        found = encoder(**texts).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


class ShortCaptions(ScenesDataset):
    """Scenes whose captions are cut after one to six words."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "captions": [" ".join(caption.split()[: 1 + index % 6]) for caption in item["captions"]]}


@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.0}, {"bf16": True}, {"cmlm_weight": 0, "cmvm_weight": 0}])
def test_training_is_that_of_whole_batches(make_trainer, monkeypatch, arguments):
    """Weights, momentum copy and queue after three steps."""
    states, counts = [], []
    group = short_captions.group_by_length
    for is_grouped in (True, False):
        runs: list = []
        monkeypatch.setattr(
            short_captions, "group_by_length", lambda *args, on=is_grouped, r=runs: _grouped(group, on, r, *args)
        )
        trainer = make_trainer(
            train_dataset=ShortCaptions("train", 24, 32), adam_epsilon=1e-4, learning_rate=1e-4, **arguments
        )
        trainer.train()
        states.append(state_of(trainer))
        counts.append(sum(groups is not None for groups in runs))
        assert "forward" not in vars(trainer.model.cots.text_model)
    assert counts[0] >= 3 and counts[1] == 0
    tolerance = 2e-2 if "bf16" in arguments else 1e-5
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")


def _grouped(group, is_grouped: bool, runs: list, *args):
    runs.append(group(*args) if is_grouped else None)
    return runs[-1]


@pytest.mark.parametrize(
    "arguments", [{"freeze_text": "1"}, {"freeze_text": "all"}, {"neftune_noise_alpha": 5.0}], ids=str
)
def test_what_sees_the_whole_batch_keeps_it_whole(make_trainer, arguments):
    trainer = make_trainer(**arguments)
    assert trainer._encoders_by_length() == []


def test_an_encoder_whose_samples_depend_on_each_other_keeps_them_together(make_trainer):
    trainer = make_trainer()
    models = trainer.model.cots, trainer.momentum_state.encoder.model
    assert trainer._encoders_by_length() == [model.text_model for model in models]
    for model in models:
        model.text_model.add_module("norm", torch.nn.BatchNorm1d(2))
    assert trainer._encoders_by_length() == []
