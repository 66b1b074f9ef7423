"""What a model hub keeps: accounts, repositories, commits, large objects. No HTTP here; `hub_server.py` speaks that.

A repository is a chain of immutable snapshots; a commit is built completely and then put in place under a lock, so
that nobody can see half of one. Errors carry the status and the `X-Error-Code` by which huggingface_hub knows them.
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


@dataclass(frozen=True)
class Commit:
    """One immutable snapshot."""

    parent: str | None
    title: str
    description: str
    files: dict[str, File]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @property
    def id(self) -> str:
        listing = [(path, file.blob_id) for path, file in sorted(self.files.items())]
        return hashlib.sha1(repr((self.parent, self.title, self.date, listing)).encode()).hexdigest()


class Repository:
    """A model repository: branches and tags over snapshots. Begins with one commit of a `.gitattributes`."""

    def __init__(self, id: str, private: bool = False):
        self.id = id
        self.private = private
        self.sdk: str | None = None  # of a Space
        self.blobs: dict[str, bytes] = {}  # git's SHA-1 -> content
        self.objects: dict[str, bytes] = {}  # SHA-256 -> content of a large file
        self.commits: dict[str, Commit] = {}
        self.tags: dict[str, str] = {}
        self._lock = threading.Lock()
        first = Commit(None, "initial commit", "", {".gitattributes": self._store(GIT_ATTRIBUTES)})
        self.commits[first.id] = first
        self.branches: dict[str, str] = {"main": first.id}

    def _store(self, content: bytes) -> File:
        blob_id = git_blob_id(content)
        self.blobs[blob_id] = content
        return File(len(content), blob_id)

    def resolve(self, revision: str) -> Commit:
        """The snapshot that a branch, a tag or a full commit hash names."""
        commit_id = self.branches.get(revision) or self.tags.get(revision) or revision
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

    def commit(self, branch: str, header: dict, operations: list[dict]) -> Commit:
        """Put a snapshot on top of a branch, whole or not at all.

        Raises [`HubError`] 412 when the branch has moved on from `header["parentCommit"]`, 400 for a large file whose
        content never came, 404 for an unknown branch and for deleting what is not there.
        """
        with self._lock:
            if branch not in self.branches:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = self.branches[branch]
            if header.get("parentCommit") not in (None, head):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = dict(self.commits[head].files)
            for operation in operations:
                self._apply_(files, operation["key"], operation["value"])
            commit = Commit(head, header["summary"], header.get("description", ""), files)
            self.commits[commit.id] = commit
            self.branches[branch] = commit.id
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

    def delete(self, id: str, account: Account | None) -> None:
        self.find(id, account, to_write=True)
        del self.repositories[id]
