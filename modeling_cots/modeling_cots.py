"""`COTSModel`: the two encoders of COTS (Lu et al., CVPR 2022, arXiv 2204.07441), which is what people download.

A text encoder and a vision encoder that never attend to each other, each projected to one unit-length embedding;
retrieval is a dot product. Not here: the heads of masked pre-training (`modeling_cots_pretraining.py`) and the losses,
momentum copy and queues of training (`COTSTrainer`).
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_cots import COTSConfig
from .encoders_cots import (
    accepts,
    build_text_encoder,
    build_vision_encoder,
    copy_encoder_weights,
    max_text_length,
)
from .hub_push import push_model

logger = logging.get_logger(__name__)

# Number of frames that are encoded together where no gradient is needed: a batch of videos is many images.
FRAMES_AT_A_TIME = 64
# Smallest standard deviation that a feature is divided by, as a share of the mean one. Three dimensions of
# all-MiniLM-L6-v2 have one of 1e-9 and less.
MIN_RELATIVE_STD = 0.01


def find_commit(name_or_path: str | os.PathLike | None, **options) -> str | None:
    """
    The commit that a revision of a Hub id is now; `None` for a folder, and where nothing is found.

    Args:
        name_or_path: As `from_pretrained` takes it.
        options: `revision` and other options of `from_pretrained`, of which those that name a repository count.
    """
    if name_or_path is None or os.path.isdir(name_or_path):
        return None
    counting = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
    try:
        path = cached_file(
            name_or_path, "config.json", **{name: options[name] for name in counting if name in options}
        )
    except (OSError, ValueError):  # `from_pretrained` says it better
        return None
    return extract_commit_hash(path, None)


def masked_mean(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that `attention_mask` (B, L) keeps, of `hidden_states` (B, L, H): (B, H).

    The global text feature of COTS (supplement): all text tokens, padding excluded.
    """
    if attention_mask is None:
        return hidden_states.mean(dim=1)
    weights = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def frames_of(pixel_values_videos: torch.Tensor) -> torch.Tensor:
    """The frames of videos (B, T, 3, H, W), one after the other: (B * T, 3, H, W). Raises `ValueError` without any."""
    if pixel_values_videos.dim() != 5 or pixel_values_videos.shape[1] == 0:
        raise ValueError(
            "Videos must be (batch, frames, 3, height, width), with at least one frame; "
            f"got {tuple(pixel_values_videos.shape)}."
        )
    return pixel_values_videos.flatten(0, 1)


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """L2-normalize the rows of `features` (B, d) in float32, whatever precision the model runs in."""
    return F.normalize(features.float(), dim=-1)


def image_text_logits(image_embeds: torch.Tensor, text_embeds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Similarities (B, C) of unit-length embeddings (B, d) and (C, d) over the temperature, float32 under autocast."""
    with torch.autocast(image_embeds.device.type, enabled=False):
        return image_embeds @ text_embeds.t() / temperature


def image_text_contrastive_loss(logits_per_image: torch.Tensor) -> torch.Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies of (B, B) logits, pairs on the diagonal."""
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device)
    return (F.cross_entropy(logits_per_image, targets) + F.cross_entropy(logits_per_image.t(), targets)) / 2


class Standardization(nn.Module):
    """
    Features (..., H) with each dimension centered and divided by its standard deviation; unchanged until fitted.

    Args:
        size (`int`): H.
    """

    def __init__(self, size: int):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(size))
        self.std = nn.Buffer(torch.ones(size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std

    @property
    def is_fitted(self) -> bool:
        """Whether the buffers are other than those of a new model."""
        return bool(self.mean.any() or (self.std != 1).any())

    @torch.no_grad()
    def fit_(self, features: torch.Tensor) -> None:
        """Take mean and standard deviation of `features` (N, H)."""
        std, mean = torch.std_mean(features.double(), dim=0, correction=0)
        # Some encoders have dimensions that hardly vary: their noise is not to be blown up, nor a zero divided by.
        std = std.clamp(min=float(MIN_RELATIVE_STD * std.mean()))
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))


