"""The training step against the method written out by hand, and what the trainer promises around it."""

import math

import pytest
import torch
from tiny import IMAGE_SIZE
from torch.nn import functional as F
from transformers import AutoProcessor, EarlyStoppingCallback

from modeling_cots import COTSModel, COTSTrainer, ScenesDataset
from modeling_cots.method.filtering import mixture_threshold
from modeling_cots.training.setup import check_setup

LOGGED = {
    "loss_i2t",
    "loss_t2i",
    "loss_kl",
    "loss_cmvm",
    "loss_cmlm",
    "chance_loss",
    "kept_fraction",
    "filter_threshold",
    "queue_fill",
    "skipped_images",
}


class BrokenScenes(ScenesDataset):
    """Scenes of which the given ones cannot be read."""

    def __init__(self, *args, broken: set[int]):
        super().__init__(*args)
        self.broken = broken

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return {**item, "image": b"no image"} if index in self.broken else item


def batch_of(trainer, indices) -> dict[str, torch.Tensor]:
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in indices]))


def log_losses(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss_i2t" in entry]


def fill_queue(trainer) -> None:
    """Random pairs that score about 0.8, so that the filter drops what a fresh model makes of some pairs."""
    generator = torch.Generator().manual_seed(5)
    size, dim = trainer.queue.image_embeds.shape
    embeds = [F.normalize(torch.randn(size, dim, generator=generator), dim=1) for _ in range(2)]
    scores = torch.linspace(-0.15, 0.25, size)
    trainer.queue.push(*embeds, scores, torch.arange(1000, 1000 + size))


def test_loss_equals_the_method_written_out(make_trainer):
    """Filter, four losses, weights: one pair at a time in plain Python, from what the two models embed."""
    weights = {"mcl_weight": 0.7, "kl_weight": 0.5, "cmvm_weight": 0.3, "cmlm_weight": 0.2}
    trainer = make_trainer(**weights, filter_num_std=0.5, batch_candidates=False)  # the paper's candidates
    fill_queue(trainer)
    model, tau = trainer.model.eval(), trainer.model.config.temperature
    batch = batch_of(trainer, range(8))
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)

    slow = trainer.momentum_state.encoder.model
    slow_images = slow.encode_image(batch["pixel_values"])
    slow_texts = slow.encode_text(batch["input_ids"], batch["attention_mask"])
    scores = [float(image @ text) for image, text in zip(slow_images, slow_texts, strict=True)]
    queued = trainer.queue.scores.tolist()
    mean = sum(queued) / len(queued)
    threshold = mean - 0.5 * math.sqrt(sum((score - mean) ** 2 for score in queued) / len(queued))
    kept = [i for i in range(8) if scores[i] >= threshold]
    assert 0 < len(kept) < 8, "the example must filter some pairs, and not all"

    i2t = t2i = kl = 0.0
    for i in kept:
        p = torch.cat([slow_texts[i : i + 1], trainer.queue.text_embeds]) @ outputs.image_embeds[i] / tau
        q = torch.cat([slow_images[i : i + 1], trainer.queue.image_embeds]) @ outputs.text_embeds[i] / tau
        p, q = p.double().softmax(0), q.double().softmax(0)
        i2t, t2i = i2t - p[0].log() / len(kept), t2i - q[0].log() / len(kept)
        kl = kl + ((q * (q / p).log()).sum() + (p * (p / q).log()).sum()) / len(kept)
    tokens = trainer.image_tokenizer(batch["pixel_values"], trainer.model.config.patch_size)
    token_losses = {"cmvm": [], "cmlm": []}
    rows = {"cmvm": iter(outputs.image_token_logits), "cmlm": iter(outputs.text_token_logits)}
    for i in range(8):
        targets = {
            "cmvm": tokens[i][batch["bool_masked_pos"][i]],
            "cmlm": batch["text_targets"][i][batch["text_targets"][i] != -100],
        }
        for name, values in targets.items():
            for target in values:
                row = next(rows[name]).double()
                if i in kept:
                    token_losses[name].append(-row.log_softmax(0)[target])
    cmvm, cmlm = (torch.stack(values).mean() for values in token_losses.values())
    expected = 0.7 * (i2t + t2i) + 0.5 * kl + 0.3 * cmvm + 0.2 * cmlm
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    logs = trainer.training_log.drain(trainer.accelerator)
    assert logs["kept_fraction"] == len(kept) / 8
    assert logs["filter_threshold"] == pytest.approx(threshold, rel=1e-5)
    assert logs["loss_kl"] == pytest.approx(kl.item(), rel=1e-5)


