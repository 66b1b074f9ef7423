"""What COTSTrainer pushes, at the end and while it trains, through the real client."""

import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forks import ClientError
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download
from safetensors.torch import load_file
from tiny import IMAGE_SIZE

from modeling_cots import COTSForPreTraining, COTSProcessor, COTSTrainer, COTSTrainingArguments, ScenesDataset
from modeling_cots.hub_export import export_repository, is_untouched

pytest_plugins = ["hub_fixtures"]


@pytest.fixture
def checkpoint(tiny_config, tiny_processor, tmp_path) -> str:
    torch.manual_seed(0)
    COTSForPreTraining(tiny_config).save_pretrained(tmp_path / "start")
    tiny_processor.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


# --- what clients do


def build_trainer(checkpoint: str, **arguments) -> COTSTrainer:
    scenes = ScenesDataset("train", 8, IMAGE_SIZE)
    args = COTSTrainingArguments(
        **{
            "output_dir": str(Path(checkpoint).parent / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "lr_hold_epochs": 0,
            "queue_size": 4,
            "cmvm_weight": 0.0,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
            **arguments,
        }
    )
    return COTSTrainer(
        model=COTSForPreTraining.from_pretrained(checkpoint),
        args=args,
        train_dataset=scenes,
        eval_dataset=scenes,
        processing_class=COTSProcessor.from_pretrained(checkpoint),
        max_text_length=24,
    )


def train_and_push(checkpoint: str, arguments: dict, options: dict) -> dict:
    trainer = build_trainer(checkpoint, **arguments)
    trainer.train()
    trainer.evaluate()
    commit = trainer.push_to_hub(**options)
    commit = commit if options.get("blocking", True) else commit.result()
    trainer.export_model(str(Path(checkpoint).parent / "expected"))
    return {"commit": commit.oid, "repo_id": trainer.hub_model_id}


def train(checkpoint: str, arguments: dict) -> dict:
    from modeling_cots.training import publishing

    time.sleep = lambda seconds: None
    warnings = []
    publishing.logger.warning = warnings.append
    trainer = build_trainer(checkpoint, **arguments)
    trainer.train()
    return {"step": trainer.state.global_step, "warnings": warnings}


def run_script(name: str, *arguments: str) -> None:
    sys.argv = [f"{name}.py", *arguments]
    import_module(name).main()


def pull(repo_id: str) -> str:
    return snapshot_download(repo_id)


def titles(repo_id: str) -> list[str]:
    return [commit.title for commit in HfApi().list_repo_commits(repo_id)]


def edit_card(repo_id: str) -> str:
    card = Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8") + "By hand.\n"
    operation = CommitOperationAdd("README.md", card.encode())
    return HfApi().create_commit(repo_id, [operation], commit_message="by hand").oid


def files_of(folder) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}
    return names - {".gitattributes"}


# --- tests


def test_pushes_the_complete_repository_with_the_card_of_the_run(hub, checkpoint, tmp_path):
    repo_id = hub.new_repo_id()
    pushed = hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {"tag": "v1", "private": True})
    assert pushed["repo_id"] == repo_id
    folder = Path(hub.run(pull, repo_id))
    model = COTSForPreTraining.from_pretrained(checkpoint)
    export_repository(model, COTSProcessor.from_pretrained(checkpoint), tmp_path / "other")
    of_the_run = {"training_record.json", *(f"widget/example-{number}.jpg" for number in (1, 2, 3))}
    assert files_of(folder) == files_of(tmp_path / "other") | of_the_run
    found, expected = load_file(folder / "model.safetensors"), load_file(tmp_path / "expected" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(word in name for name in found for word in ("head", "queue", "momentum", "mask_token"))
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == repo_id and card.data.eval_results and is_untouched(card.content)
    assert f'"{repo_id}"' in card.text


def test_pushes_in_the_background_if_asked_to(hub, checkpoint):
    repo_id = hub.new_repo_id()
    pushed = hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {"blocking": False})
    assert pushed["commit"] == Path(hub.run(pull, repo_id)).name


