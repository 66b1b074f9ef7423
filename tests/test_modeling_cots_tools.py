"""What people do next with a COTS model: adapters, quantization, export, placement on devices. Skipped by package."""

import pytest
import torch
from torch.export import Dim

from modeling_cots import COTSModel, export_repository


@pytest.fixture
def model(tiny_config) -> COTSModel:
    torch.manual_seed(0)
    return COTSModel(tiny_config).eval()


def test_lora_trains_is_loaded_again_and_exported_merged(model, tiny_processor, tiny_inputs, tmp_path):
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**tiny_inputs, return_loss=True).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapters")
    export_repository(adapted, tiny_processor, tmp_path / "merged")
    base = COTSModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected, plain = adapted(**tiny_inputs), base(**tiny_inputs)
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
        for again in (loaded, COTSModel.from_pretrained(tmp_path / "merged")):
            torch.testing.assert_close(again.eval()(**tiny_inputs).text_embeds, expected.text_embeds)
            torch.testing.assert_close(again(**tiny_inputs).image_embeds, expected.image_embeds)
    assert not torch.allclose(plain.text_embeds, expected.text_embeds, atol=1e-3)


def test_weights_in_eight_bits_embed_nearly_alike(model, tiny_inputs):
    quantization = pytest.importorskip("torchao.quantization")
    with torch.no_grad():
        expected = model(**tiny_inputs)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        output = model(**tiny_inputs)
    assert not torch.equal(output.text_embeds, expected.text_embeds)
    for name in ("text_embeds", "image_embeds"):
        assert torch.cosine_similarity(output[name], expected[name]).min() > 0.99


@torch.no_grad()
def test_torch_export_gives_the_same_embeddings_for_other_batches(model, tiny_inputs):
    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cots = model

        def forward(self, pixel_values):
            return self.cots.encode_image(pixel_values)

    program = torch.export.export(
        Images(),
        (tiny_inputs["pixel_values"],),
        dynamic_shapes={"pixel_values": {0: Dim("batch", max=64)}},
        strict=False,
    )
    for size in (4, 3):
        pixels = tiny_inputs["pixel_values"][:size]
        torch.testing.assert_close(program.module()(pixels), model.encode_image(pixels))


@torch.no_grad()
@pytest.mark.parametrize("vision_device", ["cpu", "disk"])
def test_a_device_map_may_leave_an_encoder_on_the_disk(model, tiny_inputs, tmp_path, vision_device):
    model.save_pretrained(tmp_path / "model")
    parts = {"text_model": "cpu", "text_projection": "cpu", "vision_model": vision_device, "vision_projection": "cpu"}
    placed = COTSModel.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=str(tmp_path / "offload"))
    if vision_device == "disk":
        assert next(placed.vision_model.parameters()).device.type == "meta"
    torch.testing.assert_close(placed(**tiny_inputs).image_embeds, model(**tiny_inputs).image_embeds)