def test_batch_candidates_join_the_queue(make_trainer):
    trainer = make_trainer(batch_candidates=True, adaptive_filter=False, cmvm_weight=0, cmlm_weight=0, kl_weight=0)
    model, tau = trainer.model.eval(), trainer.model.config.temperature
    batch = batch_of(trainer, [0, 1, 2, 3, 0])  # scene 0 twice: the same image is no negative of itself
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    slow = trainer.momentum_state.encoder.model
    keys = {
        "i2t": slow.encode_text(batch["input_ids"], batch["attention_mask"]),
        "t2i": slow.encode_image(batch["pixel_values"]),
    }
    queries = {"i2t": outputs.image_embeds, "t2i": outputs.text_embeds}
    expected = 0.0
    for side in ("i2t", "t2i"):
        for i in range(5):
            others = [j for j in range(5) if j not in (0, 4)] if i in (0, 4) else [j for j in range(5) if j != i]
            row = torch.cat([keys[side][i : i + 1], keys[side][others]]) @ queries[side][i] / tau
            expected = expected - row.log_softmax(0)[0] / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


class SameCaptions(ScenesDataset):
    """Scenes of which those with an even number share one caption, but for its case."""

    def __getitem__(self, index: int) -> dict:
        item = super().__getitem__(index)
        return item if index % 2 else {**item, "captions": [["a red circle", "A red  circle."][index // 2 % 2]]}


@pytest.mark.parametrize(("mask", "num_fresh"), [(True, 0), (True, 7), (False, 20)])
def test_candidates_are_fresh_keys_of_other_images_and_captions(make_trainer, mask, num_fresh):
    """The loss, and the drift of the keys, one pair at a time in plain Python."""
    only_contrast = {"adaptive_filter": False, "cmvm_weight": 0, "cmlm_weight": 0, "kl_weight": 0}
    dataset = SameCaptions("train", 24, IMAGE_SIZE)
    trainer = make_trainer(train_dataset=dataset, mask_equal_captions=mask, **only_contrast)
    fill_queue(trainer)
    batch = batch_of(trainer, range(6))
    queue = trainer.queue
    queue.caption_ids[[3, 19]] = batch["caption_ids"][0]
    queue.pair_ids[11] = 1
    queue.fresh_keys.num_fresh.fill_(num_fresh)
    model, tau = trainer.model.eval(), trainer.model.config.temperature
    result = trainer.cots_objective(model, batch, 0)
    slow = trainer.momentum_state.encoder.model
    sides = {
        "i2t": (result.model_output.image_embeds, slow.encode_text(batch["input_ids"], batch["attention_mask"])),
        "t2i": (result.model_output.text_embeds, slow.encode_image(batch["pixel_values"])),
    }
    of_queue = {"i2t": queue.text_embeds, "t2i": queue.image_embeds}
    expected, drifts = 0.0, []
    for side, (queries, keys) in sides.items():
        drift, variance = [], []
        for i in range(6):
            alike = {j for j in range(6) if mask and i % 2 == j % 2 == 0} | {i}
            newest_first = list(range(19, -1, -1))  # 20 pairs were pushed at once
            excluded = {3, 19} if mask and i % 2 == 0 else set()
            excluded |= {11} if i == 1 else set()
            negatives = [of_queue[side][j] for j in newest_first[:num_fresh] if j not in excluded]
            fresh = [keys[j] for j in range(6) if j not in alike]
            logits = torch.stack([keys[i], *negatives, *fresh]) @ queries[i] / tau
            expected = expected - logits.log_softmax(0)[0] / 6
            measured = [of_queue[side][j] for j in newest_first[: num_fresh + 6] if j not in excluded]
            difference = torch.stack(fresh) @ queries[i] / tau, torch.stack(measured) @ queries[i] / tau
            drift.append((difference[0].mean() - difference[1].mean()).item())
            variance.append(difference[0].var(correction=0).item())
        drifts.append(abs(sum(drift) / 6) / min(1.0, math.sqrt(sum(variance) / 6)))
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert result.key_drift.item() == pytest.approx(max(drifts), rel=1e-4)


def test_pairs_that_could_not_be_read_have_no_part_in_the_drift(make_trainer):
    trainer = make_trainer(cmvm_weight=0, cmlm_weight=0)
    fill_queue(trainer)
    model = trainer.model.eval()
    whole, fewer = batch_of(trainer, range(6)), batch_of(trainer, range(4))
    whole["valid"][4:] = False
    drifts = [trainer.cots_objective(model, batch, 0).key_drift.item() for batch in (whole, fewer)]
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)


def test_the_queue_takes_the_batch_after_the_losses(make_trainer):
    trainer = make_trainer()
    batch = batch_of(trainer, range(8))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert trainer.queue.num_pushed == 8
    assert trainer.queue.pair_ids[:8].tolist() == list(range(8))
    expected = trainer.momentum_state.encoder.model.encode_image(batch["pixel_values"])
    torch.testing.assert_close(trainer.queue.image_embeds[:8], expected)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    assert trainer.queue.num_pushed == 8


def test_logs_every_part_of_the_method(make_trainer):
    trainer = make_trainer(max_steps=4)
    trainer.train()
    logs = log_losses(trainer)
    assert len(logs) == 4
    assert all(entry.keys() >= LOGGED for entry in logs)
    assert [entry["queue_fill"] for entry in logs] == [0.0, 0.4, 0.8, 1.0]  # as the losses of the step saw it
    assert all(entry["filter_threshold"] == -1.0 and entry["kept_fraction"] == 1.0 for entry in logs[:3])
    assert logs[3]["filter_threshold"] > -1.0
    # Chance at initialization: ln V within what random logits of a tiny model add.
    assert logs[0]["loss_cmvm"] == pytest.approx(math.log(50), abs=0.5)
    assert logs[0]["loss_cmlm"] == pytest.approx(math.log(99), abs=0.8)


def test_momentum_follows_the_optimizer_and_not_the_batches(make_trainer):
    """Two micro-batches make one update; the copy is where the closed form of one update puts it."""
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=2, momentum=0.75, batch_candidates=False)
    start = {name: tensor.clone() for name, tensor in trainer.model.cots.named_parameters()}
    trainer.train()
    assert trainer.queue.num_pushed == 16
    online = dict(trainer.model.cots.named_parameters())
    moved = 0.0
    for name, slow in trainer.momentum_state.encoder.model.named_parameters():
        torch.testing.assert_close(slow, 0.75 * start[name] + 0.25 * online[name], rtol=1e-5, atol=1e-6)
        moved += (online[name] - start[name]).abs().sum().item()
    assert moved > 0


@pytest.mark.parametrize(("num_fresh", "momentum"), [(0, 0.0), (5, 0.2), (20, 0.8)])
def test_momentum_rises_with_the_share_of_fresh_keys(make_trainer, num_fresh, momentum):
    trainer = make_trainer(momentum=0.8)
    trainer.queue.fresh_keys.num_fresh.fill_(num_fresh)
    assert trainer.cots_objective.momentum() == pytest.approx(momentum)


@pytest.mark.parametrize("num_fresh", [0, 5, 20])
def test_gradient_flows_through_keys_as_far_as_the_queue_is_not_fresh(make_trainer, num_fresh):
    """Against the loss with keys cut in two: a share of their gradient, and none in the paper's way."""
    trainer = make_trainer(adaptive_filter=False, cmvm_weight=0, cmlm_weight=0, kl_weight=0)
    trainer.queue.fresh_keys.num_fresh.fill_(num_fresh)
    batch, local, objective = batch_of(trainer, range(6)), slice(0, 6), trainer.cots_objective
    queries = [F.normalize(torch.randn(6, 16), dim=1).requires_grad_(True) for _ in range(2)]
    gathered, _ = objective.gather(*(query.detach() for query in queries), batch)

    def loss(images, texts, image_keys, text_keys):
        tau, excluded = trainer.model.config.temperature, torch.eye(6, dtype=torch.bool)
        total = 0.0
        for query, key in ((images, text_keys), (texts, image_keys)):
            own = (query * key).sum(dim=1, keepdim=True)
            logits = torch.cat([own, (query @ key.t()).masked_fill(excluded, -1e9)], dim=1) / tau
            total = total - logits.log_softmax(dim=1)[:, 0].mean()
        return total

    logits, _ = objective.contrast(*queries, gathered, local)
    losses = objective.contrastive_losses(*logits, torch.ones(6, dtype=torch.bool), 6)
    got = torch.autograd.grad(losses["loss_i2t"] + losses["loss_t2i"], queries)
    as_query = torch.autograd.grad(loss(*queries, *(query.detach() for query in queries)), queries)
    as_key = torch.autograd.grad(loss(*(query.detach() for query in queries), *queries), queries)
    for mine, one, other in zip(got, as_query, as_key, strict=True):
        torch.testing.assert_close(mine, one + (1 - num_fresh / 20) * other, rtol=1e-4, atol=1e-6)


def test_frozen_encoders_are_shared_with_the_momentum_copy_until_they_train(make_trainer):
    trainer = make_trainer(max_steps=1, batch_candidates=False, momentum=0.9)
    model = trainer.model.cots
    model.text_model.requires_grad_(False)
    trainer = COTSTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
        image_tokenizer=trainer.image_tokenizer,
        max_text_length=24,
    )
    momentum = trainer.momentum_state.encoder.model
    frozen, trained = (each.text_model.embeddings.word_embeddings.weight for each in (momentum, model))
    assert frozen is trained and momentum.vision_projection.weight is not model.vision_projection.weight
    model.text_model.requires_grad_(True)
    start = trained.detach().clone()
    trainer.train()
    separate = momentum.text_model.embeddings.word_embeddings.weight
    assert not torch.equal(trained, start)
    torch.testing.assert_close(separate, 0.9 * start + 0.1 * trained.detach())


