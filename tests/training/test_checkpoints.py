"""Which folders are taken for whole checkpoints, which one is the newest, and which ones are deleted."""

import json
import os
import shutil
import time
import zlib

import pytest

from modeling_cots.training.checkpoints import (
    MANIFEST_NAME,
    RUN_NAME,
    begin_checkpoint,
    check_checkpoint,
    choose_checkpoint,
    commit_checkpoint,
    invalidate_checkpoint,
    latest_checkpoint,
    rotate_checkpoints,
    run_of,
    set_aside,
    unfinished_run,
)


def write(run, step: int, *, committed: bool = True, run_id: str | None = None):
    folder = run / f"checkpoint-{step}"
    if run_id is not None:
        begin_checkpoint(folder, run_id)
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(200)))
    (folder / "part" / "state").write_bytes(b"state" * step)
    if committed:
        commit_checkpoint(folder, num_processes=2)
    return folder


def names(run) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_sealed_folder_is_whole(tmp_path):
    manifest = check_checkpoint(write(tmp_path, 3))
    assert manifest["num_processes"] == 2
    assert manifest["files"].keys() == {"weights", "part/state"}
    assert manifest["files"]["weights"][0] == 200


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: invalidate_checkpoint(folder), f"no {MANIFEST_NAME}, which is written last"),
        (lambda folder: (folder / "part" / "state").unlink(), "has no part/state"),
        (lambda folder: (folder / "weights").write_bytes(bytes(range(100))), "has 100 bytes and was saved with 200"),
        (lambda folder: (folder / "weights").write_bytes(bytes(200)), "not those that were saved"),
        (lambda folder: (folder / MANIFEST_NAME).write_text('{"files": {"weig'), "manifest.json is damaged"),
        (lambda folder: (folder / MANIFEST_NAME).write_text("{}"), "manifest.json is damaged"),
        (lambda folder: shutil.rmtree(folder), "There is no checkpoint"),
    ],
)
def test_anything_else_is_not(tmp_path, damage, message):
    folder = write(tmp_path, 3)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder)
    assert latest_checkpoint(tmp_path) is None


def test_sealing_again_replaces_the_manifest(tmp_path):
    folder = write(tmp_path, 3)
    (folder / "weights").write_bytes(b"new")
    commit_checkpoint(folder, num_processes=1)
    assert check_checkpoint(folder)["files"]["weights"][0] == 3


def test_the_latest_is_the_one_written_last_and_whole(tmp_path, caplog):
    """Not the one with the highest number: an earlier run may have got further in the same folder."""
    write(tmp_path, 9)
    write(tmp_path, 2)
    write(tmp_path, 10, committed=False)
    (tmp_path / "checkpoint-11.tmp").mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "weights").unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert "checkpoint-2 has no weights" in caplog.text
    assert latest_checkpoint(tmp_path / "not there") is None


def test_the_order_survives_copying(tmp_path):
    for step in (5, 3):
        write(tmp_path / "run", step)
    for step in (3, 5):
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", tmp_path / "copy" / f"checkpoint-{step}")
    assert latest_checkpoint(tmp_path / "copy") == str(tmp_path / "copy" / "checkpoint-3")


