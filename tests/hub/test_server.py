"""The loopback hub, driven by the real huggingface_hub client: what a push and a pull may rely on.

Functions without a `test_` prefix run in the client's process. Those that meet a broken network do not wait between
the client's attempts (`impatiently`): on the loopback there is nothing to wait for.
"""

import inspect
import re
import time
from pathlib import Path

import pytest
from forks import ClientError
from hub_client import HubForTests
from hub_server import READ_TOKEN, STRANGERS_TOKEN
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, hf_hub_download

pytest_plugins = ["hub_fixtures"]

WEIGHTS = bytes(range(256)) * 2000  # half a megabyte, in pieces on the wire
CARD = "---\npipeline_tag: zero-shot-image-classification\nlibrary_name: transformers\n---\n# A model\n"
FILES = {
    "README.md": CARD.encode(),
    "config.json": b'{"projection_dim": 256}',
    "model.safetensors": WEIGHTS,
    "images/red circle.png": b"\x89PNG\0 not really",
    "onnx/model.onnx": b"small, but large files by name",
}
# What the client raises depends on where in its request the connection broke.
NETWORK_ERRORS = "^(RuntimeError: Error while uploading|ConnectError|ReadError|WriteError|RemoteProtocolError)"


@pytest.fixture
def folder(tmp_path) -> str:
    """A model repository to push: regular files, and large ones by name and by content."""
    for name, content in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(tmp_path / "model")


def push(folder: str, repo_id: str, **kwargs) -> str:
    HfApi().create_repo(repo_id, exist_ok=True)
    return HfApi().upload_folder(folder_path=folder, repo_id=repo_id, **kwargs).oid


def commit(repo_id: str, files: dict[str, str], **kwargs) -> str:
    operations = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    return HfApi().create_commit(repo_id, operations, commit_message="files", **kwargs).oid


def pull(repo_id: str, **kwargs) -> dict[str, str]:
    """Names and contents (in Latin 1, as JSON holds no bytes) of a snapshot."""
    root = Path(HfApi().snapshot_download(repo_id, **kwargs))
    return {str(p.relative_to(root)): p.read_bytes().decode("latin-1") for p in root.rglob("*") if p.is_file()}


def impatiently(name: str, *args, **kwargs):
    time.sleep = lambda seconds: None
    return globals()[name](*args, **kwargs)


def contents(files: dict[str, bytes]) -> dict[str, str]:
    return {name: content.decode("latin-1") for name, content in files.items()}


def without_attributes(files: dict[str, str]) -> dict[str, str]:
    """Every repository begins with a `.gitattributes`, on the Hub as here."""
    assert ".gitattributes" in files
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def create(repo_id: str, **kwargs) -> str:
    return HfApi().create_repo(repo_id, **kwargs).repo_id


def info(repo_id: str, **kwargs) -> dict:
    model = HfApi().model_info(repo_id, **kwargs)
    siblings = [sibling.rfilename for sibling in model.siblings]
    return {"sha": model.sha, "private": model.private, "pipeline_tag": model.pipeline_tag, "siblings": siblings}


def test_a_repository_is_created_once(hub):
    repo_id = hub.new_repo_id()
    assert hub.run(create, repo_id, private=True) == repo_id
    assert hub.run(info, repo_id)["private"] is True
    with pytest.raises(ClientError, match="^HfHubHTTPError.*409"):
        hub.run(create, repo_id)
    assert hub.run(create, repo_id, exist_ok=True) == repo_id
    assert hub.run(info, repo_id)["private"] is True  # as it was


def test_what_is_pushed_comes_back(hub, folder):
    repo_id = hub.new_repo_id()
    commit_id = hub.run(push, folder, repo_id)
    assert without_attributes(hub.run(pull, repo_id)) == contents(FILES)
    model = hub.run(info, repo_id)
    assert model["sha"] == commit_id and model["private"] is False
    assert model["pipeline_tag"] == "zero-shot-image-classification"
    assert sorted(model["siblings"]) == sorted([*FILES, ".gitattributes"])


