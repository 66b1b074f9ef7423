"""What the training scripts share: refusals, the parts of a checkpoint."""

from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import HfApi
from transformers import BertModel, FlavaImageCodebook, FlavaImageCodebookConfig, ViTImageProcessor, ViTModel

from modeling_cots import COTSForPreTraining, COTSModel, COTSProcessor, COTSTrainingArguments
from modeling_cots.scripts.steps import (
    DataArguments,
    MeasuringArguments,
    ModelArguments,
    OutcomeArguments,
    StreamArguments,
    build_parts,
    check_measuring,
    held_out_options,
    open_split,
    parse_options,
    read_config,
)

pytest_plugins = ["hub_fixtures"]


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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("queue_size: 0", "queue_size must be at least 1, got 0"),
        ("learning_rate: -1", "learning_rate must not be negative, got -1.0"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size must be at least 1, got 0"),
        ("momentum: 1.5", "momentum must be between 0 and 1, got 1.5"),
        ("seed: -1", "seed must not be negative, got -1"),
        ("seed: 4294967296", "seed must be at most 4294967295, got 4294967296"),
        ("adam_beta2: 1", "adam_beta2 must be below 1, got 1.0"),
        ("logging_steps: 0", "logging_steps must be above 0, got 0.0"),
        ("max_text_length: 2", "max_text_length must be at least 3, got 2"),
        ("shuffle_buffer: 0", "shuffle_buffer must be at least 1, got 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_line(tmp_path, line, said):
    @dataclass
    class Options(StreamArguments, ModelArguments, DataArguments):
        pass

    path = tmp_path / "my.yaml"
    path.write_text(f"dataset: scenes\nuse_cpu: true\n{line}\n")
    with pytest.raises(ValueError) as refused:
        parse_options(Options, argv=[str(path)])
    assert str(refused.value).startswith(f"{path}, line 3: {said}")


@pytest.mark.parametrize("dataset", ["scenes", "jsonl"])
@pytest.mark.parametrize("kind", [StreamArguments, MeasuringArguments])
def test_a_missing_split_says_what_to_write(tmp_path, dataset, kind):
    @dataclass
    class Options(kind, DataArguments):
        pass

    if dataset == "jsonl":
        dataset = str(tmp_path)
        (tmp_path / "train.jsonl").write_text('{"image": "a.png", "caption": "a"}')
    options = Options(dataset, eval_split="test")
    with pytest.raises(ValueError) as refused:
        open_split(options, "test", image_size=32, seed=0)
    said = str(refused.value)
    assert ("--eval_split none to measure nothing" in said) == (kind is not MeasuringArguments)
    if dataset == "scenes":
        assert said.endswith("--eval_split validation.") and "[:500]" not in said
    else:
        assert "--eval_split train[:500] --train_split train[500:]" in said
    options.train_split = "tain"
    with pytest.raises(ValueError, match="Write --train_split train"):
        open_split(options, "tain", image_size=32, seed=0)


@pytest.mark.parametrize("name", ["image_folder", "image_column", "caption_column"])
def test_options_that_scenes_have_no_use_for_are_refused(name):
    with pytest.raises(ValueError, match=f"^scenes is generated: leave out {name}"):
        open_split(DataArguments("scenes", **{name: "x"}), "train", image_size=32, seed=0)


def test_what_would_not_be_measured_is_refused():
    @dataclass
    class Options(StreamArguments, ModelArguments, OutcomeArguments, DataArguments):
        pass

    with pytest.raises(ValueError, match="eval_dataset=scenes is not measured without an eval_split"):
        held_out_options(Options("photos", eval_split="none", eval_dataset="scenes"))
    kept = held_out_options(Options("photos", image_column="image", eval_dataset="scenes"))
    assert kept.image_column is None and len(open_split(kept, "validation", image_size=32, seed=0)) == 200
    for option, said in (("--strict", "strict asks whether"), ("--eval_strategy=epoch", "eval_strategy=epoch has")):
        with pytest.raises(ValueError, match=f"{said} .*: give eval_split"):
            parse_options(Options, argv=f"--dataset scenes --eval_split none {option} --use_cpu".split())


def test_nothing_to_train_on_is_said(tmp_path):
    args = COTSTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="nothing to train on: give train_split"):
        build_parts(ModelArguments(), None, args, None)


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


@pytest.mark.parametrize("name", ["model", "text_model", "vision_model", "tokenizer", "image_tokenizer"])
def test_a_revision_of_what_is_no_hub_id_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}={tmp_path} is no Hub id and has no revision 'v1'"):
        read_config(ModelArguments(**{name: str(tmp_path), f"{name}_revision": "v1"}))