def test_the_order_needs_no_clock(tmp_path, monkeypatch):
    """Nothing is deleted that was just saved, though the clock is set back between two saves."""
    clock = iter([2e9, 1e9, 1.5e9, 1.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for step in (2, 4, 6):
        folder = write(tmp_path, step)
        os.utime(folder / MANIFEST_NAME, (1e9 - step, 1e9 - step))
        rotate_checkpoints(tmp_path, 1)
        assert names(tmp_path) == [f"checkpoint-{step}"] and latest_checkpoint(tmp_path) == str(folder)


def test_manifests_without_a_number_are_older_and_in_the_order_of_their_steps(tmp_path):
    """As 0.1 wrote them."""
    for step in (10, 4):
        manifest = json.loads((write(tmp_path, step) / MANIFEST_NAME).read_text())
        del manifest["save_number"]
        manifest["written"] = 1e9 / step
        (tmp_path / f"checkpoint-{step}" / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    write(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_step_that_is_saved_again_is_the_newest(tmp_path):
    for step in (2, 4):
        write(tmp_path, step)
    commit_checkpoint(tmp_path / "checkpoint-2", num_processes=1)
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_what_is_chosen(tmp_path):
    run = str(tmp_path)
    assert choose_checkpoint(None, run) is choose_checkpoint(False, run) is choose_checkpoint("latest", run) is None
    with pytest.raises(ValueError, match="no whole checkpoint"):
        choose_checkpoint(True, run)
    folder = str(write(tmp_path, 4))
    assert choose_checkpoint("latest", run) == choose_checkpoint(True, run) == choose_checkpoint(folder, "x") == folder
    half_written = write(tmp_path, 5, committed=False)
    with pytest.raises(ValueError, match="stopped while it saved.*newest whole one beside it is .*checkpoint-4"):
        choose_checkpoint(str(half_written), run)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="no whole one beside it"):
        choose_checkpoint(str(half_written), run)


def test_rotation_counts_whole_ones_alone(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, run_id="mine")
    write(tmp_path, 4, committed=False, run_id="mine")
    rotate_checkpoints(tmp_path, None, run_id="mine")
    rotate_checkpoints(tmp_path, 0, run_id="mine")
    assert len(names(tmp_path)) == 4
    rotate_checkpoints(tmp_path, 2, run_id="mine")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_rotation_keeps_the_best_and_the_last(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    rotate_checkpoints(tmp_path, 3, best=str(tmp_path / "checkpoint-1"))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    rotate_checkpoints(tmp_path, 1, best=str(tmp_path / "checkpoint-1"))
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def test_rotation_deletes_nothing_while_no_one_is_whole(tmp_path):
    write(tmp_path, 1, committed=False)
    write(tmp_path, 2, committed=False)
    rotate_checkpoints(tmp_path, 1)
    assert len(names(tmp_path)) == 2


def test_what_is_left_of_a_deletion_is_no_checkpoint(tmp_path, monkeypatch):
    """As if the process died in it."""
    write(tmp_path, 1, run_id="mine")
    write(tmp_path, 2, run_id="mine")
    monkeypatch.setattr("modeling_cots.training.checkpoints.shutil.rmtree", lambda *args, **kwargs: None)
    rotate_checkpoints(tmp_path, 1, run_id="mine")
    assert names(tmp_path / "checkpoint-1") == ["part", RUN_NAME] and run_of(tmp_path / "checkpoint-1") == "mine"
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("other", ["other", None])
@pytest.mark.parametrize("committed", [True, False])
def test_rotation_deletes_nothing_of_another_run(tmp_path, other, committed):
    """Without an id, it may be of transformers' Trainer, or of 0.1."""
    write(tmp_path, 9, run_id=other, committed=committed)
    for step in (1, 2):
        write(tmp_path, step, run_id="mine")
    rotate_checkpoints(tmp_path, 1, run_id="mine")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-9"]
    assert "weights" in names(tmp_path / "checkpoint-9")


def test_a_run_that_goes_on_from_0_1_deletes_nothing_that_is_not_whole(tmp_path):
    write(tmp_path, 9, committed=False)
    for step in (1, 2):
        write(tmp_path, step)
    rotate_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-9"]


def test_checkpoints_of_other_runs_are_set_aside(tmp_path, caplog):
    write(tmp_path, 1, run_id="mine")
    set_aside(tmp_path, "mine")
    set_aside(tmp_path / "not there", "mine")
    assert names(tmp_path) == ["checkpoint-1"] and caplog.text == ""
    for step, other in ((2, "other"), (3, None)):
        write(tmp_path, step, run_id=other)
    set_aside(tmp_path, "mine")
    assert f"Moved 2 checkpoints of another run to {tmp_path / 'other_run_1'}: checkpoint-" in caplog.text
    set_aside(tmp_path, "a third")
    assert names(tmp_path) == ["other_run_1", "other_run_2"]
    assert names(tmp_path / "other_run_1") == ["checkpoint-2", "checkpoint-3"]
    assert check_checkpoint(tmp_path / "other_run_2" / "checkpoint-1")


def test_a_run_that_was_stopped_in_its_first_save_is_known(tmp_path):
    assert unfinished_run(tmp_path) is None
    write(tmp_path, 1, committed=False, run_id="mine")
    write(tmp_path, 9, run_id="other")
    write(tmp_path, 8, committed=False)
    assert unfinished_run(tmp_path) == "mine"
    write(tmp_path, 2, committed=False, run_id="other")
    assert unfinished_run(tmp_path) is None


def test_the_manifest_is_plain_json(tmp_path):
    manifest = json.loads((write(tmp_path, 1) / MANIFEST_NAME).read_text())
    assert manifest["files"]["part/state"] == [5, zlib.crc32(b"state")]
