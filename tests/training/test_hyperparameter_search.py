"""`model_init`, and searches for arguments: every trial is a run of its own, with its own model, copy and queue."""

import pytest
import torch

from modeling_cots import COTSForPreTraining, COTSModel, COTSTrainer, ScenesDataset


@pytest.fixture
def make_searching(make_trainer):
    """A function that builds a COTSTrainer with `model_init` and an `eval_dataset`; keywords replace arguments."""

    def make(model_init=None, eval_dataset="scenes", trainer_class=COTSTrainer, **arguments) -> COTSTrainer:
        scenes = ScenesDataset("validation", 8, 32) if eval_dataset == "scenes" else eval_dataset
        plain = make_trainer(eval_dataset=scenes, **arguments)
        config = plain.model.config
        return trainer_class(
            model_init=(lambda: COTSForPreTraining(config)) if model_init is None else model_init,
            args=plain.args,
            train_dataset=plain.train_dataset,
            eval_dataset=scenes,
            processing_class=plain.processing_class,
            image_tokenizer=plain.image_tokenizer,
            max_text_length=24,
        )

    return make


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_every_run_begins_with_a_new_model_and_all_that_belongs_to_it(make_searching):
    trainer = make_searching()
    trainer.train()
    first, momentum, queue = weights(trainer), trainer.momentum_state, trainer.queue
    trainer.train()
    second = weights(trainer)
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert trainer.momentum_state is not momentum and trainer.queue is not queue
    assert trainer.queue.num_pushed == queue.num_pushed == 24
    assert trainer.cots_objective.momentum_model is trainer.momentum_state.encoder.model


def test_a_resumed_run_equals_the_whole_run(make_searching, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_searching(output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    resumed = make_searching(output_dir=str(tmp_path / "resumed"), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for side in ("model", "momentum_state"):
        expected, got = (getattr(each, side).state_dict() for each in (whole, resumed))
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_trials_differ_in_their_arguments_and_in_nothing_else(make_searching, tmp_path):
    optuna = pytest.importorskip("optuna")
    seen = []

    class Watching(COTSTrainer):
        def _begin_training(self, args, state, control, **kwargs):
            super()._begin_training(args, state, control, **kwargs)
            seen.append((args.learning_rate, self.queue.size, args.cmvm_weight))
            assert self.data_collator.mask_images == (args.cmvm_weight > 0)
            assert self.momentum_state.encoder.model is self.cots_objective.momentum_model
            assert self.model.cmvm_head.weight.requires_grad == (args.cmvm_weight > 0)

    saving = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "search")}
    trainer = make_searching(trainer_class=Watching, **saving)
    grid = {"learning_rate": [1e-3, 0.05], "queue_size": [10, 20], "cmvm_weight": [0.0, 1.0]}

    def space(trial) -> dict:
        number = trial.suggest_categorical("number", [0, 1])
        return {name: values[number] for name, values in grid.items()}

    best = trainer.hyperparameter_search(
        space, n_trials=2, backend="optuna", sampler=optuna.samplers.GridSampler({"number": [0, 1]}, seed=0)
    )
    assert {tuple(values) for values in seen} == set(zip(*grid.values(), strict=True))
    recalls = {}
    for number in (0, 1):
        single = make_searching(**{name: values[number] for name, values in grid.items()})
        single.train()
        recalls[number] = single.evaluate()["eval_recall_sum"]
    assert best.objective == max(recalls.values()) and best.hyperparameters["number"] == max(recalls, key=recalls.get)
    assert sorted(path.name for path in (tmp_path / "search").glob("run-*/checkpoint-*")) == ["checkpoint-3"] * 2


def test_a_trial_may_build_its_model_and_be_measured_by_a_rank(make_searching, tiny_config):
    pytest.importorskip("optuna")
    sizes = []

    def model_init(trial):
        if trial is not None:
            tiny_config.projection_dim = trial.suggest_categorical("projection_dim", [8, 16])
            sizes.append(tiny_config.projection_dim)
        return COTSForPreTraining(tiny_config)

    trainer = make_searching(model_init, metric_for_best_model="i2t_mean_rank", max_steps=1)
    best = trainer.hyperparameter_search(lambda trial: {}, n_trials=2, backend="optuna")
    assert len(sizes) == 2 and best.objective >= 1
    with pytest.raises(ValueError, match="i2t_mean_rank is to be minimized"):
        trainer.hyperparameter_search(lambda trial: {}, n_trials=1, direction="maximize")


def test_after_a_search_the_best_arguments_are_trained_with(make_searching):
    pytest.importorskip("optuna")
    trainer = make_searching(max_steps=1)
    best = trainer.hyperparameter_search(
        lambda trial: {"queue_size": trial.suggest_int("queue_size", 11, 13)}, n_trials=1, backend="optuna"
    )
    for step in (trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset), lambda: trainer.export_model("no")):
        with pytest.raises(ValueError, match="leaves no model in its trainer: set the best values in args"):
            step()
    trainer.args.queue_size = 9
    for name, value in best.hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.queue.size == best.hyperparameters["queue_size"]
    assert trainer.evaluate()["eval_recall_sum"] > 0
    trainer.args.queue_size = 0
    with pytest.raises(ValueError, match="queue_size must be at least 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"queue_size": 0}, "queue_size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative"),
        ({"label_smoothing_factor": 0.1}, "nothing to search for in label_smoothing_factor"),
        ({"lerning_rate": 0.1}, "lerning_rate is no argument of training"),
    ],
)
def test_a_trial_of_values_that_no_run_could_use_is_refused(make_searching, space, message):
    pytest.importorskip("optuna")

    def suggested(trial) -> dict:
        return {name: trial.suggest_categorical(name, [value]) for name, value in space.items()}

    with pytest.raises(ValueError, match=message):
        make_searching().hyperparameter_search(suggested, n_trials=1, backend="optuna")


def test_what_cannot_be_searched_is_refused(make_searching, make_trainer, tiny_config):
    with pytest.raises(ValueError, match="give COTSTrainer model_init"):
        make_trainer(eval_dataset=ScenesDataset("validation", 8, 32)).hyperparameter_search()
    with pytest.raises(ValueError, match="eval_dataset to compare trials"):
        make_searching(eval_dataset=None).hyperparameter_search()
    with pytest.raises(ValueError, match="metric_for_best_model"):
        two = {"a": ScenesDataset("validation", 8, 32), "b": ScenesDataset("validation", 8, 32)}
        make_searching(eval_dataset=two).hyperparameter_search()
    with pytest.raises(ValueError, match="one after another: leave n_jobs=2 out"):
        make_searching().hyperparameter_search(n_jobs=2)
    with pytest.raises(ValueError, match="got COTSModel"):
        make_searching(lambda: COTSModel(tiny_config))


def test_a_model_or_a_function_that_makes_one(make_trainer, tiny_config):
    trainer = make_trainer()
    parts = {"args": trainer.args, "processing_class": trainer.processing_class}
    for model in ({}, {"model": trainer.model, "model_init": lambda: COTSForPreTraining(tiny_config)}):
        with pytest.raises(ValueError, match="give one of the two"):
            COTSTrainer(**model, **parts)
