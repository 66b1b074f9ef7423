"""Whichever way an image takes, a model sees the same pixels: of all modes of PIL and all EXIF orientations."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_files import as_base64, thin_png
from PIL import ExifTags, Image, ImageOps
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline

from modeling_cots import COTSImageProcessor, COTSModel, COTSProcessor, SearchIndex, export_repository
from modeling_cots.data.image_augmentation import ImageTransform
from modeling_cots.data.image_collators import COTSDataCollator, COTSEvaluationCollator
from modeling_cots.data.image_token_writing import TokenWriter
from modeling_cots.data.pixel_normalization import PixelNormalizer
from modeling_cots.evaluation.embedding import embed_pairs
from modeling_cots.hub.handler import EndpointHandler
from modeling_cots.image_reading_cots import MAX_IMAGE_SIDE, read_image
from modeling_cots.method.image_tokenizer import ImageTokenizer
from modeling_cots.visualization.relevance import explain_pair

SIDE = 32
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "F", "LA", "PA", "La", "RGBa", "RGBX")
# What turns an upright image into the one that is stored under each value of EXIF's orientation tag.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def upright_image(mode: str) -> Image.Image:
    """Noise of 40 x 24 pixels in a mode of PIL; half of it is transparent where the mode can say so."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    if mode in SIXTEEN_BITS:
        levels = noise[:, :, 0].astype(np.uint16) * 256 + noise[:, :, 1]
        if mode == "I":
            return Image.fromarray(levels.astype(np.int32))
        return Image.frombytes(mode, (40, 24), levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    if mode in ("RGBA", "RGBa"):
        return Image.fromarray(noise, "RGBA").convert(mode)
    if mode in ("LA", "La"):
        return Image.merge("LA", [Image.fromarray(noise[:, :, band].copy()) for band in (0, 3)]).convert(mode)
    if mode == "LAB":
        return Image.merge("LAB", [Image.fromarray(noise[:, :, band].copy()) for band in range(3)])
    if mode == "PA":
        return Image.fromarray(noise[:, :, :3].copy()).convert("P").convert("PA")
    return Image.fromarray(noise[:, :, :3].copy()).convert(mode)


def as_rgb(image: Image.Image) -> Image.Image:
    """The slow twin: 16 bits by division, all else by PIL."""
    if image.mode in SIXTEEN_BITS:
        gray = (np.asarray(image).astype(np.int64) // 256).astype(np.uint8)
        return Image.fromarray(np.repeat(gray[:, :, None], 3, axis=2))
    return (image.convert("LA") if image.mode == "La" else image).convert("RGB")


def stored_images() -> tuple[list[Image.Image], list[Image.Image]]:
    """Images of every mode in every orientation, with EXIF data, and each upright in RGB."""
    stored, upright = [], []
    for mode in (*MODES, *SIXTEEN_BITS):
        for orientation, turn in STORED.items():
            image = upright_image(mode)
            upright.append(as_rgb(image))
            image = image if turn is None else image.transpose(turn)
            image.getexif()[ExifTags.Base.Orientation] = orientation
            stored.append(image)
    return stored, upright


@pytest.fixture(scope="module")
def images():
    return stored_images()


@pytest.fixture
def processor(tiny_processor):
    size = {"height": SIDE, "width": SIDE}
    return COTSProcessor(COTSImageProcessor(size=size), tiny_processor.tokenizer, tiny_processor.video_processor)


@pytest.fixture
def folder(tiny_config, processor, tmp_path):
    torch.manual_seed(0)
    COTSModel(tiny_config).save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


class Items(list):
    """A data set of pairs with these images."""

    name = "images"

    def __init__(self, images):
        super().__init__(
            {"image": image, "captions": ["a dog"], "pair_id": row, "name": f"row {row}"}
            for row, image in enumerate(images)
        )


def seen_by(model, run) -> torch.Tensor:
    """The pixels (N, 3, H, W) that the vision encoder of a model is given while `run` runs."""
    seen = []
    hook = model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]),
        with_kwargs=True,
    )
    run()
    hook.remove()
    return torch.cat(seen)


def by_processor(folder, images):
    return COTSProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]


def by_image_processor(folder, images):
    return AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]


def by_training(folder, images):
    processor = COTSProcessor.from_pretrained(folder)
    transform = ImageTransform((SIDE, SIDE), [0.5] * 3, min_crop_scale=1.0)
    collate = COTSDataCollator(processor, image_transform=transform, patch_size=(8, 8), max_text_length=9)
    return PixelNormalizer(processor)(collate(Items(images)))["pixel_values"]


def by_evaluation_collator(folder, images):
    processor = COTSProcessor.from_pretrained(folder)
    batch = COTSEvaluationCollator(processor, max_text_length=9)(Items(images))
    return PixelNormalizer(processor)(batch)["pixel_values"]


