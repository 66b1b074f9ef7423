"""A file that is there is whole, whatever happened while it was written."""

import os

import pytest

from modeling_cots.data.atomic_write import atomic_write


@pytest.fixture
def events(monkeypatch):
    """The names of what is flushed and renamed, in order."""
    events, original_open, original_replace, original_fsync = [], os.open, os.replace, os.fsync
    opened = {}

    def note_open(path, *args, **kwargs):
        descriptor = original_open(path, *args, **kwargs)
        opened[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(f"flush {opened[fd]}"), original_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), original_replace(a, b)))
    return events


def test_bytes_are_on_the_disk_before_the_name_is_and_then_the_folder(tmp_path, events):
    with atomic_write(tmp_path / "a.json") as partial:
        partial.write_text("new")
        assert not (tmp_path / "a.json").exists()
    assert (tmp_path / "a.json").read_text() == "new"
    assert events == ["flush a.json.partial", "rename", f"flush {tmp_path.name}"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a.json") as partial:
        partial.write_text("half of the n")
        raise error
    assert (tmp_path / "a.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_a_killed_writer_left_is_written_over(tmp_path):
    (tmp_path / "a.json.partial").write_text("half of something much longer")
    with atomic_write(tmp_path / "a.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.json").read_text() == "new" and os.listdir(tmp_path) == ["a.json"]
