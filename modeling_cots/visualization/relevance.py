"""GAE relevance maps: which patches a caption or one of its words responds to, and which words an image responds to.

Generic attention explainability (Chefer et al., ICCV 2021, arXiv 2103.15679), the rule for self-attention, which is
the only attention of two separate encoders. Through the layers R <- R + E_heads[(grad * attention)^+] R, starting from
R = identity. The gradient is that of the model's own logit, similarity over temperature. COTS shows such maps in
Figure 1 of its supplement. Eager attentions and `torch.autograd.grad` suffice, without hooks. Drawing is in
`heat_maps.py`.

The encoders never see each other, so that a single word has no score. The score of a word is defined here as what it
adds to that of the caption, f_image . (f_caption - f_caption without the word). docs/seeing.md compares alternatives.
"""

import re
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..processing_cots import TOKENIZER_LOCK

NUM_WORDS = 6  # mapped if no words are given


@dataclass(frozen=True)
class Word:
    """A word or phrase as its caption writes it, and the positions of its tokens in the token ids."""

    text: str
    positions: tuple[int, ...]


@dataclass
class PairRelevance:
    """
    Relevance of an image and a caption for each other, for K chosen words out of the W words of the caption.

    Args:
        score: Cosine similarity of the pair.
        caption_map: (rows, columns), relevance of every patch for the whole caption.
        words: The K words, in the order in which they were given.
        word_maps: (K, rows, columns), relevance of every patch for each of them.
        word_scores: (K,), how much the cosine similarity falls when the word is left out.
        caption_words: All W words, in the order of the caption.
        caption_relevance: (W,), relevance of each for the image, summed over its tokens.
    """

    score: float
    caption_map: torch.Tensor
    words: list[Word]
    word_maps: torch.Tensor
    word_scores: torch.Tensor
    caption_words: list[Word]
    caption_relevance: torch.Tensor


def image_relevance(model, pixel_values: torch.Tensor, text_targets: torch.Tensor, **kwargs) -> torch.Tensor:
    """
    Relevance of every patch of B images for K texts each: (B, K, rows, columns), float32, never negative.

    Needs twice the memory of the attentions of one forward pass, for any K, and a backward pass for each text.

    Args:
        model ([`COTSModel`]): In evaluation mode, loaded with `attn_implementation="eager"`.
        pixel_values: (B, 3, H, W).
        text_targets: (B, K, d), compared with each image: `encode_text` of captions, or `word_targets`.
        kwargs: Of `encode_image`, such as `interpolate_pos_encoding=True`.

    Raises `ValueError` for a model in training mode, and for one that does not return its attentions.
    """
    _check_mode(model)
    with torch.inference_mode(False), torch.enable_grad():
        rows, columns = (
            side // patch for side, patch in zip(pixel_values.shape[-2:], model.config.patch_size, strict=True)
        )
        pixel_values = pixel_values.clone().requires_grad_()  # so that a frozen model has gradients as well
        outputs = model.get_image_features(pixel_values, output_attentions=True, return_dict=True, **kwargs)
        attentions = _attentions(outputs)
        scores = _scores(model, outputs.pooler_output, text_targets)
        # Without the tokens before the patches: [CLS], and in some encoders a distillation token or registers.
        first_patch = attentions[0].shape[-1] - rows * columns
        pooled = torch.zeros(attentions[0].shape[0], attentions[0].shape[-1], device=pixel_values.device)
        pooled[:, 0] = 1  # the global image feature is the output at [CLS],
        if model.config.image_pooling == "cls_mean":  # and the mean of those at the patches: either is half of it
            pooled[:, 0], pooled[:, first_patch:] = 0.5, 0.5 / (rows * columns)
        relevance = _relevance(scores, attentions, pooled)
        if model.config.image_pooling == "cls_mean":  # the identity that R starts from adds the same to every patch
            relevance = (relevance - pooled.unsqueeze(1)).clamp(min=0)
    return relevance[..., first_patch:].unflatten(-1, (rows, columns))


