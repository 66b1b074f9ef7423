"""A path that is not there is never asked of a hub, and a hub that cannot be reached is tried once."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from modeling_cots.data.opening import open_dataset
from modeling_cots.data.revisions import check_revision
from modeling_cots.data.sources import is_path
from modeling_cots.data.videos import open_videos


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere",
        "./a",
        "../a",
        "~/a",
        "a/",
        "a\\b",
        "a/b/c",
        "sizes.json",
        "x/a.PARQUET",
        "runs/quick",
        "kmeans:/nowhere",
        "photos/test",
    ],
)
def test_these_can_only_be_paths(name):
    assert is_path(name)
    with pytest.raises(ValueError, match="^model=.* does not exist"):
        check_revision("model", name, None)
    with pytest.raises(ValueError, match="does not exist"):
        open_dataset(name, "train")


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "google-bert/bert-base-uncased",
        "org/model-v1.0",
        "org/model.en",
        "timm/vit_base.augreg_in21k",
        "kmeans:facebook/dinov2-base",
    ],
)
def test_these_may_be_of_the_hub(name):
    assert not is_path(name)
    check_revision("text_model", name, None)


@pytest.mark.parametrize(
    "name", ["scenes", "random", "none", "photos", "photos/train", "runs/mine", ".", "kmeans:photos/train"]
)
def test_these_need_no_hub(name):
    check_revision("dataset", name, None)


def test_a_model_of_the_hub_has_an_owner():
    with pytest.raises(ValueError, match="model=phots does not exist; did you mean photos. .A Hub id of a COTS"):
        check_revision("model", "phots", None)
    check_revision("model", "photos", None)
    check_revision("model", "org/model", None)


@pytest.mark.parametrize("name", ["PHOTOS", "coco", "MSRVTT"])
def test_a_data_set_of_the_hub_has_an_owner(name):
    with pytest.raises(ValueError, match=f"The data set '{name}' does not exist"):
        open_dataset(name, "train")
    with pytest.raises(ValueError, match=f"The data set '{name}' does not exist"):
        open_videos(name, "train")


def test_no_videos_are_taken_from_the_hub():
    with pytest.raises(ValueError, match="'org/clips' does not exist: videos are read from a folder"):
        open_videos("org/clips", "train")


def test_what_to_do_instead_is_said():
    with pytest.raises(ValueError, match="does not exist; did you mean runs/mine"):
        check_revision("model", "runs/mime", None)
    with pytest.raises(ValueError, match="and there is no folder photos/best either"):
        check_revision("model", "photos/best/checkpoint-5", None)
    with pytest.raises(ValueError, match="train it by `python examples/run_pretraining.py examples/configs/quick"):
        check_revision("model", "runs/quickstart", None)


CLIENT = """
import sys
from modeling_cots.data.revisions import check_revision
from modeling_cots.data.opening import open_dataset
from modeling_cots import COTSModel
for load in (lambda: COTSModel.from_pretrained("org/model"), lambda: open_dataset("org/pairs", "train")):
    check_revision("model", "org/model", None)
    try:
        load()
    except (OSError, ValueError) as error:
        print(type(error).__name__)
"""


class Counting(BaseHTTPRequestHandler):
    """Hangs up on everybody, and counts."""

    calls: list[str] = []

    def do_HEAD(self) -> None:
        self.calls.append(self.path)

    do_GET = do_POST = do_HEAD
    log_message = lambda self, *args: None  # noqa: E731


def test_a_hub_that_cannot_be_reached_is_tried_once(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    env = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    ended = subprocess.run([sys.executable, "-c", CLIENT], env=env, capture_output=True, text=True, check=True)
    server.shutdown()
    server.server_close()
    assert Counting.calls == ["/"]
    assert ended.stdout.split() == ["OSError", "ValueError"]
    assert ended.stderr.count(f"The hub {endpoint} cannot be reached") == 1