def test_pushes_at_every_checkpoint_and_nothing_but_the_repository(hub, checkpoint, tmp_path):
    repo_id = hub.new_repo_id()
    arguments = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_always_push": True}
    assert hub.run(train, checkpoint, {**arguments, "hub_model_id": repo_id}) == {"step": 2, "warnings": []}
    assert {"Training in progress, step 1", "Training in progress, step 2"} <= set(hub.run(titles, repo_id))
    names = files_of(hub.run(pull, repo_id))
    assert "model.safetensors" in names and "handler.py" in names
    assert not [name for name in names if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth"))]
    assert any("momentum" in name for name in files_of(tmp_path / "run"))  # where it belongs


@pytest.mark.parametrize("script, eval_split", [("run_pretraining", "none"), ("run_retrieval", "validation")])
def test_a_training_script_pushes_at_its_end(hub, checkpoint, tmp_path, script, eval_split):
    repo_id = hub.new_repo_id()
    options = {
        "dataset": "scenes",
        "eval_split": eval_split,
        "model": checkpoint,
        "image_tokenizer": "random",
        "max_text_length": 24,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "lr_hold_epochs": 0,
        "queue_size": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "use_cpu": "true",
        "push_to_hub": "true",
        "hub_strategy": "end",
        "hub_model_id": repo_id,
    }
    hub.run(run_script, script, *(word for name, value in options.items() for word in (f"--{name}", str(value))))
    assert hub.run(titles, repo_id)[0] == "End of training"
    assert files_of(hub.run(pull, repo_id)) <= files_of(tmp_path / "run")


def test_an_edited_card_stays(hub, checkpoint):
    repo_id = hub.new_repo_id()
    for expected in (True, False):
        hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {})
        card = (Path(hub.run(pull, repo_id)) / "README.md").read_text(encoding="utf-8")
        assert is_untouched(card) == expected
        hub.run(edit_card, repo_id)
    assert card.endswith("By hand.\n")
    hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {"overwrite_card": True})
    assert "By hand." not in (Path(hub.run(pull, repo_id)) / "README.md").read_text(encoding="utf-8")


def test_a_push_that_fails_in_the_background_does_not_stop_the_training(own_hub, checkpoint):
    repo_id = own_hub.new_repo_id()
    arguments = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_model_id": repo_id}
    own_hub.server.network.vanish_after(1000, "PUT")
    result = own_hub.run(train, checkpoint, arguments)
    assert result["step"] == 2
    assert result["warnings"] and "did not get through" in result["warnings"][0]
    own_hub.server.network.come_back()
    pushed = own_hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {})
    assert Path(own_hub.run(pull, repo_id)).name == pushed["commit"]


def test_a_card_of_ones_own_survives_an_export_into_its_folder(make_trainer, tmp_path, caplog):
    trainer, folder = make_trainer(max_steps=1), tmp_path / "run"
    trainer.train()
    for _ in range(2):
        trainer.export_model(str(folder))
    assert [path.name for path in folder.glob("README*")] == ["README.md"] and "edited" not in caplog.text
    for number in (1, 2):
        (folder / "README.md").write_text(f"of my own {number}")
        trainer.export_model(str(folder))
        assert (folder / f"README.{number}.md").read_text() == f"of my own {number}"
        assert f"edited {folder / 'README.md'}: it is kept as README.{number}.md" in caplog.text
    assert "COTS" in (folder / "README.md").read_text()


def test_refuses_to_push_checkpoints_and_unknown_options(make_trainer):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"hub_strategy={strategy} would put momentum copies"):
            make_trainer(push_to_hub=True, hub_strategy=strategy)
    with pytest.raises(TypeError, match="nothing_like_it"):
        trainer = make_trainer()
        trainer.hub_model_id = "tester/nothing"
        trainer.push_to_hub(nothing_like_it=1)


def test_refuses_to_push_what_is_private_where_everybody_sees_it(hub, checkpoint):
    repo_id = hub.new_repo_id()
    hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {"private": False})
    with pytest.raises(ClientError, match="^ValueError: .*everybody sees it"):
        hub.run(train_and_push, checkpoint, {"hub_model_id": repo_id}, {"private": True})
