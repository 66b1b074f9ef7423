"""What a model hub keeps: accounts, repositories, commits, large objects. No HTTP here; `hub_server.py` speaks that.

A repository is a chain of immutable snapshots; a commit is built completely and then put in place under a lock, so
that nobody can see half of one. A pull request is a chain of its own, `refs/pr/NUM`, until it is merged. Errors carry
the status and the `X-Error-Code` by which huggingface_hub knows them.
"""

import base64
import fnmatch
import hashlib
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath

LFS_SUFFIXES = "arrow bin gz h5 msgpack npy npz onnx parquet pt safetensors tar zip".split()
GIT_ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
MAX_REGULAR_BYTES = 10 * 2**20


class HubError(Exception):
    """A request that the hub refuses: HTTP status, `X-Error-Code` (empty if none) and message."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Account:
    """Who a token speaks for, and whether it may write."""

    user: str
    can_write: bool


@dataclass(frozen=True)
class File:
    """A file of a snapshot: its content stands in git, or, if it has an `lfs_oid`, among the large objects."""

    size: int
    blob_id: str
    lfs_oid: str | None = None

    @property
    def etag(self) -> str:
        return self.lfs_oid or self.blob_id

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.lfs_oid, self.size))


def lfs_pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class Commit:
    """One immutable snapshot."""

    parent: str | None
    title: str
    description: str
    files: dict[str, File]
    date: str = field(default_factory=now)

    @property
    def id(self) -> str:
        listing = [(path, file.blob_id) for path, file in sorted(self.files.items())]
        return hashlib.sha1(repr((self.parent, self.title, self.date, listing)).encode()).hexdigest()


@dataclass
class PullRequest:
    """Changes to `main` that somebody proposes: the snapshots after `base` up to the one that `ref` names."""

    num: int
    title: str
    description: str
    author: str
    base: str
    status: str  # "draft", "open", "closed" or "merged"
    merge_commit: str | None = None
    date: str = field(default_factory=now)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Repository:
    """Branches, tags and pull requests over the snapshots of a model. Begins with one commit of a `.gitattributes`."""

    def __init__(self, id: str, private: bool = False):
        self.id = id
        self.private = private
        self.sdk: str | None = None  # of a Space
        self.blobs: dict[str, bytes] = {}  # git's SHA-1 -> content
        self.objects: dict[str, bytes] = {}  # SHA-256 -> content of a large file
        self.commits: dict[str, Commit] = {}
        self.tags: dict[str, str] = {}
        self.proposed: dict[str, str] = {}  # the newest snapshot of each pull request, by its reference
        self.pull_requests: dict[str, PullRequest] = {}
        self._lock = threading.Lock()
        first = Commit(None, "initial commit", "", {".gitattributes": self._store(GIT_ATTRIBUTES)})
        self.commits[first.id] = first
        self.branches: dict[str, str] = {"main": first.id}

    def _store(self, content: bytes) -> File:
        blob_id = git_blob_id(content)
        self.blobs[blob_id] = content
        return File(len(content), blob_id)

    def resolve(self, revision: str) -> Commit:
        """The snapshot that a branch, a tag, a pull request or a full commit hash names."""
        named = self.proposed | self.tags | self.branches
        commit_id = named.get(revision, revision)
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        return commit, commit.files[path]

    def content(self, file: File) -> bytes:
        return self.blobs[file.blob_id] if file.lfs_oid is None else self.objects[file.lfs_oid]

    def upload_mode(self, revision: str, path: str, size: int, sample: bytes) -> str:
        """How a file is to come: as "lfs" if `.gitattributes` says so, and if large or binary; else "regular"."""
        _, attributes = self.file(revision, ".gitattributes")
        lines = [line.split() for line in self.content(attributes).decode().splitlines()]
        patterns = [words[0] for words in lines if "filter=lfs" in words]
        name = PurePosixPath(path).name
        is_large = size > MAX_REGULAR_BYTES or b"\0" in sample or any(fnmatch.fnmatch(name, p) for p in patterns)
        return "lfs" if is_large else "regular"

    def commit(self, revision: str, header: dict, operations: list[dict]) -> Commit:
        """Put a snapshot on top of a branch or a pull request, whole or not at all.

        Raises [`HubError`] 412 when it has moved on from `header["parentCommit"]`, of which the first characters are
        enough; 400 for a large file whose content never came, 404 for an unknown branch and for deleting what is not
        there.
        """
        with self._lock:
            refs = self.proposed if revision in self.proposed else self.branches
            if revision not in refs:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = refs[revision]
            if not head.startswith(header.get("parentCommit") or ""):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            commit = self._build(head, header, operations)
            refs[revision] = commit.id
            return commit

    def _build(self, parent: str, header: dict, operations: list[dict]) -> Commit:
        files = dict(self.commits[parent].files)
        for operation in operations:
            self._apply_(files, operation["key"], operation["value"])
        return self._add(Commit(parent, header["summary"], header.get("description", ""), files))

    def _add(self, commit: Commit) -> Commit:
        self.commits[commit.id] = commit
        return commit

    def open_pull_request(self, author: str, header: dict, operations: list[dict]) -> PullRequest:
        """Propose a commit on `main` or on `header["parentCommit"]`; a draft without changes if it does nothing.

        Raises [`HubError`] as [`commit`] does.
        """
        with self._lock:
            start = header.get("parentCommit") or self.branches["main"]
            base = next((id for id in self.commits if id.startswith(start)), None)
            if base is None:
                raise HubError(404, f"Invalid rev id: {start}", "RevisionNotFound")
            head = self._build(base, header, operations).id if operations else base
            num = len(self.pull_requests) + 1
            text = header["summary"], header.get("description", "")
            pull_request = PullRequest(num, *text, author, base, "open" if operations else "draft")
            self.pull_requests[pull_request.ref] = pull_request
            self.proposed[pull_request.ref] = head
            return pull_request

    def changes(self, pull_request: PullRequest) -> dict[str, File | None]:
        """The files that a pull request adds or replaces; `None` for those that it deletes."""
        before, after = self.commits[pull_request.base].files, self.resolve(pull_request.ref).files
        return {path: after.get(path) for path in before | after if before.get(path) != after.get(path)}

    def conflicts(self, pull_request: PullRequest) -> list[str]:
        """The files that `main` has changed in another way since a pull request began."""
        before, now = self.commits[pull_request.base].files, self.resolve("main").files
        changes = self.changes(pull_request)
        return sorted(path for path in changes if now.get(path) not in (before.get(path), changes[path]))

    def merge(self, pull_request: PullRequest) -> Commit:
        """Put the changes of a pull request on top of `main`, as one snapshot.

        Raises [`HubError`] 400 for one that is not open, 409 where `main` has changed the same files.
        """
        with self._lock:
            if pull_request.status != "open":
                raise HubError(400, f"This pull request is {pull_request.status}: it cannot be merged.")
            if conflicts := self.conflicts(pull_request):
                raise HubError(409, f"This pull request has conflicts: {', '.join(conflicts)}")
            head = self.branches["main"]
            merged = self.commits[head].files | self.changes(pull_request)
            files = {path: file for path, file in merged.items() if file is not None}
            title = f"{pull_request.title} (#{pull_request.num})"
            commit = self._add(Commit(head, title, pull_request.description, files))
            self.branches["main"] = pull_request.merge_commit = commit.id
            pull_request.status = "merged"
            return commit

    def _apply_(self, files: dict[str, File], key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self._store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise HubError(400, f"LFS pointer of {path} points to a file that does not exist.")
            size = len(self.objects[value["oid"]])
            files[path] = File(size, git_blob_id(lfs_pointer(value["oid"], size)), value["oid"])
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            doomed = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(folder))]
            if not doomed:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for p in doomed:
                del files[p]
        else:
            raise HubError(400, f"Unknown operation {key}")

    def history(self, revision: str) -> list[Commit]:
        """Snapshots from the newest back to the first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


