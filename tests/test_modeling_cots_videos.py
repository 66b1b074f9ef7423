"""Videos in both models: the mean of the frames' embeddings, against one frame at a time."""

import pytest
import torch
from torch.nn import functional as F

from modeling_cots import COTSForPreTraining, COTSModel, modeling_cots


@pytest.fixture
def videos() -> torch.Tensor:
    """Three random videos of five frames, (3, 5, 3, 32, 32)."""
    return torch.randn(3, 5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def texts(tiny_inputs) -> dict[str, torch.Tensor]:
    return {name: tiny_inputs[name][:3] for name in ("input_ids", "attention_mask")}


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


def slow_mean(model: COTSModel, video: torch.Tensor) -> torch.Tensor:
    """The mean of the unit-length embeddings of the frames of one video (T, 3, H, W): (d,)."""
    total = torch.zeros(model.config.projection_dim)
    for frame in video:
        last_hidden_state = model.vision_model(frame.unsqueeze(0)).last_hidden_state
        feature = model.vision_projection(last_hidden_state[0, 0])
        total += feature / feature.norm()
    return total / len(video)


@torch.no_grad()
def test_equals_one_frame_at_a_time(model, videos):
    features, embeds = model.get_video_features(videos), model.encode_video(videos)
    assert features.last_hidden_state.shape == (3, 5, 1 + 16, 32)
    assert embeds.dtype == torch.float32
    for i, video in enumerate(videos):
        mean = slow_mean(model, video)
        torch.testing.assert_close(features.pooler_output[i], mean)
        torch.testing.assert_close(embeds[i], mean / mean.norm())
        assert mean.norm() < 0.999, "frames must differ, or normalizing again would change nothing"
        for t, frame in enumerate(video):
            states = model.get_image_features(frame.unsqueeze(0)).last_hidden_state[0]
            torch.testing.assert_close(features.last_hidden_state[i, t], states)


@torch.no_grad()
def test_a_still_video_is_its_image_and_a_reversed_one_is_itself(model, videos):
    images = videos[:, 0]
    still = images.unsqueeze(1).expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(model.encode_video(still), model.encode_image(images))
    torch.testing.assert_close(model.encode_video(videos.flip(1)), model.encode_video(videos))
    assert (model.encode_video(videos[:, 1:]) - model.encode_video(videos)).abs().max() > 1e-3


def test_frames_are_encoded_a_few_at_a_time_where_no_gradient_is_wanted(model, videos, monkeypatch):
    monkeypatch.setattr(modeling_cots, "FRAMES_AT_A_TIME", 4)
    sizes = []
    model.vision_model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    whole = model.encode_video(videos)
    with torch.no_grad():
        in_parts = model.encode_video(videos)
    assert sizes == [15, 4, 4, 4, 3]
    torch.testing.assert_close(in_parts, whole.detach())
    whole[:, 0].sum().backward()
    assert model.vision_projection.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_forward_compares_videos_with_texts(model, videos, texts):
    output = model(**texts, pixel_values_videos=videos, return_loss=True)
    text_embeds = model.encode_text(**texts)
    torch.testing.assert_close(output.video_embeds, model.encode_video(videos))
    torch.testing.assert_close(output.logits_per_video, output.video_embeds @ text_embeds.t() / 0.05)
    torch.testing.assert_close(output.logits_per_text, output.logits_per_video.t())
    expected = (
        sum(F.cross_entropy(logits, torch.arange(3)) for logits in (output.logits_per_video, output.logits_per_text))
        / 2
    )
    torch.testing.assert_close(output.loss, expected)
    assert output.image_embeds is None and output.logits_per_image is None
    by_keyword = model(**texts, pixel_values_videos=videos, return_loss=True, return_dict=False)
    assert isinstance(by_keyword, tuple) and torch.equal(by_keyword[0], output.loss)


@torch.no_grad()
def test_videos_alone_give_their_embeddings_first(model, videos):
    """Pipelines take the first field."""
    output = model(pixel_values_videos=videos)
    torch.testing.assert_close(output[0], model.encode_video(videos))
    assert isinstance(model.get_video_features(videos, return_dict=False), tuple)
    states = model.get_video_features(videos, output_hidden_states=True).hidden_states
    assert [tuple(layer.shape) for layer in states] == [(15, 17, 32)] * 3


@torch.no_grad()
def test_other_frame_sizes_and_half_precision(model, videos):
    larger = F.interpolate(videos.flatten(0, 1), size=(48, 48)).unflatten(0, (3, 5))
    embeds = model.encode_video(larger, interpolate_pos_encoding=True)
    assert embeds.shape == (3, 16)
    half = model.to(torch.bfloat16).encode_video(videos.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.norm(dim=-1), torch.ones(3))


def test_what_the_models_refuse(model, tiny_config, videos, texts, tiny_masked_inputs):
    with pytest.raises(ValueError, match="not both"):
        model(pixel_values=videos[:, 0], pixel_values_videos=videos)
    with pytest.raises(ValueError, match="return_loss"):
        model(pixel_values_videos=videos, return_loss=True)
    with pytest.raises(ValueError, match=r"at least one frame; got \(3, 3, 32, 32\)"):
        model.encode_video(videos[:, 0])
    pretraining = COTSForPreTraining(tiny_config)
    for pixels in ({}, {"pixel_values": videos[:, 0], "pixel_values_videos": videos}):
        with pytest.raises(ValueError, match="one of the (two|three)"):
            pretraining(**texts, **pixels)
    masked = {name: tiny_masked_inputs[name][:3] for name in ("masked_input_ids", "masked_token_pos")}
    for masks in ({"bool_masked_pos": tiny_masked_inputs["bool_masked_pos"][:3]}, masked):
        with pytest.raises(ValueError, match="Videos have no masked passes"):
            pretraining(**texts, pixel_values_videos=videos, **masks)


@torch.no_grad()
def test_pre_training_puts_videos_in_the_place_of_images(tiny_config, videos, texts):
    pretraining = COTSForPreTraining(tiny_config).eval()
    output = pretraining(**texts, pixel_values_videos=videos, output_hidden_states=True)
    torch.testing.assert_close(output.image_embeds, pretraining.cots.encode_video(videos))
    torch.testing.assert_close(output.text_embeds, pretraining.cots.encode_text(**texts))
    assert output.image_token_logits is None and output.text_token_logits is None
    assert len(output.vision_model_output.hidden_states) == len(output.text_model_output.hidden_states) == 3


@torch.no_grad()
def test_what_the_processor_makes_of_videos_and_texts_goes_in(model, tiny_processor):
    clips = [torch.randint(0, 256, (length, 40, 30, 3), dtype=torch.uint8).numpy() for length in (2, 9)]
    inputs = tiny_processor(videos=clips, text=["a red circle", "the white dog"], padding=True, return_tensors="pt")
    output = model(**inputs)
    assert inputs["pixel_values_videos"].shape == (2, 4, 3, 32, 32)
    assert output.logits_per_video.shape == (2, 2)
