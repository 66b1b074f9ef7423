"""Pushing a complete repository folder to a hub in one commit, without replacing a card that somebody edited.

`hub_export.py` or `hub/standard_exports.py` writes the folder. huggingface_hub sends it, with its progress bars and
its retries.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from .hub_export import CARD_NAME, HANDLER_FILES, export_repository, is_untouched
from .onnx_cots import ONNX_FOLDER

logger = logging.get_logger(__name__)

SHARD_INDEX = "model.safetensors.index.json"
# Weights of an earlier push, which would be loaded beside the new weights or in place of them: they are deleted.
STALE_WEIGHTS = ["model-*-of-*.safetensors", SHARD_INDEX, f"{ONNX_FOLDER}/*.onnx"]
# In a Space, the files of an earlier page, which `search/browser_demo.py` wrote.
STALE_PAGE = ["encoders/*", "collection/*", "runtime/*"]


class HubPushError(RuntimeError):
    """A push that the hub refused or that the network interrupted."""


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processor: ProcessorMixin | None = None,
    card=None,
    **push_options,
) -> CommitInfo:
    """
    Export a model into a temporary folder and push that (see [`push_folder`] for the options).

    Args:
        processor: Its [`COTSProcessor`]; by default the one in the folder or repository of the model.
        card: A `ModelCard` or its text; by default a short one without claims about training.

    Raises `ValueError` without a processor, and what [`push_folder`] raises.
    """
    processor = processor_of(model) if processor is None else processor
    repo_id = full_repo_id(repo_id, push_options.get("token"))
    with tempfile.TemporaryDirectory() as folder:
        export_repository(model, processor, folder, card=card, model_id=repo_id)
        return push_folder(folder, repo_id, **push_options)


def processor_of(model: PreTrainedModel) -> ProcessorMixin:
    """The processor in the folder or repository of a model. Raises `ValueError` where there is none."""
    source = model.config.name_or_path
    if not source:
        raise ValueError("A repository needs the model's processor: push_to_hub(repo_id, processor=processor).")
    # The repository's code runs only if it already did for the model: if this file was loaded as part of it.
    is_remote = not os.path.isfile(Path(__file__).parent / HANDLER_FILES[0])
    options = {"revision": getattr(model.config, "_commit_hash", None), "trust_remote_code": is_remote}
    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no processor beside the model in {source}: push_to_hub(repo_id, processor=processor)."
        ) from error


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    overwrite_card: bool = False,
    commit_message: str = "Upload COTS model",
    token: str | bool | None = None,
    space_sdk: str | None = None,
) -> CommitInfo:
    """
    Push a folder as one commit into a repository, which is created if there is none.

    A generated card is replaced unless somebody has edited it. Hidden files and `__pycache__` are not sent.

    Args:
        repo_id: `name` or `owner/name`.
        private: Make a new repository private; by default as the settings of its owner say.
        revision: Branch to push to, created if there is none, or a pull request, `refs/pr/NUM`; by default `main`.
        tag: Name of this version, to load it by: `from_pretrained(repo_id, revision=tag)`.
        create_pr: Propose the commit to `main` in a pull request, which is possible in the repositories of others too.
            The result has its `pr_url`, and its `pr_revision` to load the model by.
        overwrite_card: Replace the card in the repository even if it was edited.
        token: By default that of the environment or of `hf auth login`.
        space_sdk: Push to a Space of this kind, such as "static", instead of a model's repository.

    Raises `ValueError` for a tag that exists, for a tag or a revision with `create_pr`, and for `private=True` with a
    public repository. Raises [`HubPushError`] for a token without the right to write, and for a network that fails.
    The same push can then be made again: large files that have arrived are not sent twice.
    """
    if create_pr and (tag is not None or revision is not None):
        raise ValueError(
            f"create_pr=True got revision={revision!r} and tag={tag!r}: a new pull request goes to main, and a tag is "
            "set once it is merged. Leave both out."
        )
    api = HfApi(token=token)
    kind = {"repo_type": "model" if space_sdk is None else "space"}
    with _failures_explained(repo_id):
        repo_id = open_repository(api, repo_id, private, space_sdk=space_sdk)
        if tag is not None and tag in (ref.name for ref in api.list_repo_refs(repo_id, **kind).tags):
            raise ValueError(f"{repo_id} has a tag {tag!r} already: choose another, or delete that one first.")
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
        version = {"revision": revision, **kind}
        keeps_card = not overwrite_card and _has_edited_card(api, repo_id, **version)
        if keeps_card:
            logger.warning(f"{repo_id} keeps its own card, which was edited there; `overwrite_card` replaces it.")
        present = api.list_repo_files(repo_id, **version)
        # Not `upload_folder`, which splits an upload that takes minutes into several commits.
        commit = api.create_commit(
            repo_id,
            _operations(
                Path(folder),
                present,
                stale=STALE_WEIGHTS if space_sdk is None else STALE_PAGE,
                skipped={CARD_NAME} if keeps_card else set(),
            ),
            commit_message=commit_message,
            create_pr=create_pr,
            **version,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, **kind)
        return commit


def _operations(folder: Path, present: list[str], stale: list[str], skipped: set[str]) -> list:
    """
    What a push changes: files of `folder` but for those `skipped` are added or replaced; of the files `present` in the
    repository, those are deleted that fit a pattern of `stale` and are not in `folder`.
    """
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    # Without hidden files and `__pycache__`, where git and caches keep what is private.
    paths = {
        name.as_posix(): file
        for name, file in files.items()
        if not any(part[0] == "." or part == "__pycache__" for part in name.parts)
    }
    added = [CommitOperationAdd(name, path) for name, path in paths.items() if name not in skipped]
    if SHARD_INDEX in paths:  # beside shards, whole weights would be loaded in their place
        stale = [*stale, "model.safetensors"]
    old = [name for name in present if name not in paths and any(fnmatch(name, pattern) for pattern in stale)]
    return added + [CommitOperationDelete(name) for name in old]


def full_repo_id(repo_id: str, token: str | bool | None = None) -> str:
    """`repo_id` with its owner; by default that is the account of the token."""
    if "/" in repo_id:
        return repo_id
    with _failures_explained(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def open_repository(api: HfApi, repo_id: str, private: bool | None, space_sdk: str | None = None) -> str:
    """
    Create a repository, or a Space, if there is none; return its full id.

    Raises `ValueError` for a public one if `private`, and for a Space of another kind than `space_sdk`.
    """
    kind = {"repo_type": "model" if space_sdk is None else "space"}
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True, space_sdk=space_sdk, **kind).repo_id
    info = api.repo_info(repo_id, **kind) if private or space_sdk is not None else None
    if private and not info.private:
        raise ValueError(f"{repo_id} exists and everybody sees it: make it private in its settings first.")
    if space_sdk is not None and info.sdk not in (None, space_sdk):
        raise ValueError(f"The Space {repo_id} is one of {info.sdk}, and not {space_sdk}: choose another name.")
    return repo_id


def _has_edited_card(api: HfApi, repo_id: str, **version) -> bool:
    if not api.file_exists(repo_id, CARD_NAME, **version):
        return False
    path = hf_hub_download(repo_id, CARD_NAME, token=api.token, **version)
    return not is_untouched(Path(path).read_text(encoding="utf-8", errors="replace"))


@contextmanager
def _failures_explained(repo_id: str) -> Iterator[None]:
    try:
        yield
    except ValueError:  # ours, and huggingface_hub's for an impossible repo_id
        raise
    except Exception as error:  # the errors of httpx and huggingface_hub have no other class in common
        raise HubPushError(_explain(repo_id, error)) from error


def _explain(repo_id: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return (
            f"The hub did not let this account write to {repo_id} ({reason}). Log in with `hf auth login`, or set "
            "HF_TOKEN or `token` to one with write access to that owner."
        )
    return (
        f"The push to {repo_id} did not get through ({reason}). Push again when the network is back: the repository "
        "shows no part of a push, and large files that have arrived are not sent twice."
    )


__all__ = ["HubPushError", "full_repo_id", "push_folder", "push_model"]
