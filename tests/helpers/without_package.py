"""Python processes in which the package cannot be imported: what people have who meet a model on a hub."""

import json
import os
import textwrap
from pathlib import Path

from programs import run_python

# `None` makes every `import modeling_cots` fail; the flat files of a repository go by other full names.
PREAMBLE = """
import json, sys
sys.modules["modeling_cots"] = None
import torch
torch.set_num_threads(1)
answer = {}
"""


def run_without_package(code: str, home: Path, environment: dict[str, str] | None = None) -> dict:
    """
    What `code` puts into the dict `answer`, run in a process of its own without the package.

    Args:
        home: Folder for the process's `HF_HOME`, where transformers copies remote code to.
        environment: That of a client of a hub (`HubForTests.environment`); by default the process is offline.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"} if environment is None else environment
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(home)
    source = (
        PREAMBLE + textwrap.dedent(code) + '\nassert sys.modules["modeling_cots"] is None\nprint(json.dumps(answer))'
    )
    result = run_python("-c", source, cwd=home, env=environment)
    return json.loads(result.stdout.splitlines()[-1])
