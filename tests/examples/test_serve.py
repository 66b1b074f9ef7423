"""`examples/serve.py`: many clients at a time get the answers of the handler, each its own."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from image_files import as_base64
from programs import kill_with_children

from modeling_cots import ScenesDataset
from modeling_cots.hub.handler import EndpointHandler

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
LABELS = ["a red circle", "a blue square", "two stars"]


def ask(address: str, body) -> tuple[int, object]:
    """The status and the answer of a request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(address, content, {"Content-Type": "application/json"}), timeout=120) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_many_clients_get_the_answers_of_the_handler(saved_model, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "examples/serve.py", str(saved_model), "--port", str(port), "--max_wait", "0.05"]
    environment, errors = {**os.environ, "PYTHONPATH": str(ROOT)}, tmp_path / "errors.txt"
    with errors.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file)
    try:
        said = b""
        while b"Ctrl-C ends it" not in said:
            line = process.stdout.readline()
            assert line, "the program has ended"
            said = line
        address = f"http://127.0.0.1:{port}"
        assert address in said.decode()
        bodies = [{"inputs": f"a red circle and {number} stars"} for number in range(8)]
        bodies += [{"inputs": {"image": as_base64(item["image"])}} for item in ScenesDataset("train", 8, 32)]
        bodies += [{"inputs": LABELS}, {"inputs": bodies[8]["inputs"] | {"candidate_labels": LABELS}}]
        with ThreadPoolExecutor(len(bodies)) as clients:
            answers = list(clients.map(lambda body: ask(address, body), bodies))
        handler = EndpointHandler(str(saved_model))
        for body, (status, answer) in zip(bodies, answers, strict=True):
            expected = handler(body)
            assert status == 200
            if "candidate_labels" in body["inputs"]:
                assert [each["label"] for each in answer] == [each["label"] for each in expected]
            elif body["inputs"] == LABELS:
                assert [pytest.approx(each, abs=1e-5) for each in expected] == answer
            else:
                assert answer == pytest.approx(expected, abs=1e-5)
        assert ask(address, {"inputs": " "}) == (
            400,
            {"error": "'text' has a string that is empty or not valid Unicode"},
        )
        assert ask(address, b"no JSON")[0] == 400
        assert "POST" not in errors.read_text(), "no line for each request"
    finally:
        kill_with_children(process)
        process.stdout.close()
