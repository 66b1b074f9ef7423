"""A read-only hub of data sets on the loopback, which `datasets` and huggingface_hub take for the real one.

It speaks what streaming asks for (seen with datasets 5.2): repository info, trees, paths-info, and files by ranges.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import serve

SHA = "0123456789abcdef0123456789abcdef01234567"
OWNER = "some"


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path  # with a sub-folder for each repository

    def _files(self, repository: str) -> dict[str, bytes]:
        root = self.folder / repository
        return {
            path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
        }

    def _entries(self, repository: str, root: str, recursive: bool) -> list[dict]:
        entries = {}
        for path, content in self._files(repository).items():
            if root and not path.startswith(f"{root}/"):
                continue
            rest = path[len(root) + 1 if root else 0 :]
            for depth in range(1, rest.count("/") + 1):
                folder = "/".join([*filter(None, [root]), *rest.split("/")[:depth]])
                if recursive or depth == 1:
                    entries[folder] = {"type": "directory", "path": folder, "oid": SHA}
            if recursive or "/" not in rest:
                entries[path] = self._entry(path, content)
        return list(entries.values())

    @staticmethod
    def _entry(path: str, content: bytes) -> dict:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": SHA, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value) -> None:
        self._answer(json.dumps(value).encode(), Content_Type="application/json")

    def _not_found(self) -> None:
        self._answer(b"{}", 404, X_Error_Code="EntryNotFound")

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        match = re.fullmatch(rf"(?:/api)?/datasets/({OWNER}/(\w+))(?:/([\w-]+))?(?:/[^/]+)?/?(.*)", path)
        if match is None:
            return self._not_found()
        repo_id, repository, kind, name = match.groups()
        files = self._files(repository)
        if kind in (None, "revision"):
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": repo_id, "sha": SHA, "private": False, "tags": [], "siblings": siblings})
        elif kind == "tree":
            entries = self._entries(repository, name, query.get("recursive", [""])[0].lower() == "true")
            self._json(entries) if entries else self._not_found()
        elif kind == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            folders = [each for each in wanted if any(file.startswith(f"{each}/") for file in files)]
            self._json(
                [self._entry(each, files[each]) for each in wanted if each in files]
                + [{"type": "directory", "path": each, "oid": SHA} for each in folders]
            )
        elif kind == "resolve" and name in files:
            self._send_file(files[name])
        else:
            self._not_found()

    do_HEAD = do_POST = do_GET

    def _send_file(self, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self._answer(content[first : last + 1], 206, **headers)
        else:
            self._answer(content, **headers)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def dataset_hub(folder: Path) -> Iterator[str]:
    """Serve each sub-folder as a data set of the owner `OWNER`; gives what `HF_ENDPOINT` has to be."""
    with serve(type("Hub", (_Hub,), {"folder": folder})) as address:
        yield address