def by_evaluation(folder, images):
    model, processor = COTSModel.from_pretrained(folder), COTSProcessor.from_pretrained(folder)
    options = {"batch_size": 7, "max_text_length": 9, "progress": False}
    return seen_by(model, lambda: embed_pairs(model, Items(images), processor, Accelerator(cpu=True), **options))


def by_token_writer(folder, images):
    writer = TokenWriter(ImageTokenizer.random(9, [0.5] * 3, [0.5] * 3), (SIDE, SIDE), (8, 8))
    batch = writer.collate(Items(images))
    return PixelNormalizer(COTSProcessor.from_pretrained(folder))(batch)["pixel_values"]


def by_index(folder, images):
    pytest.importorskip("faiss")
    model, processor = COTSModel.from_pretrained(folder), COTSProcessor.from_pretrained(folder)
    index = SearchIndex.create(folder / "index", model, processor)
    return seen_by(model, lambda: index.add(Items(images), progress=False))


def by_index_query(folder, images):
    pytest.importorskip("faiss")
    model, processor = COTSModel.from_pretrained(folder), COTSProcessor.from_pretrained(folder)
    index = SearchIndex.create(folder / "index", model, processor)
    return seen_by(model, lambda: [index.embed_query(image=image) for image in images])


def by_retrieval_pipeline(folder, images):
    finder = pipeline("image-text-retrieval", model=str(folder))
    return seen_by(finder.model, lambda: finder.build_index(images))


def by_feature_pipeline(folder, images):
    extract = pipeline("image-feature-extraction", model=str(folder))
    return seen_by(extract.model, lambda: extract(images))


def by_classifying_pipeline(folder, images):
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    return seen_by(classify.model, lambda: classify(images, candidate_labels=["a dog"]))


def by_handler(folder, images):
    handler = EndpointHandler(str(folder))
    requests = [{"inputs": {"image": image, "candidate_labels": ["a dog"]}} for image in images]
    return seen_by(handler.model, lambda: [_answered(handler(request)) for request in requests])


def _answered(answer):
    if "error" in answer:
        raise ValueError(answer["error"])


def by_relevance(folder, images):
    model = COTSModel.from_pretrained(folder, attn_implementation="eager").eval()
    processor = COTSProcessor.from_pretrained(folder)
    return seen_by(model, lambda: [explain_pair(model, processor, image, "a dog", ["dog"]) for image in images])[::2]


def by_sentence_transformers(folder, images):
    model, processor = COTSModel.from_pretrained(folder), COTSProcessor.from_pretrained(folder)
    export_repository(model, processor, folder / "repository")
    encoder = SentenceTransformer(str(folder / "repository"), trust_remote_code=True)
    inner = next(module for module in encoder.modules() if hasattr(module, "vision_model"))
    # It takes the path of a TIFF file for a text, and sorts what it encodes together.
    images = [Image.open(image) if str(image).endswith(".tif") else image for image in images]
    return seen_by(inner, lambda: [encoder.encode([image]) for image in images])


DOORS = [
    by_processor,
    by_image_processor,
    by_training,
    by_evaluation_collator,
    by_evaluation,
    by_token_writer,
    by_index,
    by_index_query,
    by_retrieval_pipeline,
    by_feature_pipeline,
    by_classifying_pipeline,
    by_handler,
    by_relevance,
    by_sentence_transformers,
]
ON_RAW_PIXELS = (by_training, by_evaluation_collator, by_evaluation, by_token_writer)  # normalized within 1e-6


@pytest.mark.parametrize("door", DOORS)
def test_a_model_sees_the_same_pixels_of_an_image_object(door, folder, images):
    stored, upright = images
    expected = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3)(upright, return_tensors="pt")
    found = door(folder, stored)
    tolerance = 1e-6 if door in ON_RAW_PIXELS else 0
    torch.testing.assert_close(found, expected["pixel_values"], rtol=0, atol=tolerance)


FILES = {
    "16-bit PNG": ("I;16", "png"),
    "16-bit TIFF": ("I;16", "tif"),
    "transparent PNG": ("RGBA", "png"),
    "gray WebP": ("L", "webp"),
    "CMYK TIFF": ("CMYK", "tif"),
    "JPEG": ("RGB", "jpg"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "door",
    [by_processor, by_retrieval_pipeline, by_feature_pipeline, by_classifying_pipeline, by_sentence_transformers]
    + [by_index_query, by_training],
)
def test_a_model_sees_the_same_pixels_of_a_file(door, name, folder, tmp_path):
    mode, ending = FILES[name]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = str(tmp_path / f"image.{ending}")
    upright_image(mode).transpose(STORED[6]).save(path, exif=exif)
    with Image.open(path) as image:
        upright = as_rgb(ImageOps.exif_transpose(image))
    expected = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3)(upright, return_tensors="pt")
    torch.testing.assert_close(door(folder, [path]), expected["pixel_values"], rtol=0, atol=1e-6)