def tree(repo_id: str, *path: str) -> dict[str, list]:
    entries = HfApi().list_repo_tree(repo_id, *path, recursive=not path)
    return {e.path: [e.size, e.lfs.sha256 if e.lfs else None] for e in entries if hasattr(e, "size")}


def test_large_files_are_stored_as_such(hub, folder):
    repo_id = hub.new_repo_id()
    hub.run(push, folder, repo_id)
    files = hub.run(tree, repo_id)
    assert {name: size for name, (size, _) in files.items() if name in FILES} == {n: len(c) for n, c in FILES.items()}
    large = {name for name, (_, oid) in files.items() if oid is not None}
    assert large == {"model.safetensors", "images/red circle.png", "onnx/model.onnx"}
    assert set(hub.run(tree, repo_id, "onnx")) == {"onnx/model.onnx"}


def test_the_storage_never_sees_a_token(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    own_hub.run(push, folder, repo_id)
    own_hub.run(pull, repo_id)
    storage = own_hub.server.storage_url.removeprefix("http://")
    requests = own_hub.server.network.requests
    at_storage = [request for request in requests if request.headers["host"] == storage]
    assert {request.method for request in at_storage} == {"GET", "PUT"}
    assert not any("authorization" in request.headers for request in at_storage)
    assert all("authorization" in request.headers for request in requests if request not in at_storage)


def push_twice(folder: str, repo_id: str) -> list[str]:
    return [push(folder, repo_id), push(folder, repo_id)]


def test_pushing_the_same_again_makes_no_commit_and_pulling_it_again_loads_nothing(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    first, second = own_hub.run(push_twice, folder, repo_id)
    assert first == second
    own_hub.run(pull, repo_id)
    own_hub.server.network.requests.clear()
    assert without_attributes(own_hub.run(pull, repo_id)) == contents(FILES)
    assert not any("/resolve/" in request.path for request in own_hub.server.network.requests)


def publish_two_versions(repo_id: str) -> list[str]:
    api = HfApi()
    api.create_repo(repo_id)
    first = commit(repo_id, {"config.json": "1", "old.txt": "old"})
    api.create_tag(repo_id, tag="v1.0", tag_message="the first")
    api.create_branch(repo_id, branch="next/try")
    operations = [CommitOperationAdd("config.json", b"2"), CommitOperationDelete("old.txt")]
    second = api.create_commit(repo_id, operations, commit_message="second").oid
    commit(repo_id, {"config.json": "3"}, revision="next/try")
    return [first, second]


def refs(repo_id: str) -> dict[str, dict[str, str]]:
    refs = HfApi().list_repo_refs(repo_id)
    return {
        "branches": {ref.name: ref.target_commit for ref in refs.branches},
        "tags": {ref.name: ref.target_commit for ref in refs.tags},
    }


def download(repo_id: str, filename: str, **kwargs) -> str:
    return Path(hf_hub_download(repo_id, filename, **kwargs)).read_bytes().decode("latin-1")


def history(repo_id: str, **kwargs) -> list[str]:
    return [commit.commit_id for commit in HfApi().list_repo_commits(repo_id, **kwargs)]


def test_revisions_by_branch_tag_and_hash(hub):
    repo_id = hub.new_repo_id()
    first, second = hub.run(publish_two_versions, repo_id)
    assert hub.run(refs, repo_id)["tags"] == {"v1.0": first}
    assert set(hub.run(refs, repo_id)["branches"]) == {"main", "next/try"}
    for revision, expected in {"main": "2", second: "2", "v1.0": "1", first: "1", "next/try": "3"}.items():
        assert hub.run(download, repo_id, "config.json", revision=revision) == expected
    assert without_attributes(hub.run(pull, repo_id, revision="v1.0")) == {"config.json": "1", "old.txt": "old"}
    assert without_attributes(hub.run(pull, repo_id)) == {"config.json": "2"}
    assert hub.run(history, repo_id)[:2] == [second, first]


def tag_again(repo_id: str, **kwargs) -> None:
    HfApi().create_tag(repo_id, tag="v1.0", **kwargs)


def test_what_is_not_there(hub):
    repo_id = hub.new_repo_id()
    with pytest.raises(ClientError, match="^RepositoryNotFoundError"):
        hub.run(download, repo_id, "config.json")
    hub.run(publish_two_versions, repo_id)
    with pytest.raises(ClientError, match="^RevisionNotFoundError"):
        hub.run(download, repo_id, "config.json", revision="v2.0")
    with pytest.raises(ClientError, match="^RemoteEntryNotFoundError"):
        hub.run(download, repo_id, "model.safetensors")
    with pytest.raises(ClientError, match="^HfHubHTTPError.*409"):
        hub.run(tag_again, repo_id)
    hub.run(tag_again, repo_id, exist_ok=True)


def write_card(repo_id: str) -> str:
    ModelCard(CARD).push_to_hub(repo_id)
    return ModelCard.load(repo_id).content


@pytest.mark.skipif(
    "https://huggingface.co" in inspect.getsource(ModelCard.validate),
    reason="this huggingface-hub lets huggingface.co check a card, whatever HF_ENDPOINT says",
)
def test_a_card_is_pushed_and_read(hub):
    repo_id = hub.new_repo_id()
    hub.run(create, repo_id)
    assert hub.run(write_card, repo_id) == CARD


def whoami() -> str:
    return HfApi().whoami()["name"]


def test_tokens(own_hub):
    repo_id = own_hub.new_repo_id()
    own_hub.run(create, repo_id)
    assert own_hub.run(whoami, token=READ_TOKEN) == own_hub.user
    with pytest.raises(ClientError, match="Invalid user token"):
        own_hub.run(whoami, token="hf_wrong")
    with pytest.raises(ClientError, match="^HfHubHTTPError.*401"):  # although anybody may read it without a token
        own_hub.run(pull, repo_id, token="hf_wrong")
    for token, status in [(READ_TOKEN, 403), (STRANGERS_TOKEN, 403), ("hf_wrong", 401), (None, 401)]:
        with pytest.raises(ClientError, match=rf"^HfHubHTTPError[\s\S]*{status}"):
            own_hub.run(commit, repo_id, {"config.json": "1"}, token=token)
    assert set(own_hub.run(pull, repo_id, token=None)) == {".gitattributes"}


def test_a_private_repository_looks_missing_to_others(own_hub):
    repo_id = own_hub.new_repo_id()
    own_hub.run(create, repo_id, private=True)
    own_hub.run(commit, repo_id, {"config.json": "secret"})
    assert own_hub.run(download, repo_id, "config.json", token=READ_TOKEN) == "secret"
    for function, arguments in [(pull, []), (info, []), (download, [".gitattributes"]), (commit, [{"a": "b"}])]:
        for token in (None, STRANGERS_TOKEN):
            messages = []
            for id in (repo_id, own_hub.new_repo_id()):
                with pytest.raises(ClientError, match="^RepositoryNotFoundError") as error:
                    own_hub.run(function, id, *arguments, token=token)
                text = re.sub(r"(tester/test-|Root=|Request ID: |Trace ID: )[\w-]+", "", str(error.value))
                messages.append(text)
            assert messages[0] == messages[1]


@pytest.mark.parametrize("during", ["PUT", "POST .*/commit/", "POST .*/preupload/"])
def test_a_push_through_a_vanished_network_leaves_nothing_half_and_can_be_repeated(own_hub, folder, during):
    repo_id = own_hub.new_repo_id()
    own_hub.run(create, repo_id)
    before = own_hub.run(commit, repo_id, {"config.json": "before"})
    own_hub.server.network.vanish_after(len(WEIGHTS) // 2 if during == "PUT" else 100, during)
    with pytest.raises(ClientError, match=NETWORK_ERRORS):
        own_hub.run(impatiently, "push", folder, repo_id)
    assert own_hub.server.network.is_down
    with pytest.raises(ClientError, match="^LocalEntryNotFoundError"):
        own_hub.run(impatiently, "pull", repo_id)

    own_hub.server.network.come_back()
    assert own_hub.run(refs, repo_id)["branches"] == {"main": before}
    assert without_attributes(own_hub.run(pull, repo_id)) == {"config.json": "before"}
    after = own_hub.run(push, folder, repo_id)
    assert own_hub.run(history, repo_id)[:2] == [after, before]
    assert without_attributes(own_hub.run(pull, repo_id)) == contents(FILES)


def test_the_client_survives_a_hiccup_in_an_upload_by_itself(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    own_hub.server.network.hiccup_after(len(WEIGHTS) // 2, "PUT")
    own_hub.run(impatiently, "push", folder, repo_id)
    assert without_attributes(own_hub.run(pull, repo_id)) == contents(FILES)
    num_large = sum(oid is not None for _, oid in own_hub.run(tree, repo_id).values())
    uploads = [request for request in own_hub.server.network.requests if request.method == "PUT"]
    assert len(uploads) == num_large + 1


def test_a_commit_whose_answer_is_lost_is_not_made_twice(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    own_hub.server.network.lose_answer("POST .*/commit/")
    with pytest.raises(ClientError, match="^RemoteProtocolError"):
        own_hub.run(impatiently, "push", folder, repo_id)
    commit_id = own_hub.run(push, folder, repo_id)
    assert own_hub.run(history, repo_id)[0] == commit_id
    assert len(own_hub.run(history, repo_id)) == 2  # the first, of .gitattributes, and one push


def download_in_pieces(*args) -> str:
    constants.DOWNLOAD_CHUNK_SIZE = 10_000  # what it goes on from; usually 10 MiB
    return impatiently("download", *args)


def test_a_broken_download_goes_on_where_it_stopped(own_hub, folder):
    repo_id = own_hub.new_repo_id()
    own_hub.run(push, folder, repo_id)
    own_hub.server.network.requests.clear()
    own_hub.server.network.hiccup_after(100_000, "GET /[^/]+$")
    assert own_hub.run(download_in_pieces, repo_id, "model.safetensors") == WEIGHTS.decode("latin-1")
    ranges = [request.headers.get("range") for request in own_hub.server.network.requests if request.method == "GET"]
    assert ranges == [None, "bytes=100000-"]


def test_of_concurrent_commits_on_one_parent_exactly_one_is_made(hub):
    repo_id = hub.new_repo_id()
    hub.run(create, repo_id)
    parent = hub.run(commit, repo_id, {"config.json": "0"})
    clients = {
        name: hub.start(commit, repo_id, {name: name, "config.json": name}, parent_commit=parent) for name in "abc"
    }
    made = {}
    for name, client in clients.items():
        try:
            made[name] = client.result()
        except ClientError as error:
            assert "412" in str(error) and "A commit has happened since" in str(error)
    [(winner, commit_id)] = made.items()
    assert hub.run(history, repo_id)[:2] == [commit_id, parent]
    assert without_attributes(hub.run(pull, repo_id)) == {winner: winner, "config.json": winner}


def push_configs(repo_id: str) -> list[int]:
    from transformers import AutoConfig, BertConfig  # here, as only one client needs it

    BertConfig(hidden_size=7).push_to_hub(repo_id, private=True)
    HfApi().create_tag(repo_id, tag="seven")
    BertConfig(hidden_size=8).push_to_hub(repo_id)
    revisions = ({}, {"revision": "seven"})
    return [AutoConfig.from_pretrained(repo_id, **revision).hidden_size for revision in revisions]


def test_transformers_pushes_and_pulls_through_the_environment(hub):
    assert hub.run(push_configs, hub.new_repo_id()) == [8, 7]


def test_the_tests_environment_does_not_reach_the_client(own_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    environment = own_hub.environment(token=None)
    assert not {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"} & set(environment)
    assert environment["HF_ENDPOINT"] == own_hub.url


def test_any_other_server_with_an_account_will_do(own_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    other = HubForTests(own_hub.url, own_hub.token, tmp_path)
    repo_id = other.new_repo_id()
    assert repo_id.startswith(f"{own_hub.user}/")
    other.run(create, repo_id)
    assert repo_id in own_hub.server.hub.repositories
    other.reset_()
    assert repo_id not in own_hub.server.hub.repositories
    other.close()
