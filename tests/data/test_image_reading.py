"""`check_readable`: whether a data set holds any image at all, found out without reading all of them."""

import pytest
from image_files import as_bytes
from PIL import Image

from modeling_cots.data.image_reading import check_readable


class Items(list):
    """A data set that remembers which of its items were asked for."""

    def __init__(self, sources):
        super().__init__({"image": source, "name": f"row {i}"} for i, source in enumerate(sources))
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def test_one_readable_image_is_enough_and_ends_the_search():
    dataset = Items([b"", b"", as_bytes(Image.new("RGB", (7, 5))), b""])
    check_readable(dataset)
    assert dataset.asked == [0, 1, 2]


@pytest.mark.parametrize(("num_images", "num_named"), [(3, 3), (300, 200)])
def test_no_readable_image_is_refused_by_name(num_images, num_named):
    dataset = Items([b""] * num_images)
    with pytest.raises(ValueError, match=rf"None of the first {num_named} images .* row 0 \(UnidentifiedImageError"):
        check_readable(dataset)
    assert dataset.asked == list(range(num_named))
