"""`COTSProcessor`: images, captions and videos to tensors, in one object that is saved beside the model.

It combines the image processor and the tokenizer of transformers with our video processor, and adds nothing to their
calls. Random augmentation is not here: it belongs to training (`data/image_augmentation.py`).
"""

from transformers.processing_utils import ProcessorMixin

# The `auto_map` of a repository: the file and class of the processor, and of the video processor in it.
PROCESSOR_CODE = {"AutoProcessor": "processing_cots.COTSProcessor"}
VIDEO_PROCESSOR_CODE = {"AutoVideoProcessor": "video_processing_cots.COTSVideoProcessor"}
# Arguments of a call that a tokenizer keeps in `init_kwargs`.
LEFT_BY_CALLS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")


class COTSProcessor(ProcessorMixin):
    """
    Turns images, texts and videos into the inputs of [`COTSModel`].

    Args:
        image_processor: Resizes to the model's image size and normalizes; `pixel_values` (B, 3, H, W).
        tokenizer: `input_ids`, `attention_mask` (B, L).
        video_processor ([`COTSVideoProcessor`]): Samples and resizes frames; `pixel_values_videos` (B, T, 3, H, W).

    ```python
    >>> processor(images=[image], text=["a red circle"], padding=True, return_tensors="pt")
    ```"""

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, **kwargs):
        super().__init__(image_processor, tokenizer, video_processor, **kwargs)
        forget_calls(self.tokenizer)

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """As transformers documents it. Raises `ValueError` for an empty list."""
        for name, values in (("images", images), ("text", text), ("videos", videos)):
            if isinstance(values, list | tuple) and len(values) == 0:
                raise ValueError(f"`{name}` is empty: give at least one, or leave it out.")
        return super().__call__(images, text, videos, audio, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        Save all parts; the tokenizer without the truncation and padding of its last call.

        Raises `ValueError` for `push_to_hub=True`, which would push settings without the code to load them with.
        """
        if push_to_hub:
            raise ValueError("Call processor.push_to_hub(repo_id): save_pretrained(push_to_hub=True) leaves out code.")
        forget_calls(self.tokenizer)
        return super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **options):
        """
        Push the processor without a model, into a repository that `COTSModel.push_to_hub` has filled.

        The code of the processor has to be in the repository already: this pushes settings that name it in `auto_map`.
        To push model and processor together, call `COTSModel.push_to_hub`.
        """
        parts = [(self, PROCESSOR_CODE)]
        if getattr(self, "video_processor", None) is not None:
            parts.append((self.video_processor, VIDEO_PROCESSOR_CODE))
        for part, code in parts:
            part.auto_map = code
        try:
            return super().push_to_hub(repo_id, **options)
        finally:
            for part, _ in parts:
                del part.auto_map


def forget_calls(tokenizer) -> None:
    """
    Drop the truncation and padding of a tokenizer's last call.

    A fast tokenizer saves them, and a loaded tokenizer has them as defaults. Texts would be cut at the `max_length` of
    that call instead of at `model_max_length` (tests/test_processing_cots.py).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for name in LEFT_BY_CALLS:
        getattr(tokenizer, "init_kwargs", {}).pop(name, None)


__all__ = ["PROCESSOR_CODE", "VIDEO_PROCESSOR_CODE", "COTSProcessor"]
