"""Serve a model by Ray Serve: requests that arrive together go through the model together, on one or more replicas.

    python examples/serve.py runs/quickstart --replicas 2
    curl http://127.0.0.1:8000 -H "Content-Type: application/json" -d '{"inputs": ["a red circle", "a blue square"]}'

Requests and answers are those of an Inference Endpoint, with all bounds and refusals of its handler: embeddings of
texts and of images (base64, or the URL of a public host), and labels of an image. Install Ray by
`pip install -e ".[ray]"`. On a cluster, set RAY_ADDRESS=auto and give a Hub id, or a folder that all see.
"""

import argparse
import asyncio
import logging
import os
import threading

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from modeling_cots.hub.handler import INTERNAL_ERROR, EndpointHandler
from modeling_cots.scripts.error_boundary import run_script

QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # no line for each request


class Model:
    """
    One replica.

    Args:
        model: Folder or Hub id of a COTS model.
        max_batch_size, max_wait: Requests of one batch, and the seconds for which the first one waits for others.
    """

    def __init__(self, model: str, max_batch_size: int, max_wait: float):
        self.handler = EndpointHandler(model)
        self.answer.set_max_batch_size(max_batch_size)
        self.answer.set_batch_wait_timeout_s(max_wait)

    @serve.batch
    async def answer(self, requests: list) -> list:
        return await asyncio.to_thread(self.handler.answer, requests)  # meanwhile others arrive

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            data = await request.json()
        except ValueError:
            data = None
        answer = await self.answer(await asyncio.to_thread(self.handler.read, data))
        is_refused, is_fault = isinstance(answer, dict), answer == {"error": INTERNAL_ERROR}
        return JSONResponse(answer, status_code=500 if is_fault else 400 if is_refused else 200)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a COTS model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets everybody in")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model")
    parser.add_argument("--gpus_per_replica", type=float, default=0, help="0: on CPUs")
    parser.add_argument("--max_batch_size", type=int, default=32, help="requests that are computed together")
    parser.add_argument("--max_wait", type=float, default=0.005, help="seconds that a request waits for others")
    args = parser.parse_args()

    # 1. Ray: the cluster of RAY_ADDRESS, or this machine alone.
    logging.getLogger("ray").setLevel(logging.WARNING)
    if "RAY_ADDRESS" not in os.environ:
        num_cpus = max(os.cpu_count() or 1, args.replicas + 2)  # beside the replicas, the proxy and the controller
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
    serve.start(http_options={"host": args.host, "port": args.port}, logging_config=QUIET)

    # 2. The replicas.
    deployment = serve.deployment(
        Model,
        num_replicas=args.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": args.gpus_per_replica},
        # Those being computed and the next ones being read. Others wait in the proxy, which looks less and less often
        # whether a replica takes them.
        max_ongoing_requests=max(100, 4 * args.max_batch_size),
        logging_config=QUIET,
    )
    model = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    application = deployment.bind(model, args.max_batch_size, args.max_wait)

    # 3. Until Ctrl-C.
    try:
        serve.run(application)
        print(f"{args.model} is served at http://{args.host}:{args.port}; Ctrl-C ends it.", flush=True)
        threading.Event().wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    run_script(main)
