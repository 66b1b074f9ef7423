"""Python processes in which the package cannot be imported: what people have who meet a model on a hub."""

import json
import textwrap
from pathlib import Path

from forks import server_without_package
from hub_client import HubForTests

# `None` makes every `import modeling_cots` fail; the flat files of a repository go by other full names.
PREAMBLE = """
import json, sys
assert "modeling_cots" not in sys.modules
sys.modules["modeling_cots"] = None
import torch
torch.set_num_threads(1)
answer = {}
"""


def run_without_package(code: str, folder: Path, hub: HubForTests | None = None) -> dict:
    """
    What `code` puts into the dict `answer`, run in its own process without the package.

    Args:
        folder: Where the process runs.
        hub: Whose client it is; by default it is offline.
    """
    source = (
        PREAMBLE + textwrap.dedent(code) + '\nassert sys.modules["modeling_cots"] is None\nprint(json.dumps(answer))'
    )
    server = server_without_package() if hub is None else hub.server_without_package
    return json.loads(server.run_python("-c", source, cwd=folder).stdout.splitlines()[-1])
