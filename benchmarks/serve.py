"""Requests a second of `examples/serve.py`, one by one and in batches, with many clients at a time.

    python benchmarks/serve.py runs/quickstart --clients 32

Two servers run on this machine, one with `--max_batch_size 1`; each has one replica of one thread, and they are asked
in turns. A client sends its next request when it has the answer to the last.
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modeling_cots import ScenesDataset
from modeling_cots.scripts.error_boundary import run_script

SERVER = Path(__file__).parents[1] / "examples" / "serve.py"


def start(model: str, port: int, max_batch_size: int) -> subprocess.Popen:
    command = [sys.executable, str(SERVER), model, "--port", str(port), "--max_batch_size", str(max_batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    assert server.stdout is not None
    while b"Ctrl-C ends it" not in (line := server.stdout.readline()):
        if not line:
            raise ValueError(f"The server of {model} has ended before it answered.")
    return server


def ask(port: int, texts: list[str]) -> list[float]:
    """Seconds that each request of a client took."""
    connection, seconds = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
    for text in texts:
        begin = time.perf_counter()
        connection.request("POST", "/", json.dumps({"inputs": text}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise ValueError(f"The server has answered {answer.status}: {content[:200]!r}")
        seconds.append(time.perf_counter() - begin)
    connection.close()
    return seconds


def measure(port: int, captions: list[str], num_clients: int) -> tuple[float, float]:
    """Requests a second, and the median of the seconds that one took."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as clients:
        parts = [captions[number::num_clients] for number in range(num_clients)]
        seconds = [each for part in clients.map(lambda part: ask(port, part), parts) for each in part]
    return len(captions) / (time.perf_counter() - begin), statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a COTS model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1_000, help="of all clients together, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8100, help="of the first server; the second takes the next")
    args = parser.parse_args()

    captions = list(ScenesDataset("train", args.requests, 32).iter_captions())[: args.requests]
    sizes, servers, rates, times = (1, 32), [], {}, {}
    try:
        for number, size in enumerate(sizes):
            servers.append(start(args.model, args.port + number, size))
            measure(args.port + number, captions[: 4 * args.clients], args.clients)
        for _ in range(args.rounds):
            for number, size in enumerate(sizes):
                rate, median = measure(args.port + number, captions, args.clients)
                rates.setdefault(size, []).append(rate)
                times.setdefault(size, []).append(median)
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGINT)
        for server in servers:
            server.wait()
    for size in sizes:
        rate, median = statistics.median(rates[size]), statistics.median(times[size])
        print(f"max_batch_size {size:2d}: {rate:.0f} requests/s, p50 {1000 * median:.0f} ms")
    ratio = statistics.median(rates[sizes[1]]) / statistics.median(rates[sizes[0]])
    print(f"in batches / one by one: {ratio:.2f} times as many requests/s, {args.clients} clients")


if __name__ == "__main__":
    run_script(main)