def test_the_versions_of_the_held_out_data_are_its_own():
    @dataclass
    class Options(StreamArguments, DataArguments):
        pass

    options = Options("some/pairs", dataset_config="small", dataset_revision="v1")
    assert held_out_options(options) is options
    options.eval_dataset, options.eval_dataset_revision = "some/others", "v2"
    held_out = held_out_options(options)
    assert (held_out.dataset, held_out.dataset_config, held_out.dataset_revision) == ("some/others", None, "v2")
    with pytest.raises(ValueError, match="eval_dataset_config=small belongs to eval_dataset"):
        held_out_options(Options("some/pairs", eval_dataset_config="small"))


# --- what clients of a hub do


def upload(folder: str, repo_id: str) -> str:
    HfApi().create_repo(repo_id, exist_ok=True)
    return HfApi().upload_folder(folder_path=folder, repo_id=repo_id).oid


def numbers_of(output_dir: str, **options) -> list[float]:
    """The sum of each part's weights: text encoder, vision encoder, dVAE; the size of the vocabulary; the mean."""
    args = COTSTrainingArguments(output_dir=output_dir, use_cpu=True)
    options = ModelArguments(**{"image_tokenizer": "random", "max_text_length": 24, **options})
    data = open_split(DataArguments("scenes"), "validation", image_size=32, seed=0)
    parts = build_parts(options, read_config(options), args, data)
    encoders = parts.model.cots.text_model, parts.model.cots.vision_model, parts.image_tokenizer
    numbers = [sum(weight.double().sum().item() for weight in encoder.parameters()) for encoder in encoders]
    return [*numbers, len(parts.processor.tokenizer), parts.processor.image_processor.image_mean[0]]


# --- tests with a hub


def test_a_checkpoint_of_the_hub_is_taken_at_its_revision(hub, checkpoint, tiny_config, tmp_path):
    repo_id = hub.new_repo_id()
    commit = hub.run(upload, checkpoint, repo_id)
    before = hub.run(numbers_of, str(tmp_path), model=repo_id)
    COTSModel(tiny_config).save_pretrained(checkpoint)
    change_mean(checkpoint)
    hub.run(upload, checkpoint, repo_id)
    after = hub.run(numbers_of, str(tmp_path), model=repo_id)
    assert before[0] != after[0] and before[1] != after[1] and after[4] == 0.5
    assert hub.run(numbers_of, str(tmp_path), model=repo_id, model_revision=commit)[:2] == before[:2]
    assert hub.run(numbers_of, str(tmp_path), model=repo_id, model_revision=commit)[4] == 0.1


def change_mean(folder: str) -> None:
    processor = COTSProcessor.from_pretrained(folder)
    processor.image_processor.image_mean = [0.5] * 3
    processor.save_pretrained(folder)


def test_encoders_and_tokenizers_of_the_hub_are_taken_at_their_revisions(hub, tiny_config, tiny_tokenizer, tmp_path):
    writers = {
        "text_model": lambda: BertModel(tiny_config.text_config, add_pooling_layer=False),
        "vision_model": lambda: ViTModel(tiny_config.vision_config, add_pooling_layer=False),
        "image_tokenizer": lambda: FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=20)),
    }
    repo_ids = {name: hub.new_repo_id() for name in (*writers, "tokenizer")}
    commits = {}
    for attempt in range(2):
        for name, build in writers.items():
            build().save_pretrained(tmp_path / name)
        mean = 0.1 + 0.2 * attempt
        ViTImageProcessor(image_mean=[mean] * 3).save_pretrained(tmp_path / "vision_model")
        tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
        written = {name: hub.run(upload, str(tmp_path / name), repo_id) for name, repo_id in repo_ids.items()}
        commits = commits or written
        if attempt == 0:
            before = hub.run(numbers_of, str(tmp_path), **repo_ids)
            tiny_tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path / "tokenizer")
            tiny_tokenizer.add_tokens(["another"])
            tiny_config.text_config.vocab_size += 1
    after = hub.run(numbers_of, str(tmp_path), **repo_ids)
    assert all(old != new for old, new in zip(before, after, strict=True))
    pinned = {f"{name}_revision": commit for name, commit in commits.items()}
    assert hub.run(numbers_of, str(tmp_path), **repo_ids, **pinned) == before


def test_an_image_tokenizer_that_nothing_asks_for_is_not_looked_up(tmp_path, monkeypatch):
    """A folder of the owner's name makes its id look like a path."""
    (tmp_path / "facebook").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ModelArguments().revisions == {}