def test_accumulation_does_not_change_the_scale_of_the_gradient(make_trainer):
    """With an idle queue every pair has one class, so use the token losses: two halves equal the whole."""
    gradients = {}
    for steps in (1, 2):
        trainer = make_trainer(
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            image_mask_ratio=0.5,
            cmlm_weight=0.0,
            optim="sgd",
            learning_rate=1.0,
            weight_decay=0.0,
        )
        before = trainer.model.cmvm_head.weight.detach().clone()
        trainer.train()
        gradients[steps] = before - trainer.model.cmvm_head.weight.detach()
    assert gradients[1].abs().sum() > 0
    torch.testing.assert_close(gradients[2], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("switched_off", "unused"),
    [
        ({"cmvm_weight": 0.0}, {"cmvm_head.weight", "text_to_image.weight", "vision_model.embeddings.mask_token"}),
        ({"cmlm_weight": 0.0}, {"cmlm_head.0.dense.weight", "image_to_text.weight", "cmlm_head.1.bias"}),
        ({"cmvm_weight": 0.0, "cmlm_weight": 0.0}, {"cmvm_head.weight", "cmlm_head.0.dense.weight"}),
        ({"kl_weight": 0.0}, set()),
    ],
)
def test_a_weight_of_0_skips_the_work_and_leaves_no_parameter_without_gradient(make_trainer, switched_off, unused):
    trainer = make_trainer(**switched_off)
    encoded = []
    trainer.model.register_forward_hook(lambda module, args, kwargs, output: encoded.append(kwargs), with_kwargs=True)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(8)))
    loss.backward()
    assert ("bool_masked_pos" in encoded[0]) == ("cmvm_weight" not in switched_off)
    assert ("masked_input_ids" in encoded[0]) == ("cmlm_weight" not in switched_off)
    frozen = {name.removeprefix("cots.") for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert unused <= frozen
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
    assert not any("word_embeddings" in name for name in frozen)
    assert "loss_kl" in trainer.training_log.drain(trainer.accelerator)


def test_kl_warm_up_grows_linearly(make_trainer):
    trainer = make_trainer(kl_weight=0.8, kl_warmup_steps=4)
    assert [trainer.cots_objective.kl_weight(step) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )


def test_unreadable_images_are_counted_and_leave_no_trace(make_trainer, caplog):
    """Their pixels are never seen: whatever stands in the row, losses and queue are those of the readable pairs."""
    trainer = make_trainer(train_dataset=BrokenScenes("train", 24, 32, broken={1, 6}))
    batch = batch_of(trainer, range(8))
    assert batch["valid"].tolist() == [True, False, True, True, True, True, False, True]
    first = trainer.compute_loss(trainer.model.eval(), batch)
    batch["pixel_values"][[1, 6]] = 7.0
    batch["raw_pixels"][[1, 6]] = 200
    assert trainer.compute_loss(trainer.model, batch).item() == first.item()
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    assert trainer.queue.num_pushed == 6
    assert trainer.queue.pair_ids[:6].tolist() == [0, 2, 3, 4, 5, 7]
    logs = trainer.training_log.drain(trainer.accelerator)
    assert logs["skipped_images"] == 6  # two in each of the three batches
    assert logs["kept_fraction"] == 1.0


def test_a_batch_without_any_readable_image_trains_through(make_trainer):
    trainer = make_trainer(train_dataset=BrokenScenes("train", 24, 32, broken=set(range(24))))
    trainer.train()
    assert all(entry["loss"] == 0 and entry["skipped_images"] > 0 for entry in log_losses(trainer))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_evaluates_by_retrieval(make_trainer):
    trainer = make_trainer(eval_dataset=ScenesDataset("validation", 10, 32))
    random_state = torch.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), random_state)
    for side in ("i2t", "t2i"):
        assert 0 <= metrics[f"eval_{side}_recall_at_1"] <= metrics[f"eval_{side}_recall_at_5"] <= 100
        assert metrics[f"eval_{side}_recall_at_10"] >= metrics[f"eval_{side}_recall_at_5"]
        assert 1 <= metrics[f"eval_{side}_median_rank"] <= 50
    assert metrics["eval_t2i_recall_at_10"] == 100  # of 10 images
    assert trainer.state.log_history[-1]["eval_recall_sum"] == metrics["eval_recall_sum"]
    assert trainer.example_retrievals.wanted == [0, 4, 9] and trainer.example_retrievals.num_images == 10


