"""What stands in `output_dir` is never written over, unless a run in it goes on or its user says so."""

import os

import pytest

from modeling_cots import COTSTrainingArguments
from modeling_cots.scripts.output_folder import check_output_dir
from modeling_cots.training.checkpoints import begin_checkpoint, commit_checkpoint
from modeling_cots.training.recovery import LOCK_NAME


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def check(folder, *, overwrite: bool = False, **arguments) -> None:
    check_output_dir(COTSTrainingArguments(output_dir=str(folder), use_cpu=True, **arguments), overwrite)


def write_checkpoint(run, *, committed: bool = True):
    folder = run / "checkpoint-5"
    begin_checkpoint(folder, "a run")
    if committed:
        commit_checkpoint(folder, num_processes=1)
    return folder


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "checkpoint-5", "photos", "checkpoint-5.bak"])
def test_a_folder_that_is_not_empty_is_refused(run, name):
    (run / name).mkdir()
    with pytest.raises(ValueError) as refused:
        check(run)
    said = str(refused.value)
    assert said.startswith(f"output_dir={run} is not empty, it holds {name}: choose another folder, ")
    assert ("--resume_from_checkpoint latest" in said) == name.startswith("checkpoint-")
    assert said.endswith("or write over what is there with --overwrite_output_dir.")
    check(run, overwrite=True)


def test_what_holds_nothing_of_anybodys_is_taken(run):
    check(run)
    check(run.parent / "new" / "folder")
    assert not (run.parent / "new").exists()
    (run / LOCK_NAME).touch()  # of a run that was killed before it had a checkpoint
    (run / ".DS_Store").touch()
    check(run)


def test_a_run_that_goes_on_is_no_other(run, tmp_path):
    (run / "README.md").touch()
    folder = write_checkpoint(run)
    check(run, resume_from_checkpoint="latest")
    check(run, resume_from_checkpoint=str(folder))
    check(run, resume_from_checkpoint=os.path.relpath(folder))
    with pytest.raises(ValueError, match="There is no checkpoint nowhere to go on from; `latest` means the newest"):
        check(run, resume_from_checkpoint="nowhere", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").touch()
    with pytest.raises(ValueError, match="other is not empty, it holds README.md"):
        check(tmp_path / "other", resume_from_checkpoint=str(folder))


def test_latest_goes_on_with_what_was_stopped_before_its_first_checkpoint(run):
    write_checkpoint(run, committed=False)
    (run / "runs").mkdir()
    (run / "image_tokenizer").mkdir()
    (run / "noise").mkdir()
    check(run, resume_from_checkpoint="latest", filter_log=str(run / "noise"))
    with pytest.raises(ValueError, match="it holds .* and 1 more: choose another folder, or write over"):
        check(run, resume_from_checkpoint="latest")
    (run / "noise").rmdir()
    (run / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is not empty"):
        check(run, resume_from_checkpoint="latest")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run is a file: name a folder"):
        check(tmp_path / "run", overwrite=True)


def test_a_read_only_folder_is_named_before_any_work(tmp_path):
    """A real one, whoever runs the tests: /proc takes no file of root either."""
    with pytest.raises(ValueError, match="output_dir=/proc/sys/run: /proc/sys is read-only for you"):
        check("/proc/sys/run")
