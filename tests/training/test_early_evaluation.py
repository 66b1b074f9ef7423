"""The short evaluation in the first tenth of a run: what it says, and that training does not notice it."""

import torch

from modeling_cots import ScenesDataset
from modeling_cots.training import trainer as trainer_module

RUN = {"max_steps": 100, "per_device_train_batch_size": 4, "cmvm_weight": 0, "cmlm_weight": 0, "logging_steps": 50}


def early_lines(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "early_recall_sum" in entry]


def test_comes_once_after_a_tenth_and_changes_nothing(make_trainer, monkeypatch, caplog):
    held_out = ScenesDataset("validation", 30, 32)
    watched = make_trainer(eval_dataset=held_out, learning_rate=1e-9, **RUN)
    watched.train()
    lines = early_lines(watched)
    assert [line["step"] for line in lines] == [10]
    assert 0 <= lines[0]["early_t2i_recall_at_10"] <= 100
    said = [record.message for record in caplog.records if "after a tenth of the run" in record.message]
    assert len(said) == 1 and "at chance" in said[0]
    assert watched.recall_is_chance is None  # which is of whole evaluations alone

    monkeypatch.setattr(trainer_module, "EARLY_MIN_STEPS", 101)
    alone = make_trainer(eval_dataset=held_out, learning_rate=1e-9, **RUN)
    alone.train()
    assert early_lines(alone) == []
    for name, tensor in watched.model.state_dict().items():
        assert torch.equal(tensor, alone.model.state_dict()[name]), name


def test_looks_at_no_more_than_200_images_of_the_first_set(make_trainer, monkeypatch):
    trainer = make_trainer(eval_dataset={"one": ScenesDataset("validation", 250, 32), "two": None}, **RUN)
    trainer.state.max_steps, trainer.state.global_step = 100, 10
    seen = []
    embed = trainer._embed
    monkeypatch.setattr(trainer, "_embed", lambda dataset, **options: seen.append(len(dataset)) or embed(dataset))
    trainer._evaluate_early(trainer.args, trainer.state, trainer.control)
    assert seen == [200]


def test_a_run_that_learns_nothing_says_so_in_its_log_once(make_trainer, caplog):
    """Images that are all alike: the distributions are flat from the first step to the last."""

    class Alike(ScenesDataset):
        def __getitem__(self, index: int) -> dict:
            item = super().__getitem__(index)
            return {**item, "image": super().__getitem__(0)["image"], "captions": [f"caption {index % 7}"]}

    run = {**RUN, "logging_steps": 5, "learning_rate": 1e-4}
    make_trainer(train_dataset=Alike("train", 24, 32), **run).train()
    said = [record.message for record in caplog.records if "contrastive losses sum to" in record.message]
    assert len(said) == 1, said
