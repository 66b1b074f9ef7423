"""The fixtures `hub` and `own_hub`, for test files that say `pytest_plugins = ["hub_fixtures"]`.

With both `HF_ENDPOINT` and `HF_TOKEN` set, the tests use that server and account instead of the loopback one, in
repositories that they create and delete; tests that need more than a hub offers anybody are skipped then.
"""

import os
from collections.abc import Iterator

import pytest
from hub_client import HubForTests
from hub_server import WRITE_TOKEN, HubServer


@pytest.fixture(scope="session")
def hub_of_session(tmp_path_factory) -> Iterator[HubForTests]:
    home = tmp_path_factory.mktemp("hf_home")
    if os.environ.get("HF_ENDPOINT") and os.environ.get("HF_TOKEN"):
        hub = HubForTests(os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"], home)
        yield hub
        hub.close()
    else:
        with HubServer() as server:
            hub = HubForTests(server.url, WRITE_TOKEN, home, server)
            yield hub
            hub.close()


@pytest.fixture
def hub(hub_of_session) -> Iterator[HubForTests]:
    """A hub with an account that may write: the loopback server, or the one in `HF_ENDPOINT` with `HF_TOKEN`."""
    yield hub_of_session
    hub_of_session.reset_()


@pytest.fixture
def own_hub(hub) -> HubForTests:
    """A hub of our own making: with faults, other accounts, and a record of what clients asked."""
    if hub.server is None:
        pytest.skip("needs the loopback server: unset HF_ENDPOINT or HF_TOKEN")
    return hub
