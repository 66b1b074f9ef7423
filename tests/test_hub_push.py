"""Pushing a complete repository through the real client: cards, tags, privacy, refusals, a network that vanishes."""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from forks import ClientError
from hub_server import READ_TOKEN, STRANGERS_TOKEN
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from tiny import CAPTIONS
from without_package import run_without_package

from modeling_cots import COTSForPreTraining, COTSModel, COTSProcessor
from modeling_cots.hub_export import export_repository, is_untouched, mark_generated
from modeling_cots.hub_push import push_folder

pytest_plugins = ["hub_fixtures"]

CARD = "---\npipeline_tag: zero-shot-image-classification\n---\n# Ours\n"


@pytest.fixture
def checkpoint(tiny_config, tiny_processor, tmp_path) -> str:
    """A pre-training checkpoint with its processor, which is no repository yet."""
    torch.manual_seed(0)
    COTSForPreTraining(tiny_config).save_pretrained(tmp_path / "checkpoint-7")
    tiny_processor.save_pretrained(tmp_path / "checkpoint-7")
    return str(tmp_path / "checkpoint-7")


@pytest.fixture
def folder(checkpoint, tmp_path) -> str:
    """A complete repository, to push as it is; with a hidden file and a cache of Python's, which stay here."""
    export_repository(
        COTSModel.from_pretrained(checkpoint), COTSProcessor.from_pretrained(checkpoint), tmp_path / "model"
    )
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / ".git" / "config").write_text("mine")
    (tmp_path / "model" / "__pycache__").mkdir()
    (tmp_path / "model" / "__pycache__" / "handler.cpython-311.pyc").write_bytes(b"compiled")
    return str(tmp_path / "model")


# --- what clients do


def digest(model) -> str:
    """Of all weights."""
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in state)).hexdigest()


def load_each(repo_id: str, revisions: list[str], **kwargs) -> dict[str, str]:
    models = {r: COTSModel.from_pretrained(repo_id, revision=r, **kwargs) for r in revisions}
    return {revision: digest(model) for revision, model in models.items()}


def preload(repo_id: str, revisions: list[str]) -> None:
    for revision in revisions:
        HfApi().snapshot_download(repo_id, revision=revision)


def describe_caption(repo_id: str, revision: str) -> list[list[float]]:
    options = {"revision": revision, "local_files_only": True}
    processor = COTSProcessor.from_pretrained(repo_id, **options)
    inputs = processor(text=CAPTIONS[:1], return_tensors="pt")
    with torch.no_grad():
        return COTSModel.from_pretrained(repo_id, **options).eval().encode_text(**inputs).tolist()


def propose(folder: str, repo_id: str, **options) -> list[str]:
    info = push_folder(folder, repo_id, create_pr=True, **options)
    return [info.pr_revision, info.oid]


def merge(repo_id: str, num: int) -> None:
    HfApi().merge_pull_request(repo_id, num)


def push(folder: str, repo_id: str, **options) -> str:
    return push_folder(folder, repo_id, **options).oid


def push_model(model_class: str, source: str, repo_id: str, scale: float = 1.0, **options) -> str:
    model = {"COTSModel": COTSModel, "COTSForPreTraining": COTSForPreTraining}[model_class].from_pretrained(source)
    with torch.no_grad():
        model.base_model.text_projection.weight.mul_(scale)
    return model.push_to_hub(repo_id, **options).oid


def push_model_without_processor(repo_id: str, config: dict) -> str:
    from modeling_cots import COTSConfig

    return COTSModel(COTSConfig(**config)).push_to_hub(repo_id).oid


def push_with(token: str, folder: str, repo_id: str) -> str:
    return push_folder(folder, repo_id, token=token).oid


def impatiently(name: str, *args, **kwargs):
    time.sleep = lambda seconds: None
    return globals()[name](*args, **kwargs)


def edit(repo_id: str, files: dict[str, str]) -> str:
    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    return HfApi().create_commit(repo_id, operations, commit_message="by hand").oid


