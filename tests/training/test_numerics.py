"""Half precision: bf16 and fp16 train, what has to be float32 is, and a skipped step moves nothing."""

import pytest
import torch
from transformers import TrainerCallback

from modeling_cots.method import losses


class Watch(TrainerCallback):
    """After every step: was it skipped, and where do weights, momentum copy and schedule stand?"""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []

    def state(self) -> tuple:
        trainer = self.trainer
        weights, copy = trainer.model.cots, trainer.momentum_state.encoder.model
        flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (weights, copy)]
        return *flat, trainer.lr_scheduler.get_last_lr()[0], trainer.lr_scheduler.last_epoch

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen.append((False, *self.state()))

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((self.trainer.accelerator.optimizer_step_was_skipped, *self.state()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_through(make_trainer, precision):
    # Whether a key is fresh is a threshold, at which rounding may decide otherwise: the paper's candidates have none.
    arguments = {"num_train_epochs": 4, "max_steps": -1, "learning_rate": 1e-4, "batch_candidates": False}
    full = make_trainer(**arguments)
    full.train()
    trainer = make_trainer(**{precision: True}, **arguments)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    dtypes = set()
    trainer.model.cots.vision_projection.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}, "autocast is really on"
    lines, expected = ([line for line in each.state.log_history if "loss" in line] for each in (trainer, full))
    assert len(lines) == len(expected) == 12
    for name in ("loss_i2t", "loss_cmvm", "loss_cmlm"):  # as in float32, but for the rounding
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=0.05, abs=0.05)
    assert not any(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())
    assert {parameter.dtype for parameter in trainer.momentum_state.encoder.parameters()} == {torch.float32}
    assert trainer.queue.image_embeds.dtype == trainer.queue.scores.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_similarities_and_losses_are_float32_under_autocast(make_trainer, monkeypatch, precision):
    from modeling_cots.training import objective

    seen = {}

    def noting(name: str):
        original = getattr(losses, name)

        def function(*args):
            output = original(*args)
            seen[name] = {output.dtype}
            if name != "queue_logits":
                # Bit for bit what float32 inputs give outside autocast: nothing inside ran at half precision.
                with torch.autocast("cpu", enabled=False):
                    full = [arg.float() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args]
                    assert torch.equal(original(*full), output)
            else:
                with torch.autocast("cpu", enabled=False):
                    full = [arg.double() if torch.is_tensor(arg) and arg.is_floating_point() else arg for arg in args]
                    query, positive, candidates, excluded, temperature = full
                    exact = torch.cat([(query * positive).sum(1, keepdim=True), query @ candidates.T], dim=1)
                    counted = torch.cat([torch.ones(len(excluded), 1, dtype=torch.bool), ~excluded], dim=1)
                difference = (output - exact / temperature)[counted].abs().max()
                assert difference < 1e-4, "half precision would be off by 0.01 and more at this temperature"
            return output

        return function

    for name in ("queue_logits", "momentum_contrastive_loss", "task_kl_loss", "masked_token_loss"):
        monkeypatch.setattr(objective, name, noting(name))
    trainer = make_trainer(**{precision: True})
    scores = []
    original = trainer.cots_objective.filter
    trainer.cots_objective.filter = lambda s, valid: (scores.append(s.dtype), original(s, valid))[1]
    trainer.train()
    assert seen == dict.fromkeys(seen, {torch.float32})
    assert len(seen) == 4
    assert set(scores) == {torch.float32}


def test_the_momentum_update_is_float32_even_within_autocast(make_trainer):
    trainer = make_trainer()
    copy = trainer.momentum_state.encoder
    before = {name: value.double() for name, value in copy.model.named_parameters()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copy.update_(trainer.model.cots, 0.99)
    online = dict(trainer.model.cots.named_parameters())
    for name, value in copy.model.named_parameters():
        exact = 0.99 * before[name] + 0.01 * online[name].double()
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_float16_skips_moves_nothing_but_the_scale(make_trainer, optim):
    """A real overflow: at this scale the first gradients are infinite, and the scaler halves it until they are not."""
    trainer = make_trainer(fp16=True, num_train_epochs=6, max_steps=-1, warmup_steps=4, optim=optim)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    skipped = [step for step in range(1, len(watch.seen)) if watch.seen[step][0]]
    taken = [step for step in range(1, len(watch.seen)) if not watch.seen[step][0]]
    assert len(skipped) >= 2 and len(taken) >= 2
    for step in skipped:
        _, *now = watch.seen[step]
        _, *before = watch.seen[step - 1]
        assert torch.equal(now[0], before[0]) and torch.equal(now[1], before[1]) and now[2:] == before[2:]
    for number, step in enumerate(taken, start=1):
        _, weights, copy, _, num_scheduled = watch.seen[step]
        _, weights_before, copy_before, *_ = watch.seen[step - 1]
        assert num_scheduled == number
        assert not torch.equal(copy, copy_before) or torch.equal(weights, copy_before)
        assert number == 1 or not torch.equal(weights, weights_before)  # the first is taken at learning rate 0
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (24 - len(skipped))


def test_fp16_resumes_with_its_scale(make_trainer, tmp_path):
    arguments = {"fp16": True, "num_train_epochs": 2, "max_steps": -1, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(**arguments)
    whole.train()
    resumed = make_trainer(**arguments, output_dir=str(tmp_path / "resumed"))
    resumed.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    resumed.train(str(tmp_path / "run" / "checkpoint-3"))
    assert whole.accelerator.scaler.state_dict() == resumed.accelerator.scaler.state_dict()
    for expected, got in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, got)
