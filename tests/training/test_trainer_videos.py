"""COTSTrainer on real video files: the loss written out, momentum copy and queue, bad files, evaluation, resuming."""

import pytest
import torch
from video_files import write_video

from modeling_cots import COTSModel
from modeling_cots.data.videos import VideoDataset

CAPTIONS = ["a red circle", "the white dog runs", "two green triangles", "a boat near the beach"]
VIDEOS_ONLY = {"cmvm_weight": 0.0, "cmlm_weight": 0.0, "image_tokenizer": None, "min_crop_scale": 1.0}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    """Ten videos of six frames, each of another gray."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{number}.mp4", range(4 * number, 4 * number + 6)) for number in range(10)]


@pytest.fixture
def videos(paths) -> VideoDataset:
    return VideoDataset([f"video{i}" for i in range(10)], paths, [[CAPTIONS[i % 4]] for i in range(10)])


@pytest.fixture
def make(make_trainer, videos):
    def make(train_dataset=None, **arguments):
        return make_trainer(train_dataset=train_dataset or videos, **{**VIDEOS_ONLY, **arguments})

    return make


def test_loss_equals_the_method_written_out(make):
    """MCL and KL of one pair at a time, from the mean of frames that were encoded one at a time."""
    trainer = make(batch_candidates=True, kl_weight=0.5)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    model, slow, tau = trainer.model.eval(), trainer.momentum_state.encoder.model, trainer.model.config.temperature
    loss = trainer.compute_loss(model, batch)

    def video_embeds(cots: COTSModel) -> torch.Tensor:
        frames = [[cots.encode_image(frame[None])[0] for frame in video] for video in batch["pixel_values_videos"]]
        means = torch.stack([torch.stack(video).mean(0) for video in frames])
        return means / means.norm(dim=1, keepdim=True)

    with torch.no_grad():
        images, texts = video_embeds(model.cots), model.cots.encode_text(batch["input_ids"], batch["attention_mask"])
        slow_images, slow_texts = video_embeds(slow), slow.encode_text(batch["input_ids"], batch["attention_mask"])
    i2t = t2i = kl = 0.0
    for i in range(4):
        order = [i, *(j for j in range(4) if j != i)]  # the queue is empty: the rest of the batch are the candidates
        p = (slow_texts[order] @ images[i] / tau).double().softmax(0)
        q = (slow_images[order] @ texts[i] / tau).double().softmax(0)
        i2t, t2i = i2t - p[0].log() / 4, t2i - q[0].log() / 4
        kl = kl + ((q * (q / p).log()).sum() + (p * (p / q).log()).sum()) / 4
    assert loss.item() == pytest.approx((i2t + t2i + 0.5 * kl).item(), rel=1e-4)


def test_momentum_embeddings_of_videos_enter_the_queue(make):
    trainer = make()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    trainer.compute_loss(trainer.model.train(), batch)
    expected = trainer.momentum_state.encoder.model.encode_video(batch["pixel_values_videos"])
    assert trainer.queue.num_pushed == 4 and trainer.queue.pair_ids[:4].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(trainer.queue.image_embeds[:4], expected)


def test_every_trained_parameter_gets_a_gradient(make):
    trainer = make(batch_candidates=True)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # its new name is not in 5.17
def test_gradient_checkpointing_changes_nothing(make):
    """The recipe needs it: 48 videos of 16 frames are 768 images."""
    weights = []
    for checkpointing in (False, True):
        trainer = make(
            gradient_checkpointing=checkpointing, batch_candidates=True, max_steps=2, per_device_train_batch_size=5
        )
        trainer.train()
        weights.append(trainer.model.cots.vision_projection.weight.detach())
    torch.testing.assert_close(*weights)


def test_a_queue_that_the_batch_does_not_divide_wraps_around(make):
    """As 48 into 1,444 in the recipe: here 4 into 6."""
    trainer = make(queue_size=6, per_device_train_batch_size=4, max_steps=5)
    trainer.train()
    # Each epoch of ten videos is 4 + 4 + 2: five batches of two epochs hold 18.
    assert trainer.queue.num_pushed == 18 and trainer.queue.is_full
    assert len(set(trainer.queue.pair_ids.tolist())) >= 4


def test_unreadable_videos_are_counted_and_leave_no_trace(make, paths, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    broken = [*paths[:3], str(tmp_path / "text.mp4"), str(tmp_path / "missing.mp4")]
    dataset = VideoDataset([f"v{i}" for i in range(5)], broken, [["a red circle"]] * 5)
    trainer = make(dataset, eval_dataset=dataset, per_device_train_batch_size=5, max_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss_i2t" in entry]
    assert [entry["skipped_images"] for entry in logs] == [2, 4]
    assert trainer.queue.num_pushed == 6 and set(trainer.queue.pair_ids[:6].tolist()) == {0, 1, 2}
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.evaluate()["eval_skipped_images"] == 2


def test_evaluates_the_middle_frames(make, videos, tiny_processor):
    from modeling_cots.evaluation.embedding import embed_pairs

    trainer = make(eval_dataset=videos)
    metrics = trainer.evaluate()
    assert metrics["eval_t2i_recall_at_10"] == 100  # of ten videos
    embeds = embed_pairs(
        trainer.model.cots,
        videos,
        tiny_processor,
        trainer.accelerator,
        batch_size=3,
        max_text_length=24,
        progress=False,
    )
    for index in range(10):
        pixels = tiny_processor(videos=videos[index]["video"], return_tensors="pt")["pixel_values_videos"]
        with torch.no_grad():
            torch.testing.assert_close(embeds.image_embeds[index], trainer.model.cots.encode_video(pixels)[0])


def test_resuming_is_exact(make, tmp_path):
    """Frames, crops and captions too are drawn by their own seeds."""
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "min_crop_scale": 0.5, "horizontal_flip": 0.5}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make(**options, **saving)
    whole.train()
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert torch.equal(whole.queue.image_embeds, resumed.queue.image_embeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cmvm_weight": 0.5, "image_tokenizer": "random"}, "Videos have no masked passes: set cmvm_weight to 0"),
        ({"cmlm_weight": 1.0}, "set cmlm_weight to 0, got 1.0"),
        ({"auto_augment": "rand-m5"}, "auto_augment works on single images"),
    ],
)
def test_what_means_nothing_for_videos_is_refused(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