def read(repo_id: str, name: str, **kwargs) -> str:
    return Path(hf_hub_download(repo_id, name, **kwargs)).read_text(encoding="utf-8")


def facts(repo_id: str, **kwargs) -> dict:
    model = HfApi().model_info(repo_id, **kwargs)
    refs = HfApi().list_repo_refs(repo_id)
    return {
        "sha": model.sha,
        "private": model.private,
        "pipeline_tag": model.pipeline_tag,
        "files": sorted(sibling.rfilename for sibling in model.siblings),
        "tags": {ref.name: ref.target_commit for ref in refs.tags},
        "num_commits": len(HfApi().list_repo_commits(repo_id)),
    }


def files_of(folder: str) -> list[str]:
    root = Path(folder)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    stay = (".git/", "__pycache__/")
    return sorted([*(name for name in names if not name.startswith(stay)), ".gitattributes"])


# --- push, tag, pull by revision


@pytest.mark.parametrize("model_class", ["COTSModel", "COTSForPreTraining"])
def test_a_model_is_pushed_as_a_complete_repository(hub, checkpoint, folder, model_class):
    repo_id = hub.new_repo_id()
    commit = hub.run(push_model, model_class, checkpoint, repo_id, private=True, tag="v1.0")
    found = hub.run(facts, repo_id)
    assert found["files"] == files_of(folder)
    assert found["sha"] == commit and found["tags"] == {"v1.0": commit} and found["private"] is True
    assert found["pipeline_tag"] == "zero-shot-image-classification"
    card = hub.run(read, repo_id, "README.md")
    assert f'from_pretrained("{repo_id}", trust_remote_code=True)' in card


