"""What data sets of images and of videos share."""

import pytest

from modeling_cots.data import columns
from modeling_cots.data.columns import check_any_exists, check_inside, drop_uncaptioned


@pytest.mark.parametrize("path", ["../a.png", "b/../../a.png", "/etc/a.png", "", "."])
def test_a_path_that_leaves_its_folder_is_refused(tmp_path, path):
    with pytest.raises(ValueError, match="leads out of"):
        check_inside(["in.png", path], tmp_path, "image")


def test_paths_inside_become_full_ones_and_one_of_them_has_to_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = check_inside(["a.mp4", "b/../c.mp4"], ".", "video")
    assert files == {"a.mp4": str(tmp_path / "a.mp4"), "b/../c.mp4": str(tmp_path / "c.mp4")}
    with pytest.raises(ValueError, match="None of the 2 videos exists: 'a.mp4'"):
        check_any_exists(files, tmp_path, "video")
    (tmp_path / "c.mp4").touch()
    check_any_exists(files, tmp_path, "video")
    check_any_exists({}, tmp_path, "video")


def test_a_link_is_not_followed_before_its_file_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").symlink_to(tmp_path / "secret.png")
    assert check_inside(["a.png"], tmp_path / "data", "image") == {"a.png": str(tmp_path / "data" / "a.png")}


def test_items_without_a_caption_are_dropped_in_order_and_named(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(columns.logger, "warning", messages.append)
    assert drop_uncaptioned(["a", "b"], [2, 1], str, "image") == ["a", "b"] and messages == []
    assert drop_uncaptioned(range(14), [int(i in (3, 1)) for i in range(14)], "row {}".format, "image") == [1, 3]
    assert messages[0].startswith("Left out 12 of 14 images, which have no caption: row 0, row 2, row 4,")
    assert messages[0].endswith("row 11 and 2 more.")
