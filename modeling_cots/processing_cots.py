"""`COTSProcessor`: pictures, captions and videos to tensors, in one object that is saved beside the model.

It composes the image processor, the tokenizer and the video processor of transformers and adds no call logic of its
own. Random augmentation is not here: it belongs to training (`data_collator.py`).
"""

from transformers.processing_utils import ProcessorMixin


class COTSProcessor(ProcessorMixin):
    """
    Turns images, texts and videos into the inputs of [`COTSModel`].

    Args:
        image_processor: Resizes to the model's image size and normalises; `pixel_values` (B, 3, H, W).
        tokenizer: `input_ids`, `attention_mask` (B, L).
        video_processor ([`COTSVideoProcessor`]): Samples and resizes frames; `pixel_values_videos` (B, T, 3, H, W).

    ```python
    >>> processor(images=[picture], text=["a red circle"], padding=True, return_tensors="pt")
    ```"""

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, **kwargs):
        super().__init__(image_processor, tokenizer, video_processor, **kwargs)


__all__ = ["COTSProcessor"]
