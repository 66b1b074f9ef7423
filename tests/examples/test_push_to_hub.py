"""The script that makes and pushes repositories, as a user starts it."""

import sys
from pathlib import Path
from subprocess import CompletedProcess

import push_to_hub
import pytest
import torch
from hub_client import OWN_TOKEN
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image

from modeling_cots import COTSForPreTraining, COTSModel, export_repository
from modeling_cots.hub_export import is_untouched, mark_generated

ROOT = Path(__file__).parents[2]


pytest_plugins = ["hub_fixtures"]

LABELS = ["a red circle", "a dog", "people"]


@pytest.fixture
def trained(tiny_config, tiny_processor, tmp_path) -> Path:
    """A folder as training leaves it: the repository, its card, and checkpoints with all that resuming needs."""
    torch.manual_seed(0)
    model = COTSForPreTraining(tiny_config)
    folder = tmp_path / "runs" / "tiny"
    card = mark_generated('---\nlicense: mit\n---\n# Measured\n\n```python\nCOTSModel.from_pretrained("tiny")\n```\n')
    export_repository(model, tiny_processor, folder, card=card)
    model.save_pretrained(folder / "checkpoint-3", save_original_format=False)
    tiny_processor.save_pretrained(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "momentum_state.safetensors").write_bytes(b"momentum")
    (folder / "training_args.bin").write_bytes(b"arguments")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the script in this process, offline; returns what it printed."""

    def run(**options) -> str:
        argv = ["push_to_hub.py"]
        for name, value in options.items():
            argv += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
        monkeypatch.setattr(sys, "argv", argv)
        push_to_hub.main()
        return capsys.readouterr().out

    return run


def start(hub, *arguments: str, token=OWN_TOKEN) -> CompletedProcess:
    """The script in its own process, with this hub and no other."""
    environment = {} if token is OWN_TOKEN else {"HF_TOKEN": token}
    script = ROOT / "examples" / "push_to_hub.py"
    return hub.client(hub.token).run_python(script, *arguments, check=False, environment=environment)


def pull(repo_id: str, **kwargs) -> str:
    return snapshot_download(repo_id, **kwargs)


def is_private(repo_id: str) -> bool:
    return HfApi().model_info(repo_id).private


def files_of(folder) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    return names - {".gitattributes"}


def test_one_command_pushes_the_trained_folder_and_nothing_of_its_training(hub, trained):
    repo_id = hub.new_repo_id()
    options = ["--model", str(trained), "--repo_id", repo_id, "--private", "true", "--tag", "v1.0"]
    result = start(hub, *options)
    assert result.returncode == 0, result.stderr
    assert f"Pushed to {hub.url}/{repo_id}" in result.stdout and "tag v1.0" in result.stdout
    folder = Path(hub.run(pull, repo_id, revision="v1.0"))
    assert files_of(folder) == {
        name for name in files_of(trained) if "checkpoint" not in name and name != "training_args.bin"
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# Measured" in card and f'from_pretrained("{repo_id}")' in card and is_untouched(card)
    assert hub.run(is_private, repo_id)
    again = start(hub, *options)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith("ValueError: ")
    assert "has a tag 'v1.0' already" in again.stderr and "Traceback" not in again.stderr


def test_a_wrong_token_is_one_line_and_no_trace(own_hub, trained):
    result = start(own_hub, "--model", str(trained), "--repo_id", own_hub.new_repo_id(), token="hf_wrong")
    assert result.returncode == 1 and "Traceback" not in result.stderr and "hf_wrong" not in result.stderr
    assert "HubPushError: The hub did not let this account write" in result.stderr.splitlines()[-1]


def test_writes_the_repository_of_a_checkpoint(run, trained, tmp_path):
    printed = run(model=trained / "checkpoint-3", output_dir=tmp_path / "out")
    assert str(tmp_path / "out") in printed
    expected = {name for name in files_of(trained) if "checkpoint" not in name and name != "training_args.bin"}
    assert files_of(tmp_path / "out") == expected
    ours, theirs = (COTSModel.from_pretrained(folder).state_dict() for folder in (trained, tmp_path / "out"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert "# Measured" not in (tmp_path / "out" / "README.md").read_text()  # that was of the finished model


def test_a_card_edited_in_the_folder_goes_as_it_is_with_its_images(run, trained, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"not in the folder")
    (trained / "images").mkdir()
    for name in ("shown.png", "other.png"):
        (trained / "images" / name).write_bytes(b"image")
    text = "---\nwidget:\n- src: images/shown.png\n- src: images/missing.png\n- src: ../../secret.png\n---\n"
    (trained / "README.md").write_text(f'{text}# Mine, not of from_pretrained("tiny"): {tmp_path}/secret.png\n')
    run(model=trained, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == (trained / "README.md").read_text()
    assert {name for name in files_of(tmp_path / "out") if name.endswith(".png")} == {"images/shown.png"}


def test_writes_the_two_stock_models(run, trained, tmp_path):
    run(model=trained, kind="text_encoder", output_dir=tmp_path / "text")
    assert ModelCard.load(tmp_path / "text" / "README.md").data.pipeline_tag == "sentence-similarity"
    images = tmp_path / "images" / "more"
    images.mkdir(parents=True)
    Image.radial_gradient("L").save(images / "a.png")
    (images / "b.txt").write_text("no image")
    run(model=trained, kind="zero_shot_classifier", labels=LABELS, output_dir=tmp_path / "one")
    run(model=trained, kind="zero_shot_classifier", labels=LABELS, output_dir=tmp_path / "two", images=images.parent)
    cards = [ModelCard.load(tmp_path / name / "README.md") for name in ("one", "two")]
    assert all(card.data.pipeline_tag == "image-classification" for card in cards)
    assert cards[0].text != cards[1].text
    assert not list((tmp_path / "text").rglob("*.py")) and not list((tmp_path / "two").rglob("*.py"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Say where to"),
        ({"output_dir": "out", "kind": "image"}, "--kind must be one of"),
        ({"output_dir": "out", "tag": "v1"}, "give --repo_id as well"),
        ({"output_dir": "out", "private": "true"}, "give --repo_id as well"),
        ({"output_dir": "out", "kind": "zero_shot_classifier"}, "needs its classes"),
        ({"output_dir": "out", "labels": LABELS}, "belong to --kind zero_shot_classifier"),
        ({"output_dir": "out", "kind": "text_encoder", "images": "images"}, "belong to --kind"),
        ({"output_dir": "out", "hypothesis_template": "a {}"}, "--hypothesis_template belongs to --kind"),
        ({"output_dir": "full"}, "is not empty"),
        ({"output_dir": "out", "model": "nowhere"}, "model=nowhere does not exist"),
        ({"output_dir": "out", "kind": "zero_shot_classifier", "labels": LABELS, "images": "full"}, "no image"),
    ],
)
def test_refuses_what_does_not_go_together(run, trained, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=message):
        run(**{"model": trained, **options})
    assert not (tmp_path / "out").exists()


def test_onnx_files_go_into_the_repository_or_into_one_of_their_own(run, trained, tmp_path):
    pytest.importorskip("onnxruntime")
    said = run(model=trained, onnx="true", validation_data="scenes", output_dir=tmp_path / "whole")
    assert "ONNX int8: " in said and "same first result for " in said
    assert {"model.safetensors", "onnx/text_model.onnx", "preprocessor_config.json"} <= files_of(tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "# Measured" in card and "## ONNX files" in card and "on 200 images and 1,000 texts" in card
    said = run(model=trained, kind="onnx", output_dir=tmp_path / "alone")
    assert "are not measured" in said
    assert not {"model.safetensors", "modeling_cots.py"} & files_of(tmp_path / "alone")
    assert {"onnx/vision_model_int8.onnx", "config.json", "tokenizer.json", "handler.py", "onnx_cots.py"} <= files_of(
        tmp_path / "alone"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [({"kind": "onnx", "onnx": "true"}, "--kind onnx writes"), ({"validation_data": "scenes"}, "give --onnx true")],
)
def test_options_of_onnx_files_alone_are_refused(run, trained, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        run(model=trained, output_dir=tmp_path / "out", **options)


def test_the_card_links_a_space(run, trained, tmp_path):
    run(model=trained, output_dir=tmp_path / "model", space="you/search-page")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "# Measured\n\n[Try it in your browser](https://huggingface.co/spaces/you/search-page)." in card
    assert is_untouched(card)
    with pytest.raises(ValueError, match="--space must name a Space as owner/name, got 'search page'"):
        run(model=trained, output_dir=tmp_path / "other", space="search page")