def test_a_version_is_pulled_by_its_tag_where_the_package_is_not(hub, checkpoint, folder, tmp_path):
    """Model, processor and sentence-transformers, as remote code from the server; then pushed on from there."""
    repo_id, second_id = hub.new_repo_id(), hub.new_repo_id()
    hub.run(push_model, "COTSModel", checkpoint, repo_id, tag="v1.0")
    hub.run(push_model, "COTSModel", checkpoint, repo_id, scale=-1.0)
    code = f"""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    for revision in ("v1.0", "main"):
        options = {{"revision": revision, "trust_remote_code": True}}
        model = AutoModel.from_pretrained({repo_id!r}, **options).eval()
        processor = AutoProcessor.from_pretrained({repo_id!r}, **options)
        inputs = processor(text={CAPTIONS!r}, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            answer[revision] = model.encode_text(**inputs).tolist()
        sentences = SentenceTransformer({repo_id!r}, device="cpu", **options).encode({CAPTIONS!r})
        answer["sentences " + revision] = sentences.tolist()
    answer["pushed"] = model.push_to_hub({second_id!r}).oid
    """
    answer = run_without_package(code, tmp_path, hub)
    model, processor = COTSModel.from_pretrained(folder).eval(), COTSProcessor.from_pretrained(folder)
    inputs = processor(text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    for revision, scale in (("v1.0", 1.0), ("main", -1.0)):
        with torch.no_grad():
            model.text_projection.weight.mul_(scale)
            expected = model.encode_text(**inputs)
        for name in (revision, f"sentences {revision}"):
            torch.testing.assert_close(torch.tensor(answer[name]), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(torch.tensor(answer["v1.0"]), torch.tensor(answer["main"]), atol=1e-3)
    found = hub.run(facts, second_id)
    assert found["sha"] == answer["pushed"] and found["files"] == files_of(folder)


def test_a_branch_is_made_and_main_stays(hub, folder):
    repo_id = hub.new_repo_id()
    first = hub.run(push, folder, repo_id)
    Path(folder, "requirements.txt").write_text("other")
    second = hub.run(push, folder, repo_id, revision="trial")
    assert hub.run(facts, repo_id)["sha"] == first
    assert hub.run(facts, repo_id, revision="trial")["sha"] == second
    assert hub.run(read, repo_id, "requirements.txt", revision="trial") == "other"


def test_old_shards_do_not_stay_beside_new_weights(hub, folder):
    repo_id = hub.new_repo_id()
    hub.run(push, folder, repo_id)
    stale = {"model-00001-of-00002.safetensors": "old", "model.safetensors.index.json": "{}", "notes.txt": "mine"}
    hub.run(edit, repo_id, stale)
    Path(folder, "requirements.txt").write_text("other")
    hub.run(push, folder, repo_id)
    assert hub.run(facts, repo_id)["files"] == sorted([*files_of(folder), "notes.txt"])


def write_weights(folder: str, seed: int, max_shard_size: str = "5GB") -> str:
    """Other weights in the place of those of `folder`; their digest."""
    torch.manual_seed(seed)
    model = COTSModel(COTSModel.from_pretrained(folder).config)
    for path in Path(folder).glob("model*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return digest(model)


def test_branch_tag_and_commit_load_their_own_weights_from_one_cache_and_offline(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    expected = {"v1.0": write_weights(folder, 1)}
    expected[own_hub.run(push, folder, repo_id, tag="v1.0")] = expected["v1.0"]
    expected["trial"] = write_weights(folder, 2)
    own_hub.run(push, folder, repo_id, revision="trial")
    expected["main"] = write_weights(folder, 3)
    own_hub.run(push, folder, repo_id)
    revisions = list(expected)
    assert own_hub.run(load_each, repo_id, revisions) == expected
    own_hub.run(preload, repo_id, revisions)
    own_hub.server.network.requests.clear()
    own_hub.server.network.go_down()
    assert own_hub.run(load_each, repo_id, revisions, local_files_only=True) == expected
    texts = {revision: own_hub.run(describe_caption, repo_id, revision) for revision in ("v1.0", "main")}
    assert texts["v1.0"] != texts["main"]
    assert own_hub.server.network.requests == []


def test_a_model_in_shards_is_pushed_and_pulled_and_replaces_whole_weights(hub, folder):
    repo_id = hub.new_repo_id()
    whole = write_weights(folder, 1)
    hub.run(push, folder, repo_id, tag="whole")
    sharded = write_weights(folder, 2, max_shard_size="40KB")
    shards = [path.name for path in Path(folder).glob("model-*-of-*.safetensors")]
    assert len(shards) > 2
    hub.run(push, folder, repo_id, tag="sharded")
    assert hub.run(facts, repo_id)["files"] == files_of(folder)
    few = write_weights(folder, 3, max_shard_size="100KB")
    assert 1 < len(list(Path(folder).glob("model-*-of-*.safetensors"))) < len(shards)
    hub.run(push, folder, repo_id)
    assert hub.run(facts, repo_id)["files"] == files_of(folder)
    expected = {"whole": whole, "sharded": sharded, "main": few}
    assert hub.run(load_each, repo_id, list(expected)) == expected


def test_a_push_can_be_a_pull_request_and_go_on_in_it(hub, folder):
    repo_id = hub.new_repo_id()
    before = write_weights(folder, 1)
    first = hub.run(push, folder, repo_id)
    proposed = write_weights(folder, 2)
    revision, commit = hub.run(propose, folder, repo_id)
    assert revision == "refs/pr/1" and hub.run(facts, repo_id)["sha"] == first
    assert hub.run(facts, repo_id, revision=revision)["sha"] == commit
    assert hub.run(load_each, repo_id, ["main", revision]) == {"main": before, revision: proposed}
    again = write_weights(folder, 3)
    hub.run(push, folder, repo_id, revision=revision)
    hub.run(merge, repo_id, 1)
    assert hub.run(load_each, repo_id, ["main", first]) == {"main": again, first: before}
    for options in ({"tag": "v1"}, {"revision": "trial"}):
        with pytest.raises(ClientError, match="^ValueError: create_pr=True got .*Leave both out"):
            hub.run(propose, folder, repo_id, **options)


def test_a_pull_request_reaches_the_repository_of_somebody_else(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    own_hub.run(push, folder, repo_id)
    Path(folder, "requirements.txt").write_text("other")
    with pytest.raises(ClientError, match="^HubPushError: .*did not let this account write"):
        own_hub.run(push_with, STRANGERS_TOKEN, folder, repo_id)
    revision, _ = own_hub.run(propose, folder, repo_id, token=STRANGERS_TOKEN)
    assert own_hub.run(read, repo_id, "requirements.txt", revision=revision) == "other"


# --- cards


def test_an_edited_card_stays_and_a_generated_one_is_replaced(hub, folder):
    repo_id = hub.new_repo_id()
    for version in ("first", "second"):
        Path(folder, "README.md").write_text(mark_generated(CARD + version))
        hub.run(push, folder, repo_id)
        assert version in hub.run(read, repo_id, "README.md")

    edited = hub.run(read, repo_id, "README.md").replace("# Ours", "# By hand")
    hub.run(edit, repo_id, {"README.md": edited})
    Path(folder, "README.md").write_text(mark_generated(CARD + "third"))
    Path(folder, "requirements.txt").write_text("other")
    hub.run(push, folder, repo_id)
    assert hub.run(read, repo_id, "README.md") == edited
    assert hub.run(read, repo_id, "requirements.txt") == "other"
    hub.run(push, folder, repo_id, overwrite_card=True)
    assert "third" in hub.run(read, repo_id, "README.md")


def test_a_given_card_is_pushed_as_it_is(hub, checkpoint):
    repo_id = hub.new_repo_id()
    hub.run(push_model, "COTSModel", checkpoint, repo_id, card=CARD)
    assert hub.run(read, repo_id, "README.md") == CARD


def push_model_and_processor(source: str, repo_id: str, **options) -> None:
    model, processor = COTSModel.from_pretrained(source), COTSProcessor.from_pretrained(source)
    model.push_to_hub(repo_id, processor=processor)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.push_to_hub(repo_id, **options)
    assert not hasattr(processor, "auto_map") and not hasattr(processor.video_processor, "auto_map")


def test_a_processor_pushed_behind_its_model_still_names_its_code(hub, checkpoint, tmp_path):
    """As people push: `model.push_to_hub(name)`, then `processor.push_to_hub(name)`."""
    repo_id = hub.new_repo_id()
    hub.run(push_model_and_processor, checkpoint, repo_id, commit_message="other normalization")
    assert is_untouched(hub.run(read, repo_id, "README.md"))
    code = f"""
    from transformers import AutoProcessor, AutoVideoProcessor

    processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
    answer["mean"], answer["class"] = list(processor.image_processor.image_mean), type(processor).__name__
    answer["video class"] = type(AutoVideoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)).__name__
    """
    answer = run_without_package(code, tmp_path, hub)
    assert answer == {"mean": [0.1, 0.2, 0.3], "class": "COTSProcessor", "video class": "COTSVideoProcessor"}


# --- refusals


def test_saving_does_not_push_what_is_incomplete(tiny_config, tiny_processor, tmp_path):
    for model_class in (COTSModel, COTSForPreTraining):
        model = model_class(tiny_config)
        for arguments, options in (((), {"push_to_hub": True}), ((True, None, True), {})):
            with pytest.raises(ValueError, match=r"call model.push_to_hub\(repo_id, processor=processor\)"):
                model.save_pretrained(tmp_path / "model", *arguments, **options)
        model.save_pretrained(tmp_path / "saved", True, None, False)
    with pytest.raises(ValueError, match=r"Call processor.push_to_hub\(repo_id\)"):
        tiny_processor.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert not (tmp_path / "model").exists() and (tmp_path / "saved" / "model.safetensors").is_file()


def test_refuses_a_tag_that_exists_before_anything_is_sent(hub, folder):
    repo_id = hub.new_repo_id()
    first = hub.run(push, folder, repo_id, tag="v1")
    Path(folder, "requirements.txt").write_text("other")
    with pytest.raises(ClientError, match="^ValueError: .*has a tag 'v1' already"):
        hub.run(push, folder, repo_id, tag="v1")
    found = hub.run(facts, repo_id)
    assert found["sha"] == first and found["tags"] == {"v1": first}


def test_refuses_to_put_what_is_private_where_everybody_sees_it(hub, folder):
    repo_id = hub.new_repo_id()
    first = hub.run(push, folder, repo_id, private=False)
    Path(folder, "requirements.txt").write_text("other")
    with pytest.raises(ClientError, match="^ValueError: .*everybody sees it"):
        hub.run(push, folder, repo_id, private=True)
    assert hub.run(facts, repo_id)["sha"] == first


def test_refuses_an_impossible_name_and_a_model_without_a_processor(hub, folder, tiny_config, checkpoint):
    with pytest.raises(ClientError, match="^HFValidationError"):
        hub.run(push, folder, "no such/name/at all")
    with pytest.raises(ClientError, match=r"^ValueError: .*processor=processor"):
        hub.run(push_model_without_processor, hub.new_repo_id(), tiny_config.to_dict())
    Path(checkpoint, "processor_config.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(checkpoint, name).unlink()
    with pytest.raises(ClientError, match=r"^ValueError: There is no processor beside the model"):
        hub.run(push_model, "COTSModel", checkpoint, hub.new_repo_id())


@pytest.mark.parametrize("token", ["hf_wrong", READ_TOKEN])
def test_a_token_that_may_not_write_is_refused_in_plain_words(own_hub, folder, token):
    repo_id = own_hub.new_repo_id()
    for _ in range(2):  # without a repository, then with one
        with pytest.raises(ClientError, match=r"^HubPushError: .*did not let this account write.*HF_TOKEN") as error:
            own_hub.run(push_with, token, folder, repo_id)
        assert token not in str(error.value)
        own_hub.run(push, folder, repo_id)


# --- a network that fails


@pytest.mark.parametrize("during", ["PUT", "POST .*/commit/", "POST .*/preupload/", "POST /api/repos/create"])
def test_a_push_through_a_vanished_network_says_so_and_can_be_made_again(own_hub, folder, during):
    repo_id = own_hub.new_repo_id()
    network = own_hub.server.network
    network.vanish_after(50_000 if during == "PUT" else 10, during)
    with pytest.raises(ClientError, match=r"^HubPushError: .*did not get through.*Push again") as error:
        own_hub.run(impatiently, "push", folder, repo_id)
    assert network.is_down and own_hub.token not in str(error.value)

    network.come_back()
    network.requests.clear()
    commit = own_hub.run(push, folder, repo_id, tag="v1")
    found = own_hub.run(facts, repo_id)
    assert found["files"] == files_of(folder)
    assert found["sha"] == commit and found["tags"] == {"v1": commit} and found["num_commits"] == 2
    num_uploads = sum(request.method == "PUT" for request in network.requests)
    assert num_uploads == (0 if "commit" in during else 1)  # the weights, which had arrived in one of the cases


def test_a_tag_that_did_not_get_through_is_set_by_the_same_push(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    own_hub.server.network.vanish_after(0, "POST .*/tag/")
    with pytest.raises(ClientError, match="^HubPushError"):
        own_hub.run(impatiently, "push", folder, repo_id, tag="v1")
    own_hub.server.network.come_back()
    commit = own_hub.run(push, folder, repo_id, tag="v1")
    found = own_hub.run(facts, repo_id)
    assert found["tags"] == {"v1": commit} and found["num_commits"] == 2


def test_what_is_pushed_names_no_folder_of_the_machine(hub, folder, tmp_path):
    repo_id = hub.new_repo_id()
    hub.run(push_model, "COTSModel", folder, repo_id)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "README.md"):
        assert str(tmp_path) not in hub.run(read, repo_id, name)
    assert json.loads(hub.run(read, repo_id, "config.json"))["model_type"] == "cots"
