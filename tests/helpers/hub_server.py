"""A model hub on the loopback that the real huggingface_hub client takes for the real one.

It speaks the part of the Hub's HTTP API that pushing and pulling models needs (seen with huggingface_hub 2.4):
accounts and tokens, creating and deleting repositories, private ones, preupload, LFS batch with basic transfers,
commits, tags, branches, pull requests, trees, model info, and resolve with range requests. Large files lie behind
signed addresses of a second server, which is another origin, as the Hub's storage is: a client that sends its token
there is caught.

Models, data sets and Spaces share ids and routes. Not here: discussions, running Spaces, and xet. The client uses
xet for every upload if `hf_xet` is installed, whatever the server says, unless `HF_HUB_DISABLE_XET` is set;
`hub_client.py` sets it.
"""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote

from hub_network import Answer, Network, Request, Server
from hub_repository import Account, File, Hub, HubError, PullRequest, Repository, now

USER = "tester"
WRITE_TOKEN, READ_TOKEN, STRANGERS_TOKEN = "hf_write", "hf_read", "hf_stranger"
TOKENS = {
    WRITE_TOKEN: Account(USER, can_write=True),
    READ_TOKEN: Account(USER, can_write=False),
    STRANGERS_TOKEN: Account("stranger", can_write=True),
}
REPO = r"(?P<repo>[^/]+/[^/]+)"
MODEL = f"/api/(?:models|datasets|spaces)/{REPO}"
PULL_REQUEST = MODEL + r"/discussions/(?P<num>\d+)"
PULL_REQUESTS_A_PAGE = 10
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str):
    """Register a method of [`HubServer`] for a path, a regular expression; named groups become arguments, unquoted."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


def card_fields(readme: bytes) -> dict[str, str]:
    """What the Hub reads out of a card and `pipeline(model=...)` asks it for."""
    header = readme.decode().partition("\n---")[0]
    return dict(re.findall(r"^(pipeline_tag|library_name): *(\S+)$", header, re.MULTILINE))


def file_info(path: str, file: File) -> dict:
    info = {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
    if file.lfs_oid is not None:
        info["lfs"] = {"oid": file.lfs_oid, "size": file.size, "pointerSize": file.pointer_size}
    return info


def sibling_info(path: str, file: File, with_blobs: bool) -> dict:
    if not with_blobs:
        return {"rfilename": path}
    info = {"rfilename": path, "size": file.size, "blobId": file.blob_id}
    if file.lfs_oid is not None:
        info["lfs"] = {"sha256": file.lfs_oid, "size": file.size, "pointerSize": file.pointer_size}
    return info


def pull_request_info(request: Request, repo: str, pull_request: PullRequest) -> dict:
    return {
        "num": pull_request.num,
        "title": pull_request.title,
        "author": {"name": pull_request.author},
        "createdAt": pull_request.date,
        "status": pull_request.status,
        "isPullRequest": True,
        "repo": {"name": repo, "type": request.path.split("/")[2].removesuffix("s")},
    }


def event(type: str, author: str, date: str, data: dict) -> dict:
    return {"id": secrets.token_hex(12), "type": type, "author": {"name": author}, "createdAt": date, "data": data}


class HubServer:
    """
    The hub and its storage, both serving from entering the context until leaving it.

    `hub` is what they hold, `network` the wire in front of both, `url` what goes into `HF_ENDPOINT`.
    """

    def __init__(self):
        self.hub = Hub(TOKENS)
        self.network = Network()
        self._signed: dict[str, tuple[Repository, str]] = {}  # signature -> the large object it opens
        self.url = Server(self.network, self.answer).url
        # By another name of the loopback: huggingface_hub 1.31 takes a redirect to the same host for one to the Hub.
        self.storage_url = Server(self.network, self.answer_storage).url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> "HubServer":
        for server in self.network.servers:
            server.open()
        return self

    def __exit__(self, *exc_info) -> None:
        self.network.come_back()
        for server in self.network.servers:
            server.close()
            server.server_close()

    def answer(self, request: Request) -> Answer:
        try:
            token = request.headers.get("authorization", "").removeprefix("Bearer ") or None
            account = self.hub.authenticate(token)
            for method, path, function in ROUTES:
                is_method = method == request.method or (method == "GET" and request.method == "HEAD")
                if is_method and (match := path.fullmatch(request.path)):
                    arguments = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    result = function(self, request, account, **arguments)
                    return result if isinstance(result, Answer) else self._json(result)
            raise HubError(501, f"This hub does not know {request.method} {request.path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            return self._json({"error": str(error)}, error.status, headers)

    @staticmethod
    def _json(payload, status: int = 200, headers: dict | None = None) -> Answer:
        return Answer(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(payload).encode())

    # --- accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self, request: Request, account: Account | None):
        if account is None:
            raise HubError(401, "Invalid username or password.")
        role = "write" if account.can_write else "read"
        return {"type": "user", "name": account.user, "orgs": [], "auth": {"accessToken": {"role": role}}}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request, account: Account | None):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create_repo(self, request: Request, account: Account | None):
        payload = request.json()
        if payload.get("type", "model") not in ("model", "dataset", "space"):
            raise HubError(501, f"This hub has no {payload['type']}s")
        self.hub.writer(account, payload.get("organization") or account and account.user)
        id = f"{payload.get('organization') or account.user}/{payload['name']}"
        facts = {"url": f"{self.url}/{id}", "name": id}
        try:
            self.hub.create(id, account, payload.get("visibility") == "private").sdk = payload.get("sdk")
        except HubError as error:
            if error.status != 409:
                raise
            return self._json({"error": str(error), **facts}, 409)
        return facts

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self, request: Request, account: Account | None):
        payload = request.json()
        self.hub.delete(f"{payload['organization'] or account and account.user}/{payload['name']}", account)
        return {}

    @route("PUT", f"{MODEL}/settings")
    def settings(self, request: Request, account: Account | None, repo: str):
        repository = self.hub.find(repo, account, to_write=True)
        repository.private = request.json()["visibility"] == "private"
        return {"private": repository.private}

    # --- reading

    @route("GET", f"{MODEL}(/revision/(?P<revision>[^/]+))?")
    def model_info(self, request: Request, account: Account | None, repo: str, revision: str = "main"):
        repository = self.hub.find(repo, account)
        commit = repository.resolve(revision)
        card = repository.content(commit.files["README.md"]) if "README.md" in commit.files else b""
        return {
            "id": repo,
            "author": repo.partition("/")[0],
            "sha": commit.id,
            "lastModified": commit.date,
            "private": repository.private,
            "sdk": repository.sdk,
            "tags": [],
            "siblings": [sibling_info(*item, "blobs" in request.query) for item in sorted(commit.files.items())],
            **card_fields(card),
        }

    @route("GET", f"{MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, request: Request, account: Account | None, repo: str, revision: str, folder: str = ""):
        files = self.hub.find(repo, account).resolve(revision).files
        root = PurePosixPath(folder)
        inside = {path: file for path, file in files.items() if root in PurePosixPath(path).parents}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        folders = {str(p) for path in inside for p in PurePosixPath(path).parents if root in p.parents}
        entries = [{"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest()} for p in folders]
        entries += [file_info(path, file) for path, file in inside.items()]
        if request.query.get("recursive") != "true":
            entries = [entry for entry in entries if PurePosixPath(entry["path"]).parent == root]
        return sorted(entries, key=lambda entry: entry["path"])

    @route("GET", f"{MODEL}/commits/(?P<revision>[^/]+)")
    def commits(self, request: Request, account: Account | None, repo: str, revision: str):
        return [
            {"id": c.id, "title": c.title, "message": c.description, "date": c.date, "authors": [{"user": USER}]}
            for c in self.hub.find(repo, account).history(revision)
        ]

    @route("GET", f"{MODEL}/refs")
    def refs(self, request: Request, account: Account | None, repo: str):
        repository = self.hub.find(repo, account)

        def listed(kind: str, refs: dict[str, str]) -> list[dict]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": id} for n, id in refs.items()]

        refs = {
            "branches": listed("heads", repository.branches),
            "tags": listed("tags", repository.tags),
            "converts": [],
        }
        if "include_prs" in request.query:
            refs["pullRequests"] = listed(
                "pr", {r.removeprefix("refs/pr/"): c for r, c in repository.proposed.items()}
            )
        return refs

    @route("POST", f"{MODEL}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, account: Account | None, repo: str, revision: str):
        files = self.hub.find(repo, account).resolve(revision).files
        body = request.body.decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        return [file_info(path, files[path]) for path in wanted if path in files]

    @route("GET", f"/(?:datasets/|spaces/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, request: Request, account: Account | None, repo: str, revision: str, path: str):
        repository = self.hub.find(repo, account)
        try:
            commit, file = repository.file(revision, path)
        except HubError as error:
            if error.code == "EntryNotFound":  # with the commit the client remembers that the file is not there
                headers = {"X-Error-Code": error.code, "X-Repo-Commit": repository.resolve(revision).id}
                return self._json({"error": str(error)}, 404, headers)
            raise
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs_oid is None:
            return Answer(200, headers, repository.content(file))
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        return Answer(302, headers | {"Location": self._sign(repository, file.lfs_oid)})

    # --- writing

    @route("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)")
    def preupload(self, request: Request, account: Account | None, repo: str, revision: str):
        repository = self.hub.find_to_send(repo, account, None if "create_pr" in request.query else revision)
        known = repository.resolve(revision).files
        return {
            "files": [
                {
                    "path": (path := entry["path"]),
                    "uploadMode": repository.upload_mode(
                        revision, path, entry["size"], base64.b64decode(entry["sample"])
                    ),
                    "shouldIgnore": False,
                    "oid": known[path].etag if path in known else None,
                }
                for entry in request.json()["files"]
            ]
        }

    @route("POST", f"/(?:datasets/|spaces/)?{REPO}[.]git/info/lfs/objects/batch")
    def lfs_batch(self, request: Request, account: Account | None, repo: str):
        payload = request.json()
        repository = self.hub.find_to_send(repo, account, payload.get("ref", {}).get("name"))
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in payload["objects"]]
        for object in objects:
            if object["oid"] not in repository.objects:
                verify = {"href": f"{self.url}/api/models/{repo}/lfs-verify"}
                object["actions"] = {
                    "upload": {"href": self._sign(repository, object["oid"])},
                    "verify": verify,
                }
        return {"transfer": "basic", "objects": objects}

    @route("POST", f"{MODEL}/lfs-verify")
    def lfs_verify(self, request: Request, account: Account | None, repo: str):
        objects = self.hub.find_to_send(repo, account, None).objects
        wanted = request.json()
        if len(objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "The object did not arrive")
        return {}

    @route("POST", f"{MODEL}/commit/(?P<revision>[^/]+)")
    def commit(self, request: Request, account: Account | None, repo: str, revision: str):
        is_proposal = "create_pr" in request.query
        repository = self.hub.find_to_send(repo, account, None if is_proposal else revision)
        header, *operations = (json.loads(line) for line in request.body.splitlines())
        answer = {"success": True, "hookOutput": ""}
        if is_proposal:
            pull_request = repository.open_pull_request(account.user, header["value"], operations)
            commit = repository.resolve(pull_request.ref)
            answer["pullRequestUrl"] = f"{self.url}/{repo}/discussions/{pull_request.num}"
        else:
            commit = repository.commit(revision, header["value"], operations)
        return answer | {"commitOid": commit.id, "commitUrl": f"{self.url}/{repo}/commit/{commit.id}"}

    @route("POST", f"{MODEL}/(?P<kind>tag|branch)/(?P<name>[^/]+)")
    def create_ref(self, request: Request, account: Account | None, repo: str, kind: str, name: str):
        repository = self.hub.find(repo, account, to_write=True)
        payload = request.json()
        if kind == "tag":  # here the path names the revision, and the body the tag
            refs, name, start = repository.tags, payload["tag"], name
        else:
            refs, start = repository.branches, payload.get("startingPoint", "main")
            if name.startswith("refs/"):
                raise HubError(400, f"Invalid reference for a branch: {name}")
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = repository.resolve(start).id
        return {}

    @route("DELETE", f"{MODEL}/(?P<kind>tag|branch)/(?P<name>[^/]+)")
    def delete_ref(self, request: Request, account: Account | None, repo: str, kind: str, name: str):
        repository = self.hub.find(repo, account, to_write=True)
        if (kind, name) == ("branch", "main"):
            raise HubError(403, "The branch main is protected: it cannot be deleted.")
        if (repository.tags if kind == "tag" else repository.branches).pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return {}

    # --- pull requests

    @route("GET", f"{MODEL}/discussions")
    def list_pull_requests(self, request: Request, account: Account | None, repo: str):
        query = request.query
        kept = {"open": ("open", "draft"), "closed": ("closed", "merged")}.get(query.get("status"))
        found = [
            pull_request_info(request, repo, pull_request)
            for pull_request in reversed(self.hub.find(repo, account).pull_requests.values())
            if query.get("author") in (None, pull_request.author)
            and query.get("type") != "discussion"
            and (kept is None or pull_request.status in kept)
        ]
        start = int(query.get("p", 0)) * PULL_REQUESTS_A_PAGE
        return {"discussions": found[start : start + PULL_REQUESTS_A_PAGE], "count": len(found), "start": start}

    @route("POST", f"{MODEL}/discussions")
    def open_pull_request(self, request: Request, account: Account | None, repo: str):
        repository = self.hub.find_to_send(repo, account, None)
        payload = request.json()
        if not payload["pullRequest"]:
            raise HubError(501, "This hub has pull requests, but no discussions")
        header = {"summary": payload["title"], "description": payload["description"]}
        return {"num": repository.open_pull_request(account.user, header, []).num}

    @route("GET", PULL_REQUEST)
    def pull_request(self, request: Request, account: Account | None, repo: str, num: str):
        repository, pull_request = self._pull_request(repo, account, num)
        text = {"raw": pull_request.description, "html": pull_request.description, "updatedAt": pull_request.date}
        comment = {"edited": False, "hidden": False, "latest": text, "history": []}
        history = repository.history(pull_request.ref)
        proposed = history[: [commit.id for commit in history].index(pull_request.base)]
        return {
            **pull_request_info(request, repo, pull_request),
            "changes": {"base": "main", "mergeCommitId": pull_request.merge_commit},
            "filesWithConflicts": repository.conflicts(pull_request) if pull_request.status != "merged" else [],
            "events": [
                event("comment", pull_request.author, pull_request.date, comment),
                *(
                    event("commit", pull_request.author, commit.date, {"subject": commit.title, "oid": commit.id})
                    for commit in reversed(proposed)
                ),
            ],
        }

    @route("POST", f"{PULL_REQUEST}/status")
    def set_status(self, request: Request, account: Account | None, repo: str, num: str):
        _, pull_request = self._pull_request(repo, account, num, to_write=True)
        if pull_request.status == "merged":
            raise HubError(400, "This pull request is merged: its status stays.")
        pull_request.status = request.json()["status"]
        return {"newStatus": event("status-change", account.user, now(), {"status": pull_request.status})}

    @route("POST", f"{PULL_REQUEST}/merge")
    def merge(self, request: Request, account: Account | None, repo: str, num: str):
        self.hub.find(repo, account, to_write=True)
        repository, pull_request = self._pull_request(repo, account, num)
        repository.merge(pull_request)
        return {}

    def _pull_request(
        self, repo: str, account: Account | None, num: str, to_write: bool = False
    ) -> tuple[Repository, PullRequest]:
        ref = f"refs/pr/{num}"
        repository = self.hub.find(repo, account)
        if ref not in repository.pull_requests:
            raise HubError(404, f"There is no pull request {num}")
        if to_write:
            self.hub.find_to_send(repo, account, ref)
        return repository, repository.pull_requests[ref]

    # --- storage: whoever has a signed address may read and write that one object, and needs no token

    def _sign(self, repository: Repository, oid: str) -> str:
        signature = secrets.token_urlsafe()
        self._signed[signature] = repository, oid
        return f"{self.storage_url}/{signature}"

    def answer_storage(self, request: Request) -> Answer:
        repository, oid = self._signed.get(request.path[1:], (None, ""))
        if repository is None:
            return Answer(403, content=b"no such signature")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                return Answer(400, content=b"the content is not what was announced")
            repository.objects[oid] = request.body
            return Answer()
        return Answer(200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, repository.objects[oid])
