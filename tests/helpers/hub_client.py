"""Clients of a model hub for the tests: separate Python processes, in which huggingface_hub knows that hub only.

huggingface_hub reads `HF_ENDPOINT`, `HF_HOME` and the rest of its environment when it is imported, so clients cannot
live in the process of the tests, which is offline. For each token one process is started with the right environment;
it imports what the calls need once and forks for each, so that no call sees what another one left behind.

    def upload(folder, repo_id):  # at the top of a test file: the client imports it by name
        return HfApi().upload_folder(folder_path=folder, repo_id=repo_id).oid

    def test_upload(hub, tmp_path):
        commit_id = hub.run(upload, str(tmp_path), hub.new_repo_id())
"""

import os
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from forks import TRANSFORMERS, Call, ForkServer
from hub_server import USER, HubServer

# What pytest's `pythonpath` makes importable, for clients too.
IMPORTABLE = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples")]
FOREIGN_SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_")
HUB_API = "huggingface_hub.hf_api"
OWN_TOKEN = object()


class HubForTests:
    """
    A hub and an account that may write.

    Args:
        url, token: What clients get as `HF_ENDPOINT` and `HF_TOKEN`.
        home: Folder for each token's `HF_HOME`, and so for its cache of downloads.
        server: The loopback server, `None` where the environment gave another.
    """

    def __init__(self, url: str, token: str, home: Path, server: HubServer | None = None):
        self.url, self.token, self.home, self.server = url, token, home, server
        self.repo_ids: list[str] = []
        self._clients: dict[tuple, ForkServer] = {}

    def environment(self, token=OWN_TOKEN) -> dict[str, str]:
        """
        Environment for a client's process: this hub and nothing of the Hugging Face settings around it.

        Args:
            token: Another token than that of the account; `None` for none at all.
        """
        token = self.token if token is OWN_TOKEN else token
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_SETTINGS)}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home / str(token)),
            "HF_HUB_DISABLE_XET": "1",  # the one upload path that a server of a few pages can speak is basic LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join([*IMPORTABLE, kept.get("PYTHONPATH", "")]),
            **({} if self.server is None else {"NO_PROXY": "127.0.0.1,localhost"}),
            **({} if token is None else {"HF_TOKEN": token}),
        }

    def start(self, function: Callable, *args, token=OWN_TOKEN, **kwargs) -> Call:
        """Begin what [`run`] does, and return at once something with a `result()`."""
        token = self.token if token is OWN_TOKEN else token
        return self.client(token, with_torch="torch" in function.__globals__).start(function, *args, **kwargs)

    def client(self, token: str | None, with_torch: bool = True) -> ForkServer:
        """
        Where forks of this token come from.

        Args:
            with_torch: Whether functions of files that import torch are called. Forking a large process takes ten
                times as long; for the account itself this is a stage of `server_without_package`.
        """
        key = (token, with_torch)
        if key not in self._clients:
            if with_torch and token == self.token and self.server is not None:
                self._clients[key] = self.server_without_package.stage()
            else:
                self._clients[key] = ForkServer(HUB_API, environment=self.environment(token))
        return self._clients[key]

    @cached_property
    def server_without_package(self) -> ForkServer:
        """Forks with the environment of a client, in which nobody has imported the package."""
        return ForkServer(HUB_API, *TRANSFORMERS, "sentence_transformers", environment=self.environment())

    def run(self, function: Callable, *args, token=OWN_TOKEN, **kwargs):
        """
        The result of a function of a test file, called in a client of this hub.

        Args:
            token: Another token than that of the account; `None` for none at all.

        Raises `forks.ClientError` for any exception in it.
        """
        return self.start(function, *args, token=token, **kwargs).result()

    @cached_property
    def user(self) -> str:
        return USER if self.server is not None else self.run(_whoami)

    def new_repo_id(self) -> str:
        """An id under which there is nothing yet; what is created there is deleted after the test."""
        self.repo_ids.append(f"{self.user}/test-{uuid.uuid4().hex[:12]}")
        return self.repo_ids[-1]

    def reset_(self) -> None:
        """Mend the network and forget the requests of the loopback server; delete what a test left on any other."""
        if self.server is not None:
            self.server.network.reset_()
        elif self.repo_ids:
            self.run(_delete, self.repo_ids)
        self.repo_ids.clear()

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        if "server_without_package" in vars(self):
            self.server_without_package.close()


def _whoami() -> str:
    from huggingface_hub import HfApi

    return HfApi().whoami()["name"]


def _delete(repo_ids: list[str]) -> None:
    from huggingface_hub import HfApi

    for repo_id in repo_ids:
        HfApi().delete_repo(repo_id, missing_ok=True)