def test_predicts_the_embeddings_that_it_evaluates(make_trainer):
    scenes = BrokenScenes("validation", 10, 32, broken={3})
    trainer = make_trainer(eval_dataset=scenes)
    predicted = trainer.predict(scenes)
    (image_embeds, text_embeds), (image_ids, text_ids) = predicted.predictions, predicted.label_ids
    assert image_ids.tolist() == [pair_id for pair_id in range(10) if pair_id != 3]
    assert image_embeds.shape == (9, 16) and text_embeds.shape == (45, 16) and len(text_ids) == 45
    best = (text_embeds @ image_embeds.T).argmax(axis=1)
    recall = 100 * (image_ids[best] == text_ids).mean()
    assert predicted.metrics["test_t2i_recall_at_1"] == pytest.approx(recall)
    evaluated = trainer.evaluate()
    assert predicted.metrics == {
        name.replace("eval_", "test_"): evaluated[name] for name in evaluated if name != "epoch"
    }


def test_one_of_several_data_sets_is_evaluated_by_its_name(make_trainer):
    scenes = {"small": ScenesDataset("validation", 4, 32), "large": ScenesDataset("validation", 6, 32)}
    trainer = make_trainer(eval_dataset=scenes, metric_for_best_model="small_recall_sum")
    assert trainer.evaluate("large")["eval_t2i_mean_rank"] == trainer.evaluate(scenes["large"])["eval_t2i_mean_rank"]
    for measure in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="in a data set of known length.* got str"):
            measure("huge")
        with pytest.raises(ValueError, match="The data set to measure is empty"):
            measure([])
    with pytest.raises(ValueError, match="got dict"):
        trainer.predict(scenes)