def build_projection(size: int, config: COTSConfig) -> nn.Module:
    """The projection of features (..., `size`) to embeddings (..., `projection_dim`), one layer in the paper."""
    parts: dict[str, nn.Module] = {}
    if config.standardize_features:
        parts["standardization"] = Standardization(size)
    if config.projection_hidden_size is not None:
        parts["hidden"], parts["activation"] = nn.Linear(size, config.projection_hidden_size), nn.GELU()
        size = config.projection_hidden_size
    output = nn.Linear(size, config.projection_dim)
    return nn.Sequential(OrderedDict(parts, output=output)) if parts else output


@dataclass
class COTSOutput(ModelOutput):
    """
    Output of [`COTSModel`]. B images or videos, C texts, d = `projection_dim`.

    Args:
        loss (`torch.Tensor` of shape `()`, with `return_loss=True`):
            Symmetric in-batch contrastive loss.
        logits_per_image (`torch.Tensor` of shape `(B, C)`, float32):
            Cosine similarities of images and texts, divided by the temperature.
        logits_per_text (`torch.Tensor` of shape `(C, B)`, float32):
            Its transpose, or that of `logits_per_video`.
        text_embeds (`torch.Tensor` of shape `(C, d)`, float32):
            Unit-length text embeddings.
        image_embeds (`torch.Tensor` of shape `(B, d)`, float32):
            Unit-length image embeddings.
        text_model_output (`BaseModelOutputWithPooling`):
            What `get_text_features` returns.
        vision_model_output (`BaseModelOutputWithPooling`):
            What `get_image_features` returns.
        logits_per_video (`torch.Tensor` of shape `(B, C)`, float32):
            As `logits_per_image`, of videos.
        video_embeds (`torch.Tensor` of shape `(B, d)`, float32):
            Unit-length video embeddings.
        video_model_output (`BaseModelOutputWithPooling`):
            What `get_video_features` returns.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    logits_per_video: torch.Tensor | None = None
    video_embeds: torch.Tensor | None = None
    video_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class COTSPreTrainedModel(PreTrainedModel):
    """Weights, initialization, saving and loading that the COTS models share."""

    # Set by `from_pretrained(dtype="auto")`, as `pipeline` calls it: a dtype may be chosen for the machine.
    may_choose_dtype = False
    # Set by `use_bfloat16_`.
    has_rounded_weights = False

    config: COTSConfig
    base_model_prefix = "cots"
    main_input_name = "input_ids"
    input_modalities = ("image", "text", "video")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # A pre-training checkpoint loads into COTSModel, which has no heads and no mask token.
    _keys_to_ignore_on_load_unexpected = [
        r"^(cmvm_head|cmlm_head|text_to_image|image_to_text)\.",
        r"vision_model\..*mask_token$",
    ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load as transformers does, of a Hub id all files from one commit; `config._commit_hash` then names it."""
        commit = find_commit(pretrained_model_name_or_path, **kwargs)
        if commit is not None:
            kwargs["revision"] = commit
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.may_choose_dtype = kwargs.get("dtype") == "auto"
        if commit is not None:  # transformers itself has stopped recording it
            model.config._commit_hash = commit
        return loaded

    @classmethod
    def from_encoders(
        cls, text_model: str | PreTrainedModel, vision_model: str | PreTrainedModel, **config_kwargs
    ) -> "COTSPreTrainedModel":
        """
        Build a model from a pair of pre-trained encoders; projections (and heads) are fresh.

        Args:
            text_model (`str` or `PreTrainedModel`):
                Hub id or folder of a text encoder, or the loaded model.
            vision_model (`str` or `PreTrainedModel`):
                Hub id or folder of a vision encoder, or the loaded model.
            config_kwargs:
                Other fields of [`COTSConfig`], such as `projection_dim` or `temperature`.

        Raises `ValueError` for an encoder that does not fit COTS, or whose checkpoint lacks weights.
        """
        encoders = [
            encoder if isinstance(encoder, PreTrainedModel) else AutoModel.from_pretrained(encoder)
            for encoder in (text_model, vision_model)
        ]
        text_config, vision_config = (type(e.config).from_dict(e.config.to_dict()) for e in encoders)
        # Encoders train in float32, whatever the dtype of their checkpoints.
        text_config.dtype = vision_config.dtype = None
        model = cls(COTSConfig(text_config=text_config, vision_config=vision_config, **config_kwargs))
        targets = model.base_model.text_model, model.base_model.vision_model
        for encoder, target in zip(encoders, targets, strict=True):
            copy_encoder_weights(encoder, target)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Standardization):
            initialization.zeros_(module.mean)
            initialization.ones_(module.std)

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs):
        """Save as transformers does. Raises `ValueError` for `push_to_hub=True`: call `push_to_hub` instead."""
        if push_to_hub or True in args[2:3]:  # its place among the positional arguments of transformers
            raise ValueError(
                "save_pretrained(push_to_hub=True) would push an incomplete repository, without processor, code and "
                "card: call model.push_to_hub(repo_id, processor=processor) instead."
            )
        if self.has_rounded_weights:
            raise ValueError('This model runs in bfloat16 for speed: to save it, load it with dtype="float32".')
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *, processor=None, card=None, **push_options):
        """
        Push the two encoders as a complete repository, with processor, code, card and handler (`hub_export.py`).

        Args:
            repo_id (`str`): `name` or `owner/name`; created if there is none.
            processor ([`COTSProcessor`], *optional*): By default the one in the folder or repository of the model.
            card (`ModelCard` or `str`, *optional*): By default a short one without claims about training.
            push_options: `private`, `revision`, `tag`, `create_pr`, `overwrite_card`, `commit_message`, `token`; see
                `push_folder`.

        Returns the `CommitInfo`. Raises `ValueError` without a processor, and what `push_folder` raises.
        """
        return push_model(self, repo_id, processor=processor, card=card, **push_options)