class Hub:
    """All repositories, and the tokens that open them."""

    def __init__(self, tokens: dict[str, Account]):
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self._lock = threading.Lock()

    def authenticate(self, token: str | None) -> Account | None:
        """The account behind a token; `None` without one. A token that nobody has is an error for every request."""
        if token is None:
            return None
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def writer(self, account: Account | None, owner: str) -> Account:
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if not account.can_write or account.user != owner:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner}")
        return account

    def create(self, id: str, account: Account | None, private: bool) -> Repository:
        self.writer(account, id.partition("/")[0])
        with self._lock:
            if id in self.repositories:
                raise HubError(409, "You already created this model repo")
            self.repositories[id] = Repository(id, private)
            return self.repositories[id]

    def find(self, id: str, account: Account | None, to_write: bool = False) -> Repository:
        """A repository that `account` may read (and write). A hidden one answers exactly as a missing one does."""
        repository = self.repositories.get(id)
        is_owner = account is not None and account.user == id.partition("/")[0]
        if repository is None or (repository.private and not is_owner):
            raise HubError(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if to_write:
            self.writer(account, id.partition("/")[0])
        return repository

    def find_to_send(self, id: str, account: Account | None, revision: str | None) -> Repository:
        """
        A repository that `account` may send files to.

        Args:
            revision: What they are for: a branch, to which its owner writes; a pull request, to which its author
                writes too; `None` for a new pull request, which everybody may open who may read and has the right
                to write somewhere.
        """
        repository = self.find(id, account)
        pull_request = repository.pull_requests.get(revision)
        is_authors = pull_request is not None and account is not None and pull_request.author == account.user
        is_guests = account is not None and (revision is None or is_authors)
        self.writer(account, account.user if is_guests else id.partition("/")[0])
        return repository

    def delete(self, id: str, account: Account | None) -> None:
        self.find(id, account, to_write=True)
        del self.repositories[id]
