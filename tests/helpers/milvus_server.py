"""Runs a command beside a real Milvus server, the standalone one of the package `milvus`. The command
finds its address in COTS_TEST_MILVUS:

    unshare --net --pid --fork --kill-child --mount-proc python tests/helpers/milvus_server.py FOLDER pytest ...

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

VARIABLE = "COTS_TEST_MILVUS"
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


def main() -> int:
    folder, *command = sys.argv[1:]
    from milvus import MilvusServer

    bring_loopback_up()
    server = MilvusServer(wait_for_started=False)
    server.set_base_dir(folder)
    for name, value in SETTINGS.items():
        server.config.set(name, value)
    server.start()
    try:
        server.wait_started(timeout=1_000 * PATIENCE)
        address = f"http://127.0.0.1:{server.listen_port}"
        return subprocess.run(command, env={**os.environ, VARIABLE: address}).returncode
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
