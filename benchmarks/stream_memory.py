"""Peak memory of a data loader while a stream of any size goes through it; nothing is stored.

    python benchmarks/stream_memory.py --gigabytes 10 --num_workers 1

A second process makes WebDataset shards up on the fly (images of one megabyte) and serves them over http on the
loopback. Printed is the resident memory of the loader and its workers, each time another tenth has gone through.
"""

import argparse
import io
import itertools
import multiprocessing
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader

from modeling_cots.data.image_augmentation import ImageTransform
from modeling_cots.data.streaming.dataset import EndlessPairs, open_stream
from modeling_cots.scripts.error_boundary import run_script

SAMPLES_A_SHARD = 200
IMAGE_SIZE = (700, 500)  # of a bitmap: a megabyte that costs little time to decode
BATCH_SIZE = 16


def make_sample(number: int, image: bytes) -> bytes:
    """The tar blocks of an image and its caption."""
    blocks = b""
    for extension, content in (("jpg", image), ("txt", f"caption {number}".encode())):
        info = tarfile.TarInfo(f"{number:09d}.{extension}")
        info.size = len(content)
        blocks += info.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)
    return blocks


def serve(connection) -> None:
    """Answer every GET /N.tar with the samples of shard N."""
    file = io.BytesIO()
    Image.effect_noise(IMAGE_SIZE, 60).convert("RGB").save(file, "BMP")
    image = file.getvalue()

    class Shards(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(SAMPLES_A_SHARD * len(make_sample(0, image)) + 1024))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            first = int(self.path.strip("/").split(".")[0]) * SAMPLES_A_SHARD
            try:
                for number in range(first, first + SAMPLES_A_SHARD):
                    self.wfile.write(make_sample(number, image))
                self.wfile.write(b"\0" * 1024)
            except ConnectionError:  # the reader has had enough
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Shards)
    connection.send(server.server_address[1])
    server.serve_forever()


def collate(items: list[dict]) -> tuple[torch.Tensor, int]:
    """Decoded, cropped images (B, 3, 96, 96), and the bytes that they came in."""
    transform = ImageTransform((96, 96), [0.5] * 3)
    images = torch.stack([transform(item["image"]) for item in items])
    return images, sum(len(item["image"]["bytes"]) for item in items)


def resident_megabytes(server_pid: int) -> float:
    here = psutil.Process()
    family = [here, *(child for child in here.children(recursive=True) if child.pid != server_pid)]
    return sum(process.memory_info().rss for process in family) / 2**20


def measure(gigabytes: float, num_workers: int, shuffle_buffer: int) -> list[tuple[float, float]]:
    """(gigabytes gone through, resident MiB of loader and workers), ten times on the way."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        address = f"http://127.0.0.1:{ours.recv()}/{{0..999}}.tar"
        pairs = open_stream(address, "train", shuffle_buffer=shuffle_buffer)
        loader = DataLoader(EndlessPairs(pairs, BATCH_SIZE), BATCH_SIZE, num_workers=num_workers, collate_fn=collate)
        total, seen, points = gigabytes * 2**30, 0, []
        for _, num_bytes in loader:
            seen += num_bytes
            if seen >= total * (len(points) + 1) / 10:
                points.append((seen / 2**30, resident_megabytes(server.pid)))
                print(f"{points[-1][0]:7.2f} GiB   {points[-1][1]:7.0f} MiB", flush=True)
            if len(points) == 10:
                break
        assert pairs.report.skipped_shards == pairs.report.skipped_samples == 0
        return points
    finally:
        server.terminate()
        server.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--shuffle_buffer", type=int, default=100, help="images of one megabyte each")
    options = parser.parse_args()
    points = measure(options.gigabytes, options.num_workers, options.shuffle_buffer)
    early, late = points[0][1], max(megabytes for _, megabytes in itertools.islice(points, 1, None))
    print(f"largest later / after the first tenth: {late / early:.3f}")


if __name__ == "__main__":
    run_script(main)