def text_relevance(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_targets: torch.Tensor, **kwargs
) -> torch.Tensor:
    """
    Relevance of every token of B texts for K images each: (B, K, L), float32, never negative, 0 at padding.

    The rows of R are averaged over all tokens, as the global text feature is the mean over tokens. The identity that R
    starts from is subtracted: it adds the same to every token.

    Args:
        model ([`COTSModel`]): In evaluation mode, loaded with `attn_implementation="eager"`, not frozen.
        input_ids, attention_mask: (B, L).
        image_targets: (B, K, d), embeddings of images as `encode_image` gives them.

    Raises `ValueError` for a model in training mode or frozen, and for one that does not return its attentions.
    """
    _check_mode(model)
    with torch.inference_mode(False), torch.enable_grad():
        input_ids, attention_mask = input_ids.clone(), attention_mask.clone()
        outputs = model.get_text_features(
            input_ids, attention_mask, output_attentions=True, return_dict=True, **kwargs
        )
        attentions = _attentions(outputs)
        if not attentions[0].requires_grad:
            raise ValueError("The weights are frozen, so words have no gradient: call `model.requires_grad_()`.")
        length = attentions[0].shape[-1]  # a text longer than the encoder's positions has been cut
        mean_row = attention_mask[:, :length].float()
        mean_row = mean_row / mean_row.sum(dim=1, keepdim=True).clamp(min=1)
        scores = _scores(model, outputs.pooler_output, image_targets)
        relevance = _relevance(scores, attentions, mean_row) - mean_row.unsqueeze(1)
    return F.pad(relevance.clamp(min=0), (0, input_ids.shape[1] - length))


@torch.no_grad()
def word_targets(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, word_masks: torch.Tensor
) -> torch.Tensor:
    """
    What K words of each of B captions add to its embedding: (B, K, d), to be multiplied with image embeddings.

    Args:
        model ([`COTSModel`]): In evaluation mode.
        input_ids, attention_mask: (B, L).
        word_masks: (B, K, L) bool, the tokens of each word.

    Raises `ValueError` for a model in training mode.
    """
    _check_mode(model)
    num_words = word_masks.shape[1]
    captions = model.encode_text(input_ids, attention_mask)
    if num_words == 0:
        return captions.unsqueeze(1)[:, :0]
    kept = (attention_mask.bool().unsqueeze(1) & ~word_masks).flatten(0, 1)
    # Without the word, the remaining tokens move together, so that no position is skipped.
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    rest_ids = input_ids.repeat_interleave(num_words, dim=0).gather(1, order)
    rest = model.encode_text(rest_ids, kept.gather(1, order).to(attention_mask.dtype))
    return captions.unsqueeze(1) - rest.unflatten(0, (len(captions), num_words))


def find_words(caption: str, offsets: list[tuple[int, int]], words: list[str] | None = None) -> list[Word]:
    """
    Words of a caption with the positions of their tokens; by default every word, in order.

    Args:
        caption: The text.
        offsets: Begin and end of each token in `caption`, from the tokenizer's `offset_mapping`.
        words: Words or phrases, in any case; a word that occurs several times has the tokens of all places.

    Raises `ValueError` for a word that is not in the caption, or in the end of it that was cut off.
    """
    if words is None:
        spans = [[match.span()] for match in re.finditer(r"\w+(?:['’-]\w+)*", caption)]
    else:
        spans = [_occurrences(caption, word) for word in words]
    found = []
    for places in spans:
        positions = tuple(
            position
            for position, (begin, end) in enumerate(offsets)
            if any(begin < last and end > first for first, last in places)
        )
        text = caption[slice(*places[0])]
        if positions:
            found.append(Word(text, positions))
        elif words is not None:
            raise ValueError(f"{text!r} is cut off: the model reads {len(offsets)} tokens of this caption.")
    return found


