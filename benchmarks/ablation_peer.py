"""The peer of `ablation.py`: in-batch contrastive learning as transformers' VisionTextDualEncoderModel does it.

Loss and forward pass are that class's own. It stands on the same features as COTS: its encoders
hand them through, and its projections are those of the COTS model that it is made from, so that both begin alike.
"""

import math

import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    Trainer,
    TrainingArguments,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_cots import COTSModel
from modeling_cots.modeling_cots import unit_length


class Features(nn.Module):
    """An encoder whose input is its output: features (B, H) that were computed before."""

    def forward(self, pixel_values=None, input_ids=None, **kwargs) -> BaseModelOutputWithPooling:
        features = input_ids if pixel_values is None else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=features.unsqueeze(1), pooler_output=features)


class PeerCollator:
    """What the peer takes of a batch of COTS, under the names that its class knows."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, items: list[dict]) -> dict:
        batch = self.collator(items)
        return {"pixel_values": batch["image_features"], "input_ids": batch["text_features"], "return_loss": True}


def build_peer(model: COTSModel, args: TrainingArguments, train_dataset, collator: PeerCollator) -> Trainer:
    """transformers' Trainer around a peer with the projections of `model`."""
    small = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    config = VisionTextDualEncoderConfig.from_vision_text_configs(  # of encoders that are replaced below
        ViTConfig(**small),
        BertConfig(**small, vocab_size=4),
        projection_dim=model.config.projection_dim,
        logit_scale_init_value=math.log(1 / model.config.temperature),
    )
    peer = VisionTextDualEncoderModel(config)
    peer.vision_model, peer.text_model = Features(), Features()
    # As in COTS. A learned one falls while the pairs are learned by heart.
    peer.logit_scale.requires_grad_(False)
    peer.visual_projection, peer.text_projection = model.vision_projection, model.text_projection
    return Trainer(model=peer, args=args, train_dataset=train_dataset, data_collator=collator)


@torch.no_grad()
def embed_peer(model: VisionTextDualEncoderModel, dataset) -> tuple[torch.Tensor, ...]:
    """Embeddings of all images (N, d) and captions (C, d) of `dataset`, and their pair ids (N,) and (C,)."""
    model.eval()
    items = [dataset[index] for index in range(len(dataset))]
    images = torch.from_numpy(np.stack([item["image_features"][0] for item in items])).to(model.device)
    texts = torch.from_numpy(np.concatenate([item["text_features"] for item in items])).to(model.device)
    ids = torch.tensor([item["pair_id"] for item in items])
    counts = torch.tensor([len(item["captions"]) for item in items])
    image_embeds = unit_length(model.get_image_features(pixel_values=images).pooler_output)
    text_embeds = unit_length(model.get_text_features(input_ids=texts).pooler_output)
    return image_embeds.cpu(), text_embeds.cpu(), ids, ids.repeat_interleave(counts)