class COTSModel(COTSPreTrainedModel):
    """
    The two encoders of COTS: every image, text or video gets one unit-length embedding.

    Args:
        config ([`COTSConfig`]): The architecture.
        use_mask_token (`bool`, defaults to `False`):
            Whether the vision encoder has the mask token of masked image modeling, as in [`COTSForPreTraining`].
    """

    def __init__(self, config: COTSConfig, use_mask_token: bool = False):
        super().__init__(config)
        self.text_model = build_text_encoder(config.text_config)
        self.max_text_length = max_text_length(self.text_model)
        self.vision_model = build_vision_encoder(config.vision_config, use_mask_token)
        self.text_projection = build_projection(config.text_config.hidden_size, config)
        self.vision_projection = build_projection(config.image_feature_size, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    def _requested_outputs(self) -> dict[str, bool]:
        """Outputs that the composite configuration asks of both encoders; each also follows its own configuration."""
        return {name: True for name in ("output_hidden_states", "output_attentions") if getattr(self.config, name)}

    def run_text_model(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """The text encoder's output; its `pooler_output` is the global text feature (B, text hidden size).

        Texts longer than the encoder's positions are cut, with a warning: pipelines do not truncate.
        """
        if self.max_text_length is not None and input_ids.shape[1] > self.max_text_length:
            logger.warning_once(f"Texts of {input_ids.shape[1]} tokens are cut to the first {self.max_text_length}.")
            input_ids, attention_mask, token_type_ids, position_ids = (
                None if tensor is None else tensor[:, : self.max_text_length]
                for tensor in (input_ids, attention_mask, token_type_ids, position_ids)
            )
        optional = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        for name, value in optional.items():  # some tokenizers give them to encoders that do not take them
            if value is not None and accepts(self.text_model.forward, name):
                kwargs[name] = value
        kwargs = {**self._requested_outputs(), **kwargs, "return_dict": True}
        outputs = self.text_model(input_ids, attention_mask=attention_mask, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=masked_mean(outputs.last_hidden_state, attention_mask),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def run_vision_model(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """The vision encoder's output; its `pooler_output` is the global image feature (B, `image_feature_size`)."""
        if not pixel_values.is_floating_point():  # encoders would cast raw pixels, which are far out of range
            raise ValueError(
                f"`pixel_values` must be normalized floats, as the processor gives; got {pixel_values.dtype}."
            )
        if bool_masked_pos is not None:
            kwargs["bool_masked_pos"] = bool_masked_pos
        if interpolate_pos_encoding and accepts(self.vision_model.forward, "interpolate_pos_encoding"):
            kwargs["interpolate_pos_encoding"] = True
        kwargs = {**self._requested_outputs(), **kwargs, "return_dict": True}
        outputs = self.vision_model(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._pool(outputs.last_hidden_state, pixel_values.shape[-2:]),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def _pool(self, hidden_states: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        """The global image feature (B, `image_feature_size`) of the encoder's output at all tokens (B, L, H)."""
        if self.config.image_pooling == "cls":
            return hidden_states[:, 0]
        rows, columns = (side // patch for side, patch in zip(image_size, self.config.patch_size, strict=True))
        # [CLS] and, in some encoders, distillation or register tokens come first: the patches are the last ones.
        patches = hidden_states[:, hidden_states.shape[1] - rows * columns :]
        return torch.cat([hidden_states[:, 0], patches.mean(dim=1)], dim=1)

    # What the public functions below share. Only those return a tuple where `return_dict` asks for one.

    def _text_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        outputs = self.run_text_model(*args, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def _image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        outputs = self.run_vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        outputs.pooler_output = self.vision_projection(outputs.pooler_output)
        return outputs

    def _video_features(
        self, pixel_values_videos: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        outputs = self._image_features(frames_of(pixel_values_videos), interpolate_pos_encoding, **kwargs)
        shape = pixel_values_videos.shape[:2]
        outputs.last_hidden_state = outputs.last_hidden_state.unflatten(0, shape)
        outputs.pooler_output = unit_length(outputs.pooler_output).unflatten(0, shape).mean(dim=1)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Text features in the form of transformers 5: `last_hidden_state` (B, L, text hidden size) of the encoder and,
        in `pooler_output` (B, `projection_dim`), the projection, *not* normalized. For embeddings see `encode_text`.
        """
        return self._text_features(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Image features in the form of transformers 5: `last_hidden_state` (B, 1 + patches, vision hidden size) of the
        encoder and, in `pooler_output` (B, `projection_dim`), the projection, *not* normalized. For embeddings see
        `encode_image`.
        """
        return self._image_features(pixel_values, interpolate_pos_encoding, **kwargs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Video features of B videos of T frames, (B, T, 3, H, W): `last_hidden_state` (B, T, 1 + patches, vision hidden
        size) and, in `pooler_output` (B, `projection_dim`), the mean of the frames' unit-length embeddings, *not*
        normalized again (COTS, supplement). Hidden states and attentions are the frames', one after the other (B * T).
        Frames are encoded apart, so their order counts for nothing. For embeddings see `encode_video`.
        """
        return self._video_features(pixel_values_videos, interpolate_pos_encoding, **kwargs)

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """Unit-length text embeddings (B, `projection_dim`), float32, of token ids (B, L)."""
        return unit_length(self._text_features(input_ids, attention_mask, **kwargs).pooler_output)

    def encode_image(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Unit-length image embeddings (B, `projection_dim`), float32, of pixels (B, 3, H, W)."""
        return unit_length(self._image_features(pixel_values, **kwargs).pooler_output)

    def embed_image_features(self, features: torch.Tensor) -> torch.Tensor:
        """Unit-length image embeddings (B, `projection_dim`), float32, of the encoder's global features (B, H)."""
        return unit_length(self.vision_projection(features))

    def embed_text_features(self, features: torch.Tensor) -> torch.Tensor:
        """Unit-length text embeddings (B, `projection_dim`), float32, of the encoder's global features (B, H)."""
        return unit_length(self.text_projection(features))

    def encode_video(self, pixel_values_videos: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Unit-length video embeddings (B, `projection_dim`), float32, of frames (B, T, 3, H, W): the mean of the frames'
        embeddings, made unit length again. Without gradients `FRAMES_AT_A_TIME` frames are encoded at a time.
        """
        frames = frames_of(pixel_values_videos)
        parts = [frames] if torch.is_grad_enabled() else frames.split(FRAMES_AT_A_TIME)
        frame_embeds = torch.cat([self.encode_image(part, **kwargs) for part in parts])
        return unit_length(frame_embeds.unflatten(0, pixel_values_videos.shape[:2]).mean(dim=1))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        pixel_values_videos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | COTSOutput:
        """
        Embed texts, and images or videos; with both, also compare every image or video with every text.

        Args:
            input_ids (`torch.Tensor` of shape `(C, L)`, *optional*): Token ids.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Normalized pixels.
            attention_mask (`torch.Tensor` of shape `(C, L)`, *optional*): 1 for tokens, 0 for padding.
            return_loss (`bool`, *optional*): Fill `loss`; image i and text i are a pair, so B = C.
            interpolate_pos_encoding (`bool`, defaults to `False`): Take images of another size than the model's.
            pixel_values_videos (`torch.Tensor` of shape `(B, T, 3, H, W)`, *optional*): Frames, in place of images.

        Raises `ValueError` without any input, for images and videos at once, and for `return_loss` without pairs.
        """
        has_pixels = pixel_values is not None or pixel_values_videos is not None
        if pixel_values is not None and pixel_values_videos is not None:
            raise ValueError("COTSModel takes `pixel_values` or `pixel_values_videos`, not both in one call.")
        if input_ids is None and not has_pixels:
            raise ValueError("COTSModel needs `input_ids`, `pixel_values` or both (or `pixel_values_videos`).")
        if return_loss and (input_ids is None or not has_pixels):
            raise ValueError("`return_loss=True` needs both `input_ids` and `pixel_values` or `pixel_values_videos`.")
        output = COTSOutput()
        if pixel_values is not None:
            image_features = self._image_features(pixel_values, interpolate_pos_encoding, **kwargs)
            output.vision_model_output = image_features
            output.image_embeds = unit_length(image_features.pooler_output)
        if pixel_values_videos is not None:
            video_features = self._video_features(pixel_values_videos, interpolate_pos_encoding, **kwargs)
            output.video_model_output = video_features
            output.video_embeds = unit_length(video_features.pooler_output)
        if input_ids is not None:
            text_features = self._text_features(input_ids, attention_mask, token_type_ids, position_ids, **kwargs)
            output.text_model_output = text_features
            output.text_embeds = unit_length(text_features.pooler_output)
        if has_pixels and input_ids is not None:
            self._compare(output, return_loss)
        return COTSOutput(**output)  # in the order of the fields, whatever the order of the assignments above

    def _compare(self, output: COTSOutput, return_loss: bool | None) -> None:
        """Fill the logits of an output that holds texts and images or videos, and, if asked for, the loss."""
        is_video = output.image_embeds is None
        visual_embeds = output.video_embeds if is_video else output.image_embeds
        text_embeds = output.text_embeds.to(visual_embeds.device)
        logits = image_text_logits(visual_embeds, text_embeds, self.config.temperature)  # type: ignore[arg-type]
        output["logits_per_video" if is_video else "logits_per_image"] = logits
        output.logits_per_text = logits.t()
        if return_loss:
            output.loss = image_text_contrastive_loss(logits)


__all__ = ["COTSModel", "COTSOutput", "COTSPreTrainedModel"]
