"""The peer of `ablation.py`: in-batch contrastive learning as transformers' VisionTextDualEncoderModel does it.

Model and loss are that class's own: two encoders with their poolers, two projections, a learned temperature. Here are
only the two things that it needs to stand beside COTS: batches from the same collator, and the same evaluation.
"""

import math

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from modeling_cots import COTSConfig
from modeling_cots.data.image_collators import COTSEvaluationCollator
from modeling_cots.data.pixel_normalization import PixelNormalizer
from modeling_cots.evaluation.embedding import PairEmbeddings
from modeling_cots.modeling_cots import unit_length

MODEL_INPUTS = "input_ids", "attention_mask", "pixel_values"


class PeerCollator:
    """What the peer takes of a batch of COTS, with its pixels normalized as COTS's trainer does."""

    def __init__(self, collator, processor):
        self.collator, self.normalize_pixels = collator, PixelNormalizer(processor)

    def __call__(self, items: list[dict]) -> dict:
        batch = self.normalize_pixels(self.collator(items))
        return {**{name: batch[name] for name in MODEL_INPUTS}, "return_loss": True}


def build_peer(config: COTSConfig, args: TrainingArguments, train_dataset, collator: PeerCollator) -> Trainer:
    """transformers' Trainer around a peer with encoders of the sizes in `config`."""
    peer_config = VisionTextDualEncoderConfig.from_vision_text_configs(
        config.vision_config,
        config.text_config,
        projection_dim=config.projection_dim,
        logit_scale_init_value=math.log(1 / config.temperature),
    )
    # With the attention of COTS, so that speed and counted work tell of the method alone.
    peer_config._attn_implementation = config._attn_implementation
    return Trainer(
        model=VisionTextDualEncoderModel(peer_config),
        args=args,
        train_dataset=train_dataset,
        data_collator=collator,
    )


@torch.no_grad()
def embed_peer(model: VisionTextDualEncoderModel, dataset, processor, max_text_length: int) -> PairEmbeddings:
    """All images and captions of `dataset`, as `embed_pairs` does for COTS."""
    model.eval()
    images, texts, image_ids, text_ids = [], [], [], []
    collator = COTSEvaluationCollator(processor, max_text_length=max_text_length)
    normalize_pixels = PixelNormalizer(processor)
    device = model.device
    for batch in map(normalize_pixels, DataLoader(dataset, batch_size=200, collate_fn=collator)):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            images.append(unit_length(model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))
            texts.append(
                unit_length(model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output)
            )
        image_ids.append(batch["pair_ids"])
        text_ids.append(batch["caption_pair_ids"])
    return PairEmbeddings(*(torch.cat(parts).cpu() for parts in (images, texts, image_ids, text_ids)), 0)