def test_an_image_is_turned_once(folder, images):
    """What a door has read may go through another one."""
    stored, _ = images
    once = [read_image(image) for image in stored]
    assert torch.equal(by_processor(folder, once), by_processor(folder, stored))


def test_a_processor_of_an_earlier_version_reads_like_a_new_one(processor, tmp_path, images):
    old = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3, do_convert_rgb=True)
    old.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    loaded = COTSProcessor(loaded, processor.tokenizer, processor.video_processor)
    assert type(loaded.image_processor) is COTSImageProcessor
    expected = old(images[1], return_tensors="pt")["pixel_values"]
    assert torch.equal(loaded(images=images[0], return_tensors="pt")["pixel_values"], expected)
    assert {**loaded.image_processor.to_dict(), "image_processor_type": "ViTImageProcessor"} == old.to_dict()


@pytest.mark.parametrize("as_array", [np.asarray, torch.tensor])
def test_arrays_of_sixteen_bits_are_scaled_too(processor, as_array):
    levels = np.random.default_rng(0).integers(0, 2**16, (24, 40, 3), dtype=np.uint16)
    expected = processor(images=[Image.fromarray((levels // 256).astype(np.uint8))], return_tensors="pt")
    found = processor(images=[as_array(levels)], return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


# Thin images. A resize to 32 pixels would make 32 times their length, and 48 to 384 times in a real model.

TOO_LONG = [(1, MAX_IMAGE_SIDE + 1), (MAX_IMAGE_SIDE + 1, 1), (2, 400_000)]
REFUSING = [door for door in DOORS if door not in (*ON_RAW_PIXELS, by_index)]


@pytest.mark.parametrize("size", TOO_LONG)
@pytest.mark.parametrize("door", REFUSING)
def test_a_thin_image_is_refused(door, size, folder):
    with pytest.raises(ValueError, match="no side may be longer than 65535|a side of more than 65535"):
        door(folder, [Image.new("L", size)])


@pytest.mark.parametrize("door", [by_processor, by_retrieval_pipeline, by_feature_pipeline, by_classifying_pipeline])
def test_a_thin_file_is_refused_before_it_is_decoded(door, folder, tmp_path):
    (tmp_path / "thin.png").write_bytes(thin_png(1, 50_000_000))
    with pytest.raises(ValueError, match="no side may be longer than 65535"):
        door(folder, [str(tmp_path / "thin.png")])


def test_the_handler_refuses_a_thin_image(folder):
    answer = EndpointHandler(str(folder))({"inputs": {"image": as_base64(Image.new("L", (1, 4_000_000)))}})
    assert "a side of more than 65535 pixels" in answer["error"]


@pytest.mark.parametrize("size", TOO_LONG)
def test_collators_skip_a_thin_image_and_keep_the_others(processor, size):
    items = Items([Image.new("L", size), Image.new("L", (40, 24)), {"bytes": thin_png(*size), "path": None}])
    transform = ImageTransform((SIDE, SIDE), [0.5] * 3)
    training = COTSDataCollator(processor, image_transform=transform, patch_size=(8, 8), max_text_length=9)
    for collate in (training, COTSEvaluationCollator(processor, max_text_length=9)):
        assert collate(items)["valid"].tolist() == [False, True, False]


def test_an_index_leaves_a_thin_image_out(folder):
    pytest.importorskip("faiss")
    index = SearchIndex.create(
        folder / "index", COTSModel.from_pretrained(folder), COTSProcessor.from_pretrained(folder)
    )
    assert index.add(Items([Image.new("L", TOO_LONG[0]), Image.new("L", (40, 24))]), progress=False) == 1


def test_the_longest_side_itself_is_allowed(processor):
    for size in [(1, MAX_IMAGE_SIDE), (MAX_IMAGE_SIDE, 1)]:
        assert processor(images=[Image.new("L", size)], return_tensors="pt")["pixel_values"].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 70_000, 1), (70_000, 1, 3)])
def test_arrays_are_bounded_too(processor, shape):
    with pytest.raises(ValueError, match="no side may be longer"):
        processor(images=[np.zeros(shape, np.uint8)], return_tensors="pt")
    with pytest.raises(ValueError, match="no side may be longer"):
        processor(videos=[np.zeros((2, *shape), np.uint8)], return_tensors="pt")


def test_a_size_for_the_shorter_side_makes_no_longer_one(processor):
    thin, size = np.zeros((2, 3, 4_000, 1), np.uint8), {"shortest_edge": SIDE}
    with pytest.raises(ValueError, match="32 x 128000 pixels, and no side"):
        processor(images=[thin[0]], size=size, return_tensors="pt")
    with pytest.raises(ValueError, match="32 x 128000 pixels, and no side"):
        processor(videos=[thin], size=size, return_tensors="pt")
