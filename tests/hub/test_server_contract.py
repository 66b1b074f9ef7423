"""What users do with a repository after the first push, which every hub has to answer in the same way.

Many revisions in one cache, tags and their headers, pull requests, deletions, reading offline: done by the real client
against the hub of `hub_fixtures.py`, so that the loopback server and any other hub are held to one list. Sharded and
proposed models are in tests/test_hub_push.py. Functions without a `test_` prefix run in the client's process.
"""

import hashlib
from pathlib import Path

import pytest
from forks import ClientError
from hub_server import READ_TOKEN, STRANGERS_TOKEN
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
    snapshot_download,
)

pytest_plugins = ["hub_fixtures"]

WEIGHTS = "model.safetensors"
SAME = {"same.txt": "in every version"}
# Version: what is in it. Weights are a large file, the others are in git.
VERSIONS = {
    "first": {**SAME, "config.json": "{}", WEIGHTS: "first weights", "old.txt": "old"},
    "second": {**SAME, "config.json": '{"a": 1}', WEIGHTS: "second weights"},
    "trial": {**SAME, "config.json": '{"a": 2}', WEIGHTS: "trial weights", "old.txt": "old"},
}


def add(files: dict[str, str]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content.encode()) for name, content in files.items()]


def publish(repo_id: str) -> dict[str, str]:
    """The first version under a tag, the second on main, the third on a branch of the first; their commits."""
    api = HfApi()
    api.create_repo(repo_id)
    first = api.create_commit(repo_id, add(VERSIONS["first"]), commit_message="first").oid
    api.create_tag(repo_id, tag="v1.0", tag_message="the first")
    api.create_branch(repo_id, branch="trial/one", revision="v1.0")
    operations = [*add(VERSIONS["second"]), CommitOperationDelete("old.txt")]
    second = api.create_commit(repo_id, operations, commit_message="second").oid
    trial = api.create_commit(repo_id, add(VERSIONS["trial"]), commit_message="trial", revision="trial/one").oid
    return {"first": first, "second": second, "trial": trial}


def names_of(commits: dict[str, str]) -> dict[str, str]:
    """Every name of a revision, and the version that it names."""
    return {"main": "second", "v1.0": "first", "trial/one": "trial", **{id: name for name, id in commits.items()}}


def pull(repo_id: str, revisions: list[str], **kwargs) -> dict[str, list]:
    """Of each revision, the name of its folder in the cache, and its files."""
    pulled = {}
    for revision in revisions:
        root = Path(snapshot_download(repo_id, revision=revision, **kwargs))
        files = {p.name: p.read_text() for p in root.iterdir() if p.name != ".gitattributes"}
        pulled[revision] = [root.name, files]
    return pulled


def cached(repo_id: str) -> dict:
    [repo] = [repo for repo in scan_cache_dir().repos if repo.repo_id == repo_id]
    blobs = {str(file.blob_path) for revision in repo.revisions for file in revision.files}
    return {"refs": {name: r.commit_hash for name, r in repo.refs.items()}, "num_blobs": len(blobs)}


def headers(repo_id: str, revisions: list[str], name: str) -> dict[str, list]:
    found = {r: get_hf_file_metadata(hf_hub_url(repo_id, name, revision=r)) for r in revisions}
    return {revision: [file.commit_hash, file.etag, file.size] for revision, file in found.items()}


def read(repo_id: str, name: str, **kwargs) -> str:
    return Path(hf_hub_download(repo_id, name, **kwargs)).read_text()


def infos(repo_id: str, revisions: list[str]) -> dict[str, list]:
    found = {}
    for revision in revisions:
        info = HfApi().repo_info(repo_id, revision=revision, files_metadata=True)
        sizes = {s.rfilename: s.size for s in info.siblings if s.rfilename != ".gitattributes"}
        listed = set(HfApi().list_repo_files(repo_id, revision=revision)) - {".gitattributes"}
        found[revision] = [info.sha, sizes, sorted(listed)]
    return found


# --- revisions