def explain_pair(model, processor, image, caption: str, words: list[str] | None = None, **kwargs) -> PairRelevance:
    """
    Relevance maps of one image for a caption and for words of it, and of the caption's words for the image.

    Args:
        model ([`COTSModel`]): In evaluation mode, loaded with `attn_implementation="eager"`.
        processor ([`COTSProcessor`]): With a fast tokenizer, which gives the offsets of tokens.
        image: PIL image, or another input of the image processor.
        caption: The text.
        words: Words or phrases of it. By default the six most relevant for the image, in the order of the caption.
        kwargs: Of `encode_image`.

    Raises `ValueError` as the functions it calls, and for a tokenizer without offsets.
    """
    if not processor.tokenizer.is_fast:
        raise ValueError("Words are found by the offsets of tokens, which only fast tokenizers give.")
    with TOKENIZER_LOCK:
        tokens = processor.tokenizer(caption, truncation=True, return_offsets_mapping=True, return_tensors="pt")
    offsets = tokens["offset_mapping"][0].tolist()
    input_ids, attention_mask = (tokens[name].to(model.device) for name in ("input_ids", "attention_mask"))
    pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    caption_words = find_words(caption, offsets)
    chosen = None if words is None else find_words(caption, offsets, words)
    with torch.no_grad():
        image_embeds = model.encode_image(pixel_values, **kwargs)
        text_embeds = model.encode_text(input_ids, attention_mask)
    token_relevance = text_relevance(model, input_ids, attention_mask, image_embeds.unsqueeze(1))[0, 0].cpu()
    caption_relevance = _word_masks(caption_words, len(offsets)).float() @ token_relevance
    if chosen is None:
        most_relevant = caption_relevance.topk(min(NUM_WORDS, len(caption_words))).indices.sort().values
        chosen = [caption_words[place] for place in most_relevant.tolist()]
    word_masks = _word_masks(chosen, len(offsets)).to(model.device).unsqueeze(0)
    added = word_targets(model, input_ids, attention_mask, word_masks)
    maps = image_relevance(model, pixel_values, torch.cat([text_embeds.unsqueeze(1), added], dim=1), **kwargs)[0].cpu()
    return PairRelevance(
        score=(image_embeds @ text_embeds.t()).item(),
        caption_map=maps[0],
        words=chosen,
        word_maps=maps[1:],
        word_scores=(added[0] @ image_embeds[0]).cpu(),
        caption_words=caption_words,
        caption_relevance=caption_relevance,
    )


def _check_mode(model) -> None:
    if model.training:
        raise ValueError("Relevance maps need a model without dropout: call `model.eval()`.")


def _attentions(outputs) -> tuple[torch.Tensor, ...]:
    """Attentions of every layer, (B, heads, N, N) each."""
    if not outputs.attentions or any(attention is None for attention in outputs.attentions):
        raise ValueError(
            "The model returned no attentions: load it with `attn_implementation='eager'`, or call "
            "`model.set_attn_implementation('eager')`; sdpa and similar implementations never form them."
        )
    return outputs.attentions


def _scores(model, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B, K) similarities of features (B, d) and targets (B, K, d) over the temperature: the model's own logits."""
    embeds = F.normalize(features.float(), dim=-1)
    return torch.einsum("bd,bkd->bk", embeds, targets.clone().float()) / model.config.temperature


def _relevance(scores: torch.Tensor, attentions: tuple[torch.Tensor, ...], pooling: torch.Tensor) -> torch.Tensor:
    """
    The rows of R, averaged with the weights `pooling` (B, N) of the tokens in the global feature: (B, K, N).

    R is a product, (I + A_last) ... (I + A_first). Computed from the left, pooling @ R needs no N x N product.
    """
    num_targets = scores.shape[1]
    relevance = []
    for target in range(num_targets):
        gradients = torch.autograd.grad(scores[:, target].sum(), attentions, retain_graph=target < num_targets - 1)
        row = pooling
        with torch.no_grad():
            for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
                positive = (gradient.float() * attention.float()).clamp(min=0).mean(dim=1)
                row = row + torch.einsum("bn,bnm->bm", row, positive)
        relevance.append(row)
    return torch.stack(relevance, dim=1)


def _occurrences(caption: str, word: str) -> list[tuple[int, int]]:
    word = word.strip()
    found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE) if word]
    if not found:
        raise ValueError(f"There is no {word!r} in the caption {caption!r}.")
    return found


def _word_masks(words: list[Word], length: int) -> torch.Tensor:
    """(K, length) bool, the tokens of each word."""
    masks = torch.zeros(len(words), length, dtype=torch.bool)
    for row, word in enumerate(words):
        masks[row, list(word.positions)] = True
    return masks
