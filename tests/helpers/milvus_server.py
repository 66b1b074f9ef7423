"""Runs a command beside a real Milvus server, the standalone one of the package `milvus`. The command
finds its address in COTS_TEST_MILVUS:

    unshare --net --pid --fork --kill-child --mount-proc python tests/helpers/milvus_server.py FOLDER pytest ...

With --bucket before FOLDER its storage is a bucket of an S3 server, the one of the package `moto`, whose address and
credentials are in the usual variables, and whose name is in COTS_TEST_MILVUS_STORAGE.

The server listens at all addresses of its machine. In a network of its own, which `unshare` makes, nobody reaches it
but the command; there the loopback interface is down at first. It looks up by its number how much memory it takes, and
so needs a /proc of its own processes: in another one it finds none, and tries without an end to load a collection.
"""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack

VARIABLE, STORAGE_VARIABLE = "COTS_TEST_MILVUS", "COTS_TEST_MILVUS_STORAGE"
BUCKET = {  # the names and words that the server's configuration has by default
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
    "AWS_ACCESS_KEY_ID": "minioadmin",
    "AWS_SECRET_ACCESS_KEY": "minioadmin",
    "AWS_DEFAULT_REGION": "us-east-1",
    STORAGE_VARIABLE: "s3://a-bucket/loads",
}
IN_A_NETWORK_OF_ITS_OWN = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
IN_A_NETWORK_OF_ITS_OWN += [] if os.geteuid() == 0 else ["--map-root-user"]
PATIENCE = 600  # seconds; 22 on a machine with nothing else to do
SETTINGS = {
    # Milliseconds between two looks at what there is to do, for a server that has little of it. Each read waits for
    # the next tick, as collections are strongly consistent.
    "proxy.timeTickInterval": 50,
    "queryCoord.checkInterval": 100,
    "queryCoord.distPullInterval": 100,
    "common.session.ttl": 600,  # seconds after which its parts are given up; a busy machine lets them wait
}
SET_FLAGS, IS_UP = 0x8914, 0x1  # SIOCSIFFLAGS and IFF_UP


def bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh14x", b"lo", IS_UP))


def start_s3() -> subprocess.Popen:
    """An S3 server, which answers."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "9000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with socket.socket() as any_socket:
            if any_socket.connect_ex(("127.0.0.1", 9000)) == 0:
                break
        time.sleep(0.1)
    return process


def main() -> int:
    is_bucket = sys.argv[1] == "--bucket"
    folder, *command = sys.argv[1 + is_bucket :]
    from milvus import MilvusServer

    bring_loopback_up()
    variables, settings, after = {}, SETTINGS, ExitStack()
    if is_bucket:
        after.callback(start_s3().kill)
        variables, settings = BUCKET, {**SETTINGS, "common.storageType": "minio"}
    server = MilvusServer(wait_for_started=False)
    server.set_base_dir(folder)
    for name, value in settings.items():
        server.config.set(name, value)
    server.start()
    after.callback(server.stop)
    with after:
        server.wait_started(timeout=1_000 * PATIENCE)
        address = f"http://127.0.0.1:{server.listen_port}"
        return subprocess.run(command, env={**os.environ, **variables, VARIABLE: address}).returncode


if __name__ == "__main__":
    sys.exit(main())
