"""`cots-export`: a folder that is a Hub repository."""

import sys

import push_to_hub
import pytest

from modeling_cots import COTSModel
from modeling_cots.scripts import cots_export, hub_repository


def test_the_script_calls_the_same_function():
    assert push_to_hub.main is hub_repository.main


def test_it_writes_a_whole_repository(tiny_config, tiny_processor, tmp_path, monkeypatch, capsys):
    COTSModel(tiny_config).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["cots-export", *words])
    cots_export.main()
    assert f"The repository is in {tmp_path / 'out'}." in capsys.readouterr().out
    assert COTSModel.from_pretrained(tmp_path / "out").config.projection_dim == 16
    for name in ("README.md", "processor_config.json", "modeling_cots.py", "handler.py"):
        assert (tmp_path / "out" / name).is_file(), name


def test_an_error_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["cots-export", "--model", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cots_export.main()
    assert "--repo_id NAME to push, --output_dir FOLDER" in ended.value.code and "\n" not in ended.value.code


def test_help_keeps_the_lines_of_its_examples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cots-export", "--help"])
    with pytest.raises(SystemExit):
        cots_export.main()
    assert "\n    cots-export --model runs/photos --output_dir out/photos\n" in capsys.readouterr().out
