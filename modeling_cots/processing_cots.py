"""`COTSProcessor`: images, captions and videos to tensors, in one object that is saved beside the model.

It combines the image processor and the tokenizer of transformers with our video processor, and adds nothing to their
calls. Random augmentation is not here: it belongs to training (`data/image_augmentation.py`).
"""

from transformers import ViTImageProcessor
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack

from .image_processing_cots import COTSImageProcessor
from .image_reading_cots import fork_safe_lock

# The `auto_map` of a repository: the file and class of the processor, and of the image and video processor in it.
PROCESSOR_CODE = {"AutoProcessor": "processing_cots.COTSProcessor"}
IMAGE_PROCESSOR_CODE = {"AutoImageProcessor": "image_processing_cots.COTSImageProcessor"}
VIDEO_PROCESSOR_CODE = {"AutoVideoProcessor": "video_processing_cots.COTSVideoProcessor"}
# Arguments of a call, beside `max_length`, that a tokenizer which is loaded after it has in `init_kwargs`.
LEFT_BY_CALLS = ("stride", "truncation_strategy", "pad_to_multiple_of")
# A fast tokenizer keeps the truncation and padding of a call in itself, where a call of another thread changes them.
# Whoever calls a tokenizer with either holds this lock; one for all tokenizers, so that processors can be pickled.
TOKENIZER_LOCK = fork_safe_lock()


class COTSProcessor(ProcessorMixin):
    """
    Turns images, texts and videos into the inputs of [`COTSModel`].

    It may be called from several threads at once.

    Args:
        image_processor ([`COTSImageProcessor`]): Resizes to the model's image size and normalizes; `pixel_values`
            (B, 3, H, W). A `ViTImageProcessor`, as models of version 0.1 have, is replaced by one of equal settings.
        tokenizer: `input_ids`, `attention_mask` (B, L).
        video_processor ([`COTSVideoProcessor`]): Samples and resizes frames; `pixel_values_videos` (B, T, 3, H, W).

    ```python
    >>> processor(images=[image], text=["a red circle"], padding=True, return_tensors="pt")
    ```"""

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, **kwargs):
        if type(image_processor) is ViTImageProcessor:
            image_processor = COTSImageProcessor.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, video_processor, **kwargs)
        forget_calls(self.tokenizer)

    def __call__(self, images=None, text=None, videos=None, **kwargs: Unpack[ProcessingKwargs]):
        """
        As the base class does: texts with the tokenizer, images and videos with the processors of these.

        Raises `ValueError` for an empty list.
        """
        for name, values in (("images", images), ("text", text), ("videos", videos)):
            if isinstance(values, list | tuple) and len(values) == 0:
                raise ValueError(f"`{name}` is empty: give at least one, or leave it out.")
        if text is None:
            return super().__call__(images=images, videos=videos, **kwargs)
        with TOKENIZER_LOCK:
            inputs = super().__call__(text=text, **kwargs)
        if images is not None or videos is not None:
            inputs.update(super().__call__(images=images, videos=videos, **kwargs))
        return inputs

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
        # By its name: a repository's code is loaded once more for each part.
        if type(self.image_processor).__name__ == COTSImageProcessor.__name__:
            parts.append((self.image_processor, IMAGE_PROCESSOR_CODE))
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
    Drop the truncation and padding of a tokenizer's last call; what it was made with stays.

    A fast tokenizer saves them, and a loaded tokenizer has them as defaults. Texts would be cut at the `max_length` of
    that call instead of at `model_max_length` (tests/test_processing_cots.py).
    """
    backend, settings = getattr(tokenizer, "backend_tokenizer", None), getattr(tokenizer, "init_kwargs", {})
    with TOKENIZER_LOCK:
        # A call leaves these and a `max_length`; somebody who sets one for good does it alone, or with `padding`.
        is_left = any(name in settings for name in LEFT_BY_CALLS) and "padding" not in settings
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        for name in (*LEFT_BY_CALLS, "max_length") if is_left else LEFT_BY_CALLS:
            settings.pop(name, None)


__all__ = ["IMAGE_PROCESSOR_CODE", "PROCESSOR_CODE", "TOKENIZER_LOCK", "VIDEO_PROCESSOR_CODE", "COTSProcessor"]