def test_learns_fixed_pairs(make_trainer):
    """16 pairs, seen 80 times, everything switched on: the pairs are found again and the tokens are predicted."""
    scenes = ScenesDataset("train", 16, 32)
    trainer = make_trainer(
        train_dataset=scenes,
        eval_dataset=scenes,
        per_device_train_batch_size=16,
        max_steps=80,
        # A short queue: a model that moves fast tells its stale entries from fresh ones and learns nothing else.
        queue_size=4,
        batch_candidates=True,
        momentum=0.5,
        kl_weight=0.1,
        kl_warmup_steps=80,
        cmvm_weight=0.3,
        cmlm_weight=0.3,
        min_crop_scale=1.0,
        learning_rate=2e-3,
        warmup_steps=10,
        logging_steps=10,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    logs = log_losses(trainer)
    assert after["eval_recall_sum"] > before["eval_recall_sum"] + 150
    assert logs[-1]["loss_i2t"] + logs[-1]["loss_t2i"] < 0.7 * (logs[0]["loss_i2t"] + logs[0]["loss_t2i"])
    assert logs[-1]["loss_cmvm"] < 0.8 * logs[0]["loss_cmvm"]
    assert logs[-1]["loss_cmlm"] < 0.9 * logs[0]["loss_cmlm"]


def test_exports_a_folder_that_loads_without_any_training_state(make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset=ScenesDataset("validation", 10, 32))
    trainer.train()
    trainer.evaluate()
    folder = tmp_path / "export"
    trainer.export_model(str(folder))
    model, loading = COTSModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    batch = batch_of(trainer, range(4))
    expected = trainer.model.cots.eval().encode_image(batch["pixel_values"])
    torch.testing.assert_close(model.eval().encode_image(batch["pixel_values"]), expected)
    assert not any(word in name for name in model.state_dict() for word in ("head", "queue", "momentum", "mask_token"))
    processor = AutoProcessor.from_pretrained(folder)
    image = trainer.train_dataset[0]["image"]
    assert processor(images=[image], text=["a red circle"], return_tensors="pt")["pixel_values"].shape[-1] == 32
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: zero-shot-image-classification" in card and "model-index" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queue_size": 0}, "queue_size"),
        ({"momentum": 1.5}, "momentum"),
        ({"mcl_weight": 0, "kl_weight": 0, "cmvm_weight": 0, "cmlm_weight": 0}, "nothing to train"),
        ({"image_mask_ratio": 0.0}, "image_mask_ratio"),
        ({"lr_hold_epochs": 1, "lr_scheduler_type": "cosine"}, "lr_hold_epochs"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"image_tokenizer": None}, "image_tokenizer"),
    ],
)
def test_refuses_what_cannot_work_before_any_work(make_trainer, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**arguments)


