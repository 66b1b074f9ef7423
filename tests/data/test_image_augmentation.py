"""`ImageTransform` against its slow twin: timm's transforms on an image that PIL has read in full."""

import io
import random

import numpy as np
import pytest
import torch
from collator_items import MEAN, SIZE, draw_image, encode, seed_everything
from PIL import ExifTags, Image
from timm.data import create_transform
from torchvision.transforms.functional import pil_to_tensor

from modeling_cots.data.image_augmentation import AS_TENSORS, ImageTransform, read_resized, resize_for
from modeling_cots.image_processing_cots import COTSImageProcessor
from modeling_cots.image_reading_cots import ImageFile, UnreadableImageError, read_image, read_pixels

POLICY = "rand-m9-n2-mstd0.5"


@pytest.fixture(params=["PIL", "simplejpeg"], autouse=True)
def decoder(request, monkeypatch):
    """Each test with either decoder of JPEGs."""
    if request.param == "PIL":
        monkeypatch.setattr("modeling_cots.image_reading_cots.simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


def scenery(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth shades with edges, as photographs have and noise has not."""
    rng = np.random.default_rng(seed)
    shades = Image.fromarray(rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8))
    image = np.array(shades.resize((width, height), Image.Resampling.BICUBIC))
    image[height // 4 : height // 2, width // 3 : width // 2] = (250, 20, 40)
    image[height // 2 :, : width // 5] //= 3
    return Image.fromarray(image)


def plain(data: bytes, image_size, seed: int, **options) -> torch.Tensor:
    """The slow twin: PIL's decoding, cropping and resizing."""
    transform = create_transform(
        (3, *image_size),
        is_training=True,
        color_jitter=None,
        interpolation="bicubic",
        mean=MEAN,
        normalize=False,
        scale=(options.get("min_crop_scale", 0.5), 1.0),
        hflip=options.get("horizontal_flip", 0.0),
        auto_augment=options.get("auto_augment"),
    )
    seed_everything(seed)
    return transform(read_image(data))


def fast(data: bytes, image_size, seed: int, **options) -> torch.Tensor:
    transform = ImageTransform(image_size, MEAN, **options)
    seed_everything(seed)
    return transform(data)


def difference(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    assert left.dtype == right.dtype == torch.uint8
    assert left.shape == right.shape
    return (left.int() - right.int()).abs().float()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_at_full_scale_it_equals_pil_to_two_grey_levels(format, seed):
    """No crop of these leaves twice the pixels that are needed, so that everything is decoded in full."""
    data = encode(scenery(150, 200, seed), format)
    options = {"min_crop_scale": 0.3, "horizontal_flip": 0.5}
    found = difference(fast(data, (96, 96), seed, **options), plain(data, (96, 96), seed, **options))
    assert found.max() <= 2
    assert found.mean() < 0.1


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_decoded_at_a_fraction_it_stays_close_to_pil(reduction):
    """Where no edge needs rounding; in gray levels of 256."""
    image_size = (96, 128)
    for seed in range(4):
        data = encode(scenery(800, 1120, seed), "JPEG", quality=90)
        top, left = 8 * seed, 24 * seed
        height, width = (reduction * side + 8 * seed for side in image_size)
        height, width = min(height, 800 - top), min(width, 1120 - left)
        with ImageFile(data) as opened:
            found = read_resized(opened, (top, left, height, width), image_size)
            assert opened.reduction == (reduction if height >= reduction * 96 else reduction // 2)
        part = read_image(data).crop((left, top, left + width, top + height))
        expected = pil_to_tensor(part.resize(image_size[::-1], Image.Resampling.BICUBIC))
        assert difference(found, expected).mean() < 1
        assert difference(found, expected).max() < 64


@pytest.mark.parametrize("seed", range(8))
def test_rounded_edges_move_a_crop_by_less_than_a_pixel(seed):
    """By less than a pixel of the result: the values of the image are the places of its pixels."""
    rows, columns = np.mgrid[0:800, 0:1000] / 4
    data = encode(Image.fromarray(np.stack([rows, columns, rows], axis=2).astype(np.uint8)), "JPEG", quality=98)
    found, expected = (make(data, (96, 128), seed, min_crop_scale=0.3) for make in (fast, plain))
    places = 4 * (found.float() - expected.float())[:2, 8:-8, 8:-8].mean(dim=(1, 2))
    size_of_a_pixel = 4 * max(float(expected[0].max()) / 96, float(expected[1].max()) / 128)
    assert places.abs().max() < size_of_a_pixel


@pytest.mark.parametrize("auto_augment", [None, POLICY])
@pytest.mark.parametrize("horizontal_flip", [0.0, 0.5])
def test_draws_are_those_of_timm(auto_augment, horizontal_flip):
    """Afterwards the generators are where timm's transforms leave them."""
    data = encode(draw_image(0, 50, 70))
    options = {"horizontal_flip": horizontal_flip, "auto_augment": auto_augment}
    for seed in range(10):
        found = fast(data, (SIZE, SIZE), seed, **options)
        states = random.random(), np.random.random(), torch.rand(1).item()
        expected = plain(data, (SIZE, SIZE), seed, **options)
        assert (random.random(), np.random.random(), torch.rand(1).item()) == states
        if auto_augment is None:  # policies such as posterizing make much of a difference of one gray level
            assert difference(found, expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_cropped_upright(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(scenery(400, 640), "JPEG", quality=95, exif=exif)
    for seed in range(3):
        found = difference(fast(data, (230, 230), seed), plain(data, (230, 230), seed))
        assert found.max() <= 2
        small = difference(fast(data, (SIZE, SIZE), seed), plain(data, (SIZE, SIZE), seed))
        assert small.mean() < 12, "decoded at a fraction and turned; another orientation is off by 40 and more"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_equals_pil(mode):
    image = scenery(300, 400).convert(mode)
    for format in ("JPEG",) if mode == "CMYK" else ("PNG", "JPEG") if mode == "L" else ("PNG",):
        data = encode(image, format)
        assert difference(fast(data, (200, 200), 0), plain(data, (200, 200), 0)).max() <= 2
        assert difference(fast(data, (48, 48), 0), plain(data, (48, 48), 0)).mean() < 8


def test_sixteen_bits_become_eight():
    levels = np.linspace(0, 2**16 - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    data = encode(Image.fromarray(levels))
    found = ImageTransform((64, 64), MEAN, min_crop_scale=1.0)(data)
    assert torch.equal(found, torch.from_numpy(levels // 256).to(torch.uint8).expand(3, 64, 64))


# How much is decoded


@pytest.mark.parametrize(
    ("size", "target", "reduction"),
    [
        ((500, 375), 384, 1),
        ((1280, 960), 384, 2),
        ((1536, 1536), 384, 4),
        ((1535, 1536), 384, 2),
        ((4000, 3072), 384, 8),
    ],
)
def test_a_jpeg_is_decoded_no_smaller_than_the_target(size, target, reduction):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "JPEG")
    with ImageFile(file.getvalue()) as opened:
        assert opened.size == size
        pixels = read_resized(opened, (0, 0, size[1], size[0]), (target, target))
        assert opened.reduction == reduction
    assert pixels.shape == (3, target, target)


def test_a_small_crop_of_a_large_image_is_decoded_in_full():
    data = encode(scenery(800, 800), "JPEG", quality=95)
    with ImageFile(data) as opened:
        pixels = read_resized(opened, (300, 200, 64, 64), (64, 64))
        assert opened.reduction == 1
    assert torch.equal(pixels, pil_to_tensor(read_image(data))[:, 300:364, 200:264])


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 2), (17, 33)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_smallest_and_narrowest_images(size, format):
    data = encode(Image.new("RGB", size, (200, 100, 50)), format)
    for seed in range(3):
        pixels = fast(data, (16, 8), seed)
        assert (pixels.float() - torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1)).abs().max() <= 4


# The whole image, for a processor


@pytest.mark.parametrize(
    ("options", "height", "width"),
    [
        ({"size": {"height": 40, "width": 56}}, 40, 56),
        ({"size": {"height": 40, "width": 56}, "resample": Image.Resampling.BILINEAR}, 90, 120),
        ({"size": {"height": 40, "width": 56}, "do_resize": False}, 90, 120),
        ({"size": {"shortest_edge": 40}}, 90, 120),
        ({"size": {"height": 90, "width": 120}}, 90, 120),
    ],
)
def test_a_processor_makes_the_same_of_resized_pixels(options, height, width):
    processor = COTSImageProcessor(**options)
    data = encode(scenery(90, 120), "JPEG", quality=90)
    expected = processor(read_image(data), return_tensors="pt")["pixel_values"]
    found = resize_for(read_pixels(data), processor)
    assert found.shape == (3, height, width)
    assert torch.equal(processor([found], **AS_TENSORS, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("size", [(3, 90), (90, 3), (3, 3), (1, 40)])
def test_narrow_pixels_keep_their_order(size):
    processor = COTSImageProcessor(size={"shortest_edge": 6})
    image = scenery(*size)
    found = resize_for(read_pixels(image), processor)
    expected = processor([pil_to_tensor(image)], **AS_TENSORS, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor([found], **AS_TENSORS, return_tensors="pt")["pixel_values"], expected)
    assert expected.shape[2:] == tuple(6 * side // min(size) for side in size)


def test_the_memory_of_a_resized_image_has_the_order_of_its_pixels():
    """torch would transpose it, which takes as long as the rest of the resize."""
    assert fast(encode(scenery(90, 120), "JPEG"), (40, 56), 0).permute(1, 2, 0).is_contiguous()


# What cannot be read


@pytest.mark.parametrize("side", [40, 600])
def test_truncated_images_are_refused_wherever_they_end(side):
    """Decoding at a fraction of the size must refuse what PIL refuses in full."""
    data = encode(scenery(side, side), "JPEG", quality=80)
    transform = ImageTransform((SIZE, SIZE), MEAN)
    refused = 0
    for length in range(0, len(data) - 1, len(data) // 60):
        try:
            read_image(data[:length])
        except UnreadableImageError:
            refused += 1
            with pytest.raises(UnreadableImageError):
                transform(data[:length])
    assert refused > 50


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="DecompressionBomb"):
        ImageTransform((SIZE, SIZE), MEAN)(encode(scenery(100, 100), "JPEG"))


def test_a_refused_source_and_another_format_are_refused():
    for source in ({"bytes": None, "path": None, "refused": "it leads out"}, encode(draw_image(0), "TGA")):
        with pytest.raises(UnreadableImageError):
            ImageTransform((SIZE, SIZE), MEAN)(source)


def test_an_image_in_memory_is_taken_and_stays_open():
    image = scenery(60, 80)
    transform = ImageTransform((60, 80), MEAN, min_crop_scale=1.0)
    assert torch.equal(transform(image), pil_to_tensor(image))
    assert torch.equal(transform(image), pil_to_tensor(image))


# What is drawn


def test_without_crop_it_is_a_resize_of_the_whole_image():
    """Also of one wider than timm's crops, which keep the sides within 4 : 3; and it is the same every time."""
    image = scenery(60, 200)
    transform = ImageTransform((16, 24), MEAN, min_crop_scale=1.0)
    expected = pil_to_tensor(image.resize((24, 16), Image.Resampling.BICUBIC))
    for _ in range(5):
        assert difference(transform(image), expected).max() <= 1


def test_draw_says_whether_the_image_is_flipped():
    image = scenery(64, 64)
    plain_pixels = ImageTransform((64, 64), MEAN, min_crop_scale=1.0)(image)
    transform = ImageTransform((64, 64), MEAN, min_crop_scale=1.0, horizontal_flip=0.5)
    seen = set()
    for seed in range(10):
        seed_everything(seed)
        pixels, is_flipped = transform.draw(image)
        assert torch.equal(pixels, plain_pixels.flip(-1) if is_flipped else plain_pixels)
        seen.add(is_flipped)
    assert seen == {True, False}


@pytest.mark.parametrize("min_crop_scale", [0.2, 0.5, 0.9])
def test_crops_keep_their_share_of_the_image(min_crop_scale):
    """Each pixel tells its own place, so that a crop's first and last ones tell its area."""
    rows, columns = np.mgrid[0:128, 0:128].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, rows], axis=2))
    transform = ImageTransform((128, 128), MEAN, min_crop_scale=min_crop_scale)
    random.seed(0)
    areas = []
    for _ in range(100):
        down, across = transform(image)[:2].int()
        areas.append(float((down.max() - down.min() + 1) * (across.max() - across.min() + 1)) / 128**2)
    assert min_crop_scale - 0.03 <= min(areas) < min_crop_scale + 0.1
    assert max(areas) <= 1


@pytest.mark.parametrize("policy", ["bogus", "random-m5"])
def test_an_unknown_policy_is_named(policy):
    with pytest.raises(ValueError, match=f"auto_augment={policy} is no policy of timm, such as rand-m5"):
        ImageTransform((SIZE, SIZE), MEAN, auto_augment=policy)


def test_auto_augment_changes_the_image_beyond_the_crop():
    plain, augmented = (
        ImageTransform((SIZE, SIZE), MEAN, min_crop_scale=1.0, auto_augment=policy)
        for policy in (None, "rand-m9-n2-mstd0.5")
    )
    image = draw_image(0, SIZE, SIZE)
    seed_everything(0)
    changed = [not torch.equal(plain(image), augmented(image)) for _ in range(20)]
    assert any(changed)


@pytest.mark.parametrize("horizontal_flip", [0.0, 0.5, 1.0])
def test_images_are_flipped_as_often_as_asked_for(horizontal_flip):
    image = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3)))
    transform = ImageTransform((SIZE, SIZE), MEAN, horizontal_flip=horizontal_flip)
    seed_everything(0)
    crops = [transform(image) for _ in range(400)]
    share = sum(bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops) / 400
    assert abs(share - horizontal_flip) <= 4 * (horizontal_flip * (1 - horizontal_flip) / 400) ** 0.5