def test_many_revisions_in_one_cache_keep_their_own_files(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    names = names_of(commits)
    pulled = hub.run(pull, repo_id, list(names))
    assert pulled == {revision: [commits[version], VERSIONS[version]] for revision, version in names.items()}
    cache = hub.run(cached, repo_id)
    assert cache["refs"] == {r: commits[v] for r, v in names.items() if r not in commits.values()}
    contents = {content for files in VERSIONS.values() for content in files.values()}
    assert cache["num_blobs"] == len(contents) + 1  # .gitattributes; a content of several versions is stored once


def test_headers_and_listings_are_those_of_the_revision(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    names = names_of(commits)
    for file in (WEIGHTS, "config.json", "same.txt"):
        for revision, answer in hub.run(headers, repo_id, list(names), file).items():
            content = VERSIONS[names[revision]][file].encode()
            of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            etag = hashlib.sha256(content).hexdigest() if file == WEIGHTS else of_git
            assert answer == [commits[names[revision]], etag, len(content)], (revision, file)
    for revision, (sha, sizes, listed) in hub.run(infos, repo_id, list(names)).items():
        files = VERSIONS[names[revision]]
        assert (sha, sizes) == (commits[names[revision]], {name: len(content) for name, content in files.items()})
        assert listed == sorted(files)


def move_tag(repo_id: str, revision: str) -> list[str]:
    before = read(repo_id, WEIGHTS, revision="v1.0")
    HfApi().delete_tag(repo_id, tag="v1.0")
    HfApi().create_tag(repo_id, tag="v1.0", revision=revision)
    return [before, read(repo_id, WEIGHTS, revision="v1.0")]


def test_a_moved_tag_gives_its_new_files_and_its_new_commit(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    assert hub.run(move_tag, repo_id, "trial/one") == ["first weights", "trial weights"]
    assert hub.run(headers, repo_id, ["v1.0"], WEIGHTS)["v1.0"][0] == commits["trial"]


def commit_on(repo_id: str, revision: str, content: str = "1", **kwargs) -> str:
    operations = add({"config.json": content})
    return HfApi().create_commit(repo_id, operations, commit_message="c", revision=revision, **kwargs).oid


def make_branch(repo_id: str, branch: str) -> None:
    HfApi().create_branch(repo_id, branch=branch)


def drop_branch(repo_id: str, branch: str) -> None:
    HfApi().delete_branch(repo_id, branch=branch)


def download_blindly(repo_id: str, revision: str) -> str:
    return read(repo_id, WEIGHTS, revision=revision)


def test_a_missing_revision_is_refused_by_every_call(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    for revision in ("v2.0", "refs/pr/1", "0" * 40):
        calls = [(pull, [[revision]]), (infos, [[revision]]), (headers, [[revision], WEIGHTS])]
        for call, arguments in [*calls, (download_blindly, [revision]), (commit_on, [revision])]:
            with pytest.raises(ClientError, match="^RevisionNotFoundError"):
                hub.run(call, repo_id, *arguments)
    with pytest.raises(ClientError, match="^(RevisionNotFoundError|BadRequestError|HfHubHTTPError)"):
        hub.run(commit_on, repo_id, "v1.0")  # a tag stays where it is
    with pytest.raises(ClientError, match="^BadRequestError"):
        hub.run(make_branch, repo_id, "refs/pr/1")
    with pytest.raises(ClientError, match="^HfHubHTTPError"):
        hub.run(drop_branch, repo_id, "main")
    hub.run(drop_branch, repo_id, "trial/one")
    with pytest.raises(ClientError, match="412"):
        hub.run(commit_on, repo_id, "main", parent_commit=commits["first"][:7])
    hub.run(commit_on, repo_id, "main", parent_commit=commits["second"][:7])


# --- overwriting and deleting


def change(repo_id: str) -> dict[str, list[str]]:
    """Overwrite, copy, delete a file, and delete a folder, each in a commit; what is there after each."""
    api = HfApi()
    after = {}

    def note(step: str) -> None:
        after[step] = sorted(set(api.list_repo_files(repo_id)) - {".gitattributes"})

    api.upload_file(path_or_fileobj=b"new", path_in_repo=WEIGHTS, repo_id=repo_id)
    api.upload_file(path_or_fileobj=b"b", path_in_repo="folder/b.txt", repo_id=repo_id)
    note("added")
    copies = [CommitOperationCopy(WEIGHTS, f"folder/{WEIGHTS}"), CommitOperationCopy("same.txt", "copy.txt")]
    api.create_commit(repo_id, copies, commit_message="copy")
    note("copied")
    api.delete_file("same.txt", repo_id)
    note("deleted")
    after["contents"] = [read(repo_id, WEIGHTS), read(repo_id, f"folder/{WEIGHTS}"), read(repo_id, "copy.txt")]
    api.delete_folder("folder", repo_id)
    note("folder deleted")
    return after


def test_what_is_overwritten_or_deleted_stays_in_its_revisions(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    after = hub.run(change, repo_id)
    rest = ["config.json", WEIGHTS]
    assert after["added"] == sorted([*rest, "same.txt", "folder/b.txt"])
    assert after["copied"] == sorted([*after["added"], "copy.txt", f"folder/{WEIGHTS}"])
    assert set(after["copied"]) - set(after["deleted"]) == {"same.txt"}
    assert after["contents"] == ["new", "new", SAME["same.txt"]]
    assert after["folder deleted"] == sorted([*rest, "copy.txt"])
    assert sorted(hub.run(pull, repo_id, ["main"])["main"][1]) == after["folder deleted"]
    with pytest.raises(ClientError, match="^RemoteEntryNotFoundError"):
        hub.run(read, repo_id, "same.txt")
    assert hub.run(pull, repo_id, [commits["second"]])[commits["second"]][1] == VERSIONS["second"]


# --- pull requests


def propose(repo_id: str, files: dict[str, str], title: str = "Better", **kwargs) -> list:
    info = HfApi().create_commit(repo_id, add(files), commit_message=title, create_pr=True, **kwargs)
    return [info.pr_num, info.pr_revision, info.oid, info.pr_url]


def discussions(repo_id: str, **kwargs) -> list[list]:
    found = HfApi().get_repo_discussions(repo_id, **kwargs)
    return [[d.num, d.title, d.status, d.author, d.git_reference, d.repo_id] for d in found]


def details(repo_id: str, num: int) -> dict:
    found = HfApi().get_discussion_details(repo_id, num)
    commits = [event.oid for event in found.events if event.type == "commit"]
    facts = {"status": found.status, "base": found.target_branch, "conflicts": found.conflicting_files}
    return {**facts, "commits": commits, "merge_commit": found.merge_commit_oid}


def references(repo_id: str) -> dict[str, str]:
    refs = HfApi().list_repo_refs(repo_id, include_pull_requests=True)
    return {ref.ref: ref.target_commit for ref in [*refs.branches, *refs.tags, *refs.pull_requests]}


def merge(repo_id: str, num: int) -> None:
    HfApi().merge_pull_request(repo_id, num)


def set_status(repo_id: str, num: int, status: str) -> str:
    return HfApi().change_discussion_status(repo_id, num, status).new_status


def open_draft(repo_id: str) -> list:
    pull_request = HfApi().create_pull_request(repo_id, title="Later", description="words")
    return [pull_request.num, pull_request.status, pull_request.events[0].content]


def test_a_pull_request_is_a_revision_until_it_is_merged(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    num, revision, proposed, url = hub.run(propose, repo_id, {WEIGHTS: "better", "new.txt": "new"})
    assert (num, revision, url) == (1, "refs/pr/1", f"{hub.url}/{repo_id}/discussions/1")
    files = {**VERSIONS["second"], WEIGHTS: "better", "new.txt": "new"}
    expected = {"main": [commits["second"], VERSIONS["second"]], revision: [proposed, files]}
    assert hub.run(pull, repo_id, ["main", revision]) == expected
    assert hub.run(headers, repo_id, [revision], WEIGHTS)[revision][0] == proposed

    again = hub.run(commit_on, repo_id, revision, "better")
    assert hub.run(references, repo_id)[revision] == again
    assert hub.run(discussions, repo_id) == [[1, "Better", "open", hub.user, revision, repo_id]]
    found = hub.run(details, repo_id, 1)
    assert (found["status"], found["commits"]) == ("open", [proposed, again])
    hub.run(merge, repo_id, 1)
    found, refs = hub.run(details, repo_id, 1), hub.run(references, repo_id)
    assert found["status"] == "merged" and found["merge_commit"] == refs["refs/heads/main"]
    merged = hub.run(pull, repo_id, ["main", "v1.0", revision])
    assert merged["main"] == [refs["refs/heads/main"], {**files, "config.json": "better"}]
    assert merged["v1.0"][1] == VERSIONS["first"] and merged[revision][1] == merged["main"][1]


def test_pull_requests_that_conflict_are_closed_or_are_drafts(hub):
    repo_id = hub.new_repo_id()
    commits = hub.run(publish, repo_id)
    hub.run(propose, repo_id, {WEIGHTS: "better"})
    hub.run(propose, repo_id, {"config.json": "older"}, "Older", parent_commit=commits["first"])
    assert hub.run(open_draft, repo_id) == [3, "draft", "words"]
    assert hub.run(pull, repo_id, ["refs/pr/2"])["refs/pr/2"][1] == {**VERSIONS["first"], "config.json": "older"}
    found = hub.run(details, repo_id, 2)
    assert found["conflicts"] == ["config.json"] and found["base"] == "main"
    for num in (2, 3):
        with pytest.raises(ClientError, match="^(HfHubHTTPError|BadRequestError)"):
            hub.run(merge, repo_id, num)
    assert hub.run(set_status, repo_id, 1, "closed") == "closed"
    assert hub.run(set_status, repo_id, 3, "open") == "open"
    assert [d[0] for d in hub.run(discussions, repo_id, discussion_status="open")] == [3, 2]
    assert [d[0] for d in hub.run(discussions, repo_id, discussion_status="closed")] == [1]
    assert hub.run(discussions, repo_id, discussion_type="discussion") == []
    assert hub.run(references, repo_id)["refs/heads/main"] == commits["second"]
    with pytest.raises(ClientError, match="404"):
        hub.run(details, repo_id, 4)


def test_whoever_may_read_may_propose_and_only_the_owner_merges(own_hub):
    repo_id, stranger = own_hub.new_repo_id(), {"token": STRANGERS_TOKEN}
    own_hub.run(publish, repo_id)
    own_hub.run(propose, repo_id, {WEIGHTS: "a stranger's"}, **stranger)
    own_hub.run(commit_on, repo_id, "refs/pr/1", **stranger)
    for call, arguments, options in [
        (merge, [1], stranger),
        (commit_on, ["main"], stranger),
        (propose, [{"a": "b"}], {"token": READ_TOKEN}),
        (commit_on, ["refs/pr/1"], {"token": READ_TOKEN}),
    ]:
        with pytest.raises(ClientError, match=r"^HfHubHTTPError[\s\S]*403"):
            own_hub.run(call, repo_id, *arguments, **options)
    assert own_hub.run(discussions, repo_id, author="stranger", token=None)[0][3] == "stranger"
    assert own_hub.run(discussions, repo_id, author=own_hub.user) == []
    own_hub.run(merge, repo_id, 1)
    assert own_hub.run(read, repo_id, WEIGHTS, token=None) == "a stranger's"


# --- private, and offline


def make_private(repo_id: str) -> None:
    HfApi().update_repo_settings(repo_id, private=True)


def read_with(access: str, repo_id: str, revision: str) -> str:
    return read(repo_id, WEIGHTS, revision=revision, token=access)


def test_a_private_repository_gives_every_revision_to_its_token_alone(own_hub):
    repo_id = own_hub.new_repo_id()
    names = names_of(own_hub.run(publish, repo_id))
    own_hub.run(propose, repo_id, {WEIGHTS: "better"})
    own_hub.run(make_private, repo_id)
    for revision in (*names, "refs/pr/1"):
        with pytest.raises(ClientError, match="^RepositoryNotFoundError"):
            own_hub.run(download_blindly, repo_id, revision, token=None)
    for call, arguments in [(propose, [{"a": "b"}]), (details, [1]), (merge, [1])]:
        with pytest.raises(ClientError, match="^(RepositoryNotFoundError|HfHubHTTPError|RevisionNotFoundError)"):
            own_hub.run(call, repo_id, *arguments, token=STRANGERS_TOKEN)
    found = [own_hub.run(read_with, READ_TOKEN, repo_id, r, token=None) for r in ("v1.0", "refs/pr/1")]
    assert found == ["first weights", "better"]


def test_what_was_pulled_is_read_without_a_network_and_nothing_else_is(own_hub):
    repo_id = own_hub.new_repo_id()
    own_hub.run(publish, repo_id)
    own_hub.run(propose, repo_id, {WEIGHTS: "better"})
    revisions = ["main", "v1.0", "refs/pr/1"]
    before = own_hub.run(pull, repo_id, revisions)
    own_hub.server.network.requests.clear()
    own_hub.server.network.go_down()
    assert own_hub.run(pull, repo_id, revisions, local_files_only=True) == before
    assert own_hub.run(pull, repo_id, revisions) == before
    assert own_hub.run(download_blindly, repo_id, "v1.0") == "first weights"
    with pytest.raises(ClientError, match="^LocalEntryNotFoundError"):
        own_hub.run(pull, repo_id, ["trial/one"])
    assert own_hub.server.network.requests == []