def test_refuses_processes_that_know_nothing_of_each_other(make_trainer, monkeypatch):
    """What several processes without GPUs are, but for use_cpu: each would train alone, all into the same folder."""
    trainer = make_trainer()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched.* add --use_cpu"):
        check_setup(trainer.args, trainer.processing_class)


def test_refuses_an_image_tokenizer_of_another_vocabulary(make_trainer, tiny_processor):
    from modeling_cots import ImageTokenizer

    with pytest.raises(ValueError, match="64 tokens.*50"):
        make_trainer(image_tokenizer=ImageTokenizer.random(64, [0.5] * 3, [0.5] * 3))


def test_holds_the_learning_rate_and_then_lets_it_fall_linearly(make_trainer):
    """24 images in batches of 8: 3 steps an epoch. One epoch held, two of decay."""
    trainer = make_trainer(max_steps=-1, num_train_epochs=3, lr_hold_epochs=1, learning_rate=1.0)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=9)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], abs=1e-9)


def test_the_mixture_filters_by_the_queue_and_has_no_k(make_trainer):
    trainer = make_trainer(filter_rule="mixture", queue_size=40)
    queue, scores = trainer.queue, torch.tensor([0.0, 0.9, 1.0])
    assert trainer.cots_objective.filter(scores, torch.ones(3, dtype=torch.bool))[0].all(), "the queue is not full"
    images = F.normalize(torch.randn(40, queue.image_embeds.shape[1]), dim=1)
    near = images[10:] + 0.1 * torch.randn(30, images.shape[1])
    texts = F.normalize(torch.cat([torch.randn(10, images.shape[1]), near]), dim=1)
    queue.push(images, texts, (images * texts).sum(dim=1), torch.arange(40))
    keep, threshold = trainer.cots_objective.filter(scores, torch.tensor([True, True, True]))
    expected = mixture_threshold(queue.scores, (images * texts.roll(1, dims=0)).sum(dim=1))
    assert threshold == pytest.approx(expected.item(), abs=1e-6) and keep.tolist() == [False, True, True]
    for wrong in ({"filter_rule": "mixture", "filter_num_std": 1.0}, {"filter_rule": "gmm"}):
        with pytest.raises(ValueError, match="filter_"):
            make_trainer(**wrong)


def test_early_stopping_ends_a_run_that_gets_no_better(make_trainer):
    trainer = make_trainer(
        eval_dataset=ScenesDataset("validation", 8, IMAGE_SIZE),
        max_steps=6,
        learning_rate=1e-12,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3
