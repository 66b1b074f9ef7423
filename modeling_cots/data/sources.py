"""Whether what an option names is there: a path is looked up here, and a hub is tried once.

Libraries ask the hub for whatever is no folder, and where the hub cannot be reached they try for minutes.
"""

import difflib
import os
import sys
from functools import cache
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Names that some options take beside Hub ids and paths.
BUILT_IN = ("scenes", "moving_scenes", "random", "none")
# No Hub id looks like these: the names of files, and of the folders that our scripts write.
FILE_SUFFIXES = tuple(f".{name}" for name in "json jsonl csv parquet tar yaml yml safetensors bin pt onnx".split())
OUR_FOLDERS = ("runs",)
QUICK_START = "runs/quickstart"
TIMM = "timm/"
KMEANS = "kmeans:"  # an image tokenizer that is made of the vision encoder that follows
TIMEOUT = 10  # seconds


def is_here(name: str) -> bool:
    """Whether no hub is needed for a name."""
    return name in BUILT_IN or os.path.exists(os.path.expanduser(name.removeprefix(KMEANS)))


def check_path(option: str, name: str) -> None:
    """
    Raise `ValueError` for a name that can only mean a path, and of which nothing is there.

    Encoders of one word are on the Hub from before ids had owners, as gpt2. A `model`, which is COTS, has an owner.
    """
    if is_here(name):
        return
    instead = _what_instead(name.removeprefix(KMEANS))
    if is_path(name):
        raise ValueError(f"{option}={name} does not exist{instead}.")
    if option == "model" and "/" not in name:
        form = "(A Hub id of a COTS model has the form owner/name.)"
        raise ValueError(f"{option}={name} does not exist{instead}. {form}")


def is_path(name: str) -> bool:
    """Whether a name can only mean a file or a folder, and no repository of the Hub."""
    name = name.removeprefix(KMEANS)
    parts = Path(name).parts
    if name.startswith(TIMM) or not parts:
        return False
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or "\\" in name
        or len(parts) > 2
        or name.lower().endswith(FILE_SUFFIXES)
        or (len(parts) == 2 and (parts[0] in OUR_FOLDERS or os.path.isdir(parts[0])))
    )


def _what_instead(name: str) -> str:
    if Path(name) == Path(QUICK_START):
        return ": train it by `python examples/run_pretraining.py examples/configs/quickstart.yaml`, or give another"
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return f", and there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f"; did you mean {path.parent / near[0]}" if near else ""


def use_cache_if_unreachable(what: str) -> None:
    """
    Ask the hub once whether it is there; if not, turn on the offline mode of its libraries, with a warning.

    They then find at once what is in the cache, and say at once what is not.

    Args:
        what: It is needed for, such as "model=org/name".
    """
    if constants.is_offline_mode():
        return
    problem = _problem_of_reaching(constants.ENDPOINT)
    if problem is None:
        return
    logger.warning(
        f"The hub {constants.ENDPOINT} cannot be reached ({problem}): {what} is looked for in the cache alone."
    )
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # has copied the value; else it will when it is imported
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@cache
def _problem_of_reaching(endpoint: str) -> str | None:
    try:
        get_session().head(endpoint, timeout=TIMEOUT)
    except Exception as error:  # of httpx or httpx2, which have no class in common; a refusal by the hub is none
        return " ".join(str(error).split()) or type(error).__name__
    return None
