"""What the training scripts share: refusals, the parts of a checkpoint."""

from dataclasses import dataclass

import pytest
import torch

from modeling_cots import COTSForPreTraining, COTSModel, COTSTrainingArguments
from modeling_cots.scripts.steps import (
    DataArguments,
    MeasuringArguments,
    ModelArguments,
    build_parts,
    check_measuring,
    open_split,
    parse_options,
    read_config,
)


@pytest.mark.parametrize("name", ["text_model", "vision_model", "model_config"])
def test_a_whole_checkpoint_leaves_no_room_for_encoders(name):
    with pytest.raises(ValueError, match=f"mine is a whole COTS checkpoint: leave {name} out"):
        read_config(ModelArguments(model="mine", **{name: "other"}))


def test_no_split_is_no_data_set():
    assert open_split(DataArguments("scenes"), "none", image_size=32, seed=0) is None
    assert open_split(DataArguments("scenes"), None, image_size=32, seed=0) is None
    assert len(open_split(DataArguments("scenes"), "validation", image_size=32, seed=0)) == 200


@pytest.mark.parametrize("options", [["--do_train"], ["--do_eval", "true"], ["--do_predict"]], ids=str)
def test_what_transformers_leaves_to_scripts_is_refused_where_it_would_be_ignored(options):
    argv = ["--dataset", "scenes", "--use_cpu"]
    with pytest.raises(ValueError, match=f"{options[0].removeprefix('--')} would be ignored"):
        parse_options(DataArguments, argv=[*argv, *options])
    options, args = parse_options(DataArguments, argv=[*argv, "--eval_strategy", "epoch"])
    assert options.dataset == "scenes" and args.do_eval


def test_a_run_that_only_measures_goes_on_with_no_training(tmp_path):
    @dataclass
    class Options(ModelArguments, MeasuringArguments, DataArguments):
        pass

    args = COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="only measures"):
        check_measuring(Options("scenes", model="mine", train_split="none", zero_shot_protocol="none"), args)


@pytest.fixture
def checkpoint(tiny_config, tiny_processor, tmp_path) -> str:
    """An exported model, without heads, whose images are normalized in its own way."""
    tiny_processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    COTSModel(tiny_config).save_pretrained(tmp_path / "mine")
    tiny_processor.save_pretrained(tmp_path / "mine")
    return str(tmp_path / "mine")


def build(checkpoint: str, tmp_path, **arguments):
    args = COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    options = ModelArguments(model=checkpoint, image_tokenizer="random", max_text_length=24)
    data = open_split(DataArguments("scenes"), "validation", image_size=32, seed=0)
    return build_parts(options, read_config(options), args, data)


def test_a_checkpoint_keeps_its_normalization_and_its_streams(checkpoint, tmp_path):
    parts = build(checkpoint, tmp_path, cmvm_weight=0, cmlm_weight=0)
    assert list(parts.processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert parts.image_tokenizer is None
    expected = COTSModel.from_pretrained(checkpoint).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(parts.model.cots.state_dict()[name], tensor), name


def test_heads_are_loaded_where_token_losses_need_them(tiny_config, checkpoint, tmp_path):
    model = COTSForPreTraining(tiny_config)
    model.save_pretrained(checkpoint)
    found = build(checkpoint, tmp_path, cmvm_weight=1, cmlm_weight=1).model.cmvm_head.weight
    assert torch.equal(found, model.cmvm_head.weight)
