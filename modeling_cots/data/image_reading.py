"""Whether the images of a data set can be read at all. One image is read in `image_reading_cots.py`."""

from ..image_reading_cots import UnreadableImageError, read_image


def check_readable(dataset, num_tries: int = 200) -> None:
    """Raise `ValueError` if none of the first `num_tries` images of a data set of pairs can be read."""
    errors = []
    for index in range(min(num_tries, len(dataset))):
        item = dataset[index]
        try:
            read_image(item["image"])
            return
        except UnreadableImageError as error:
            errors.append(f"{item['name']} ({error})")
    raise ValueError(f"None of the first {len(errors)} images can be read, beginning with {errors[0]}.")
