"""`COTSForPreTraining`: the two encoders with the heads of the paper's token level (COTS, CVPR 2022).

Its `forward` encodes. The four losses, the momentum copy and the queues belong to training. This is a separate file
because a saved `COTSModel` carries its code along, and needs no heads.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .configuration_cots import COTSConfig
from .modeling_cots import COTSModel, COTSPreTrainedModel, unit_length

# Largest number of positions (patches or tokens, both passes together) at which an encoder makes its unmasked and its
# masked pass as one batch: launching a small layer takes longer than computing it. Larger batches make the passes one
# after the other, so that a layer needs the memory of one pass (docs/performance.md).
MAX_JOINED_POSITIONS = 1024

# Outputs of an encoder for the unmasked pass and for the masked pass, which is `None` without a mask.
Passes = tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling | None]


@dataclass
class COTSForPreTrainingOutput(ModelOutput):
    """
    Output of [`COTSForPreTraining`]: what the four losses of COTS are computed from.

    Args:
        image_embeds (`torch.Tensor` of shape `(B, d)`, float32):
            Unit-length embeddings of the unmasked images, or of the videos in their place.
        text_embeds (`torch.Tensor` of shape `(B, d)`, float32):
            Unit-length embeddings of the unmasked texts.
        image_token_logits (`torch.Tensor` of shape `(masked patches, image_vocab_size)`, with `bool_masked_pos`):
            Scores of the visual tokens, one row for every masked patch, in row-major order of the mask (CMVM).
        text_token_logits (`torch.Tensor` of shape `(masked tokens, vocab_size)`, with `masked_input_ids`):
            Scores of the tokens, one row for every masked one, in row-major order of the mask (CMLM).
        text_model_output (`BaseModelOutputWithPooling`):
            Output of the text encoder for the unmasked texts, with the global text feature as `pooler_output`.
        vision_model_output (`BaseModelOutputWithPooling`):
            Output of the vision encoder for the unmasked images, with the global image feature as `pooler_output`.
            With videos both are what `COTSModel.get_video_features` and `get_text_features` return.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_token_logits: torch.Tensor | None = None
    text_token_logits: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class COTSForPreTraining(COTSPreTrainedModel):
    """
    [`COTSModel`], as `.cots`, with the heads of masked vision-language modeling (the paper's token level).

    `forward` encodes and computes no loss. One call makes the unmasked and the masked pass of both encoders.
    """

    def __init__(self, config: COTSConfig):
        super().__init__(config)
        text_size, vision_size = config.text_config.hidden_size, config.vision_config.hidden_size
        self.cots = COTSModel(config, use_mask_token=True)
        self.text_to_image = nn.Linear(text_size, vision_size)
        self.image_to_text = nn.Linear(config.image_feature_size, text_size)
        self.cmvm_head = nn.Linear(vision_size, config.image_vocab_size)
        # BERT's MLM head, whatever the text encoder is. Not `BertOnlyMLMHead`, which keeps its output bias twice.
        self.cmlm_head = nn.Sequential(
            BertPredictionHeadTransform(BertConfig(hidden_size=text_size)),
            nn.Linear(text_size, config.text_config.vocab_size),
        )
        self._tied_weights_keys = self._name_tied_weights()
        self.post_init()

    def _name_tied_weights(self) -> dict[str, str]:
        if not self.config.tie_word_embeddings:
            return {}
        embeddings, decoder = self.get_input_embeddings(), self.get_output_embeddings()
        if embeddings.weight.shape != decoder.weight.shape:
            raise ValueError(
                f"The word embeddings {tuple(embeddings.weight.shape)} and the masked-text head "
                f"{tuple(decoder.weight.shape)} differ in shape: set `tie_word_embeddings=False`."
            )
        name = next(name for name, module in self.named_modules() if module is embeddings)
        return {"cmlm_head.1.weight": f"{name}.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.cots.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.cots.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.cmlm_head[1]

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.cmlm_head[1] = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        masked_input_ids: torch.Tensor | None = None,
        masked_token_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pixel_values_videos: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | COTSForPreTrainingOutput:
        """
        Encode B pairs, unmasked and masked.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`, *optional*): Token ids.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Normalized pixels.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for tokens, 0 for padding.
            bool_masked_pos (`torch.Tensor` of shape `(B, patches)`, *optional*):
                Patches to hide from the masked pass and to predict. Without it there is no masked pass of images.
            masked_input_ids (`torch.Tensor` of shape `(B, L)`, *optional*):
                Token ids after BERT's 80/10/10 corruption. Without them there is no masked pass of texts.
            masked_token_pos (`torch.Tensor` of shape `(B, L)`, bool, required with `masked_input_ids`):
                Tokens to predict.
            interpolate_pos_encoding (`bool`, defaults to `False`): Take images of another size than the model's.
            pixel_values_videos (`torch.Tensor` of shape `(B, T, 3, H, W)`, *optional*):
                Frames of videos, in place of `pixel_values`. Videos have no masked passes.
            image_features (`torch.Tensor` of shape `(B, image_feature_size)`, *optional*):
                Global image features, computed before, in place of `pixel_values`; they have no masked pass.
            text_features (`torch.Tensor` of shape `(B, text hidden size)`, *optional*):
                Global text features, computed before, in place of `input_ids`; they have no masked pass.

        Raises `ValueError` for only one of `masked_input_ids` and `masked_token_pos`, for several inputs of a kind or
        none, and for masks with videos or features.
        """
        if sum(each is not None for each in (pixel_values, pixel_values_videos, image_features)) != 1:
            raise ValueError("Give `pixel_values`, `pixel_values_videos` or `image_features`, one of the three.")
        if (input_ids is None) == (text_features is None):
            raise ValueError("Give `input_ids` or `text_features`, one of the two.")
        if image_features is not None and bool_masked_pos is not None:
            raise ValueError("Features have no masked pass: leave out `bool_masked_pos`, or give `pixel_values`.")
        if text_features is not None and masked_input_ids is not None:
            raise ValueError("Features have no masked pass: leave out `masked_input_ids`, or give `input_ids`.")
        if pixel_values_videos is not None and text_features is not None:
            raise ValueError("Videos have no cached features: give `input_ids`.")
        if (masked_input_ids is None) != (masked_token_pos is None):
            raise ValueError("`masked_input_ids` and `masked_token_pos` go together.")
        if pixel_values_videos is not None:
            if bool_masked_pos is not None or masked_input_ids is not None:
                raise ValueError("Videos have no masked passes: leave out `bool_masked_pos` and `masked_input_ids`.")
            video_features = self.cots._video_features(pixel_values_videos, interpolate_pos_encoding, **kwargs)
            text_features = self.cots._text_features(input_ids, attention_mask, token_type_ids, **kwargs)
            return _embeddings_of_videos(video_features, text_features)
        vision_output, masked_vision_output = BaseModelOutputWithPooling(pooler_output=image_features), None
        if pixel_values is not None:
            vision_output, masked_vision_output = self._run_vision_passes(
                pixel_values, bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
            )
        text_output, masked_text_output = BaseModelOutputWithPooling(pooler_output=text_features), None
        if input_ids is not None:
            text_output, masked_text_output = self._run_text_passes(
                input_ids, masked_input_ids, attention_mask, token_type_ids, **kwargs
            )
        image_feature, text_feature = vision_output.pooler_output, text_output.pooler_output
        image_token_logits = text_token_logits = None
        if masked_vision_output is not None:
            image_token_logits = self._predict_image_tokens(masked_vision_output, bool_masked_pos.bool(), text_feature)
        if masked_text_output is not None:
            text_token_logits = self._predict_text_tokens(masked_text_output, masked_token_pos.bool(), image_feature)
        return COTSForPreTrainingOutput(
            image_embeds=self.cots.embed_image_features(image_feature),
            text_embeds=self.cots.embed_text_features(text_feature),
            image_token_logits=image_token_logits,
            text_token_logits=text_token_logits,
            text_model_output=text_output,
            vision_model_output=vision_output,
        )

    def _run_vision_passes(self, pixel_values, bool_masked_pos, **kwargs) -> Passes:
        run = partial(self.cots.run_vision_model, **kwargs)
        if bool_masked_pos is None:
            return run(pixel_values), None
        bool_masked_pos = bool_masked_pos.bool()
        if 2 * bool_masked_pos.numel() > MAX_JOINED_POSITIONS or self._shows_layers(self.cots.vision_model, kwargs):
            return run(pixel_values), run(pixel_values, bool_masked_pos)
        nothing = torch.zeros_like(bool_masked_pos)
        return _split_passes(run(torch.cat([pixel_values] * 2), torch.cat([nothing, bool_masked_pos])))

    def _run_text_passes(self, input_ids, masked_input_ids, attention_mask, token_type_ids, **kwargs) -> Passes:
        run = partial(self.cots.run_text_model, **kwargs)
        if masked_input_ids is None:
            return run(input_ids, attention_mask, token_type_ids), None
        if 2 * input_ids.numel() > MAX_JOINED_POSITIONS or self._shows_layers(self.cots.text_model, kwargs):
            return tuple(run(ids, attention_mask, token_type_ids) for ids in (input_ids, masked_input_ids))
        shared = (None if tensor is None else torch.cat([tensor] * 2) for tensor in (attention_mask, token_type_ids))
        return _split_passes(run(torch.cat([input_ids, masked_input_ids]), *shared))

    def _shows_layers(self, encoder: nn.Module, kwargs: dict) -> bool:
        """Whether layers are asked for: halves of a joined batch would lie beside the path of the gradient."""
        names = ("output_hidden_states", "output_attentions")
        asked = {name: getattr(encoder.config, name) or getattr(self.config, name) for name in names} | kwargs
        return any(asked[name] for name in names)

    def _predict_image_tokens(self, masked_vision_output, bool_masked_pos, text_feature) -> torch.Tensor:
        # [CLS] and, in some encoders, distillation or register tokens come first: the patches are the last ones.
        patches = masked_vision_output.last_hidden_state[:, -bool_masked_pos.shape[1] :]
        # COTS, token level (CMVM): the paired text's global feature is added to each masked patch's vector.
        conditioned = patches + self.text_to_image(text_feature).unsqueeze(1)
        return self.cmvm_head(conditioned[bool_masked_pos])

    def _predict_text_tokens(self, masked_text_output, masked_token_pos, image_feature) -> torch.Tensor:
        # COTS, token level (CMLM): the paired image's global feature is added to each masked token's vector.
        conditioned = masked_text_output.last_hidden_state + self.image_to_text(image_feature).unsqueeze(1)
        return self.cmlm_head(conditioned[masked_token_pos])


def _embeddings_of_videos(
    video_features: BaseModelOutputWithPooling, text_features: BaseModelOutputWithPooling
) -> COTSForPreTrainingOutput:
    return COTSForPreTrainingOutput(
        image_embeds=unit_length(video_features.pooler_output),
        text_embeds=unit_length(text_features.pooler_output),
        text_model_output=text_features,
        vision_model_output=video_features,
    )


def _split_passes(output: BaseModelOutputWithPooling) -> Passes:
    """The output of one batch (2 B) as that of its unmasked first half and of its masked second half (B each)."""
    halves = zip(*(value.chunk(2) for value in output.values()), strict=True)
    return tuple(BaseModelOutputWithPooling(**dict(zip(output, half, strict=True))) for half in halves)
