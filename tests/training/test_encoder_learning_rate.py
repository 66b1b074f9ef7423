"""`encoder_learning_rate`: the encoders' weights at a rate of their own, all else as without it."""

import shutil

import pytest
import torch
from trainer_states import state_of


def test_the_rate_of_everything_is_no_change_at_all(make_trainer):
    plain, grouped = make_trainer(), make_trainer(encoder_learning_rate=1e-3)
    for trainer in (plain, grouped):
        trainer.train()
    assert len(plain.optimizer.param_groups) == 2 and len(grouped.optimizer.param_groups) == 4
    for (name, expected), got in zip(
        plain.model.state_dict().items(), grouped.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, got), name


def test_encoders_move_by_their_own_rate_and_one_of_nothing_stays(make_trainer):
    trainer = make_trainer(encoder_learning_rate=0.0)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    in_encoders = {name for name in before if ".text_model." in name or ".vision_model." in name}
    assert not moved & in_encoders
    assert {"cots.text_projection.weight", "cots.vision_projection.weight", "cmvm_head.weight"} <= moved


def test_both_rates_follow_the_schedule_and_the_log_has_the_first(make_trainer):
    trainer = make_trainer(encoder_learning_rate=1e-4, learning_rate=1e-3, max_steps=4)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_a_resumed_run_equals_the_whole_one(make_trainer, tmp_path):
    arguments = {"encoder_learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **arguments)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    resumed = make_trainer(output_dir=str(tmp_path / "stopped"), **arguments)
    resumed.train(resume_from_checkpoint="latest")
    expected, got = state_of(whole), state_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_learning_rate": -1.0}, "must not be negative, got -1.0"),
        ({"encoder_learning_rate": float("nan")}, "finite"),
        (
            {"encoder_learning_rate": 1e-4, "optim": "galore_adamw", "optim_target_modules": "all-linear"},
            "ignored beside",
        ),
    ],
)
def test_rates_that_no_run_could_use_are_refused(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)


def test_a_rate_of_encoders_that_do_not_train_is_refused(tiny_config, tiny_processor, make_trainer, tmp_path):
    from modeling_cots import COTSForPreTraining, COTSTrainer

    args = make_trainer(encoder_learning_rate=1e-4, cmvm_weight=0, cmlm_weight=0).args
    model = COTSForPreTraining(tiny_config)
    model.cots.text_model.requires_grad_(False)
    model.cots.vision_model.requires_grad_(False)
    with pytest.raises(ValueError, match="encoder_learning_rate is 0.0001, and no weight of an encoder trains"):
        COTSTrainer(model=model, args=args, processing_class=tiny_processor)
    optimizers = (torch.optim.SGD(model.parameters(), lr=1.0), None)
    with pytest.raises(ValueError, match="ignored beside optimizers"):
        COTSTrainer(model=model, args=args, processing_class=tiny_processor, optimizers=optimizers)
