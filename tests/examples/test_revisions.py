"""Every script that takes a Hub id takes its revision, and refuses one of a folder, where it would be ignored."""

import importlib
import sys

import pytest

from modeling_cots.scripts.steps import DataArguments, open_split

HERE = "--output_dir {out} --use_cpu true"
CASES = [
    "visualize_attention x.png caption --model {folder} --revision v1",
    "visualize_filter scenes --model {folder} --model_revision v1",
    "tokenize_images scenes --output_dir {out} --model {folder} --model_revision v1",
    "tokenize_images scenes --output_dir {out} --image_tokenizer {folder} --image_tokenizer_revision v1",
    "push_to_hub --model {folder} --model_revision v1 --output_dir {out}",
    f"run_pretraining --dataset scenes --model {{folder}} --model_revision v1 {HERE}",
    f"run_pretraining --dataset scenes --tokenizer {{folder}} --tokenizer_revision v1 {HERE}",
    f"run_retrieval --dataset scenes --text_model {{folder}} --text_model_revision v1 {HERE}",
    f"run_video_retrieval --dataset moving_scenes --vision_model {{folder}} --vision_model_revision v1 {HERE}",
    "estimate --dataset scenes --image_tokenizer {folder} --image_tokenizer_revision v1 --output_dir {out}",
    "pointing_game --model {folder} --revision v1",
    "moving_scenes_probe {folder} --revision v1",
]


@pytest.mark.parametrize("command", CASES, ids=lambda command: " ".join(command.split()[:1] + command.split()[-3:-1]))
def test_a_revision_of_a_folder_is_refused(command, tmp_path, monkeypatch):
    script, *words = command.format(folder=tmp_path, out=tmp_path / "out").split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(ValueError, match=f"={tmp_path} is no Hub id and has no revision 'v1': leave the revision out"):
        importlib.import_module(script).main()


@pytest.mark.parametrize("version", [{"dataset_revision": "v1"}, {"dataset_config": "small"}])
def test_versions_of_built_in_data_are_refused(version):
    with pytest.raises(ValueError, match="belongs to a Hub id"):
        open_split(DataArguments("scenes", **version), "validation", image_size=32, seed=0)
