"""`--optim adam`: Adam with weight decay as the supplement says it, coupled; and what transformers has besides."""

import dataclasses

import pytest
import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback

from modeling_cots import COTSTrainingArguments


class Recorder(TrainerCallback):
    """Gradients and learning rate of every optimizer step."""

    def __init__(self):
        self.gradients, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])


def trained(make_trainer, **arguments):
    """A trainer after three steps, with its weights before, and what was recorded."""
    recorder = Recorder()
    trainer = make_trainer(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, **arguments)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    decayed = trainer.get_decay_parameter_names(trainer.model)
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, before, set(decayed), recorder


def test_steps_are_those_of_torch_and_of_the_formula(make_trainer):
    trainer, before, decayed, recorder = trained(make_trainer, optim="adam")
    weights = dict(trainer.model.named_parameters())
    assert decayed & set(before) and set(before) - decayed and len(recorder.rates) == 3
    for name, start in before.items():
        reference = torch.nn.Parameter(start.clone())
        decay = 0.1 if name in decayed else 0.0
        optimizer = torch.optim.Adam([reference], betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
        weight, mean, square = start.double(), 0.0, 0.0
        for step, (gradients, rate) in enumerate(zip(recorder.gradients, recorder.rates, strict=True), start=1):
            reference.grad = gradients[name].clone()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            gradient = gradients[name].double() + decay * weight
            mean, square = 0.8 * mean + 0.2 * gradient, 0.95 * square + 0.05 * gradient**2
            weight = weight - rate * (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-6)
        torch.testing.assert_close(weights[name].detach(), reference.detach(), rtol=0, atol=1e-6)
        torch.testing.assert_close(weights[name].detach().double(), weight, rtol=0, atol=1e-5)


def test_it_is_another_optimizer_than_adamw(make_trainer):
    adam, before, decayed, _ = trained(make_trainer, optim="adam")
    adamw, *_ = trained(make_trainer, optim="adamw_torch")
    differ = {
        name
        for (name, one), other in zip(adam.model.named_parameters(), adamw.model.parameters(), strict=True)
        if name in before and not torch.allclose(one, other, rtol=0, atol=1e-5)
    }
    assert decayed & set(before) & differ
    assert type(adam.optimizer.optimizer) is torch.optim.Adam


def test_a_run_with_it_goes_on_exactly(make_trainer, tmp_path):
    whole = make_trainer(optim="adam", max_steps=4)
    whole.train()
    make_trainer(
        optim="adam", max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "a")
    ).train()
    resumed = make_trainer(optim="adam", max_steps=4, output_dir=str(tmp_path / "a"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_an_option_of_the_command_line_that_copies_keep(tmp_path):
    options = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    (args,) = HfArgumentParser(COTSTrainingArguments).parse_args_into_dataclasses([*options, "--optim", "adam"])
    assert args.optim == args.to_dict()["optim"] == dataclasses.replace(args, seed=3).optim == "adam"
    with pytest.raises(ValueError, match="adams is not a valid OptimizerNames"):
        HfArgumentParser(COTSTrainingArguments).parse_args_into_dataclasses([*options, "--optim", "adams"])


@pytest.mark.parametrize("optim", [None, "adamw_torch", "sgd"])
def test_other_names_mean_what_they_do_in_transformers(make_trainer, optim):
    trainer = make_trainer(**({} if optim is None else {"optim": optim}))
    expected = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    assert trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model) == expected
