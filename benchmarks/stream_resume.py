"""CPU time of going on in a stream from its state, and of reading it again up to the same place.

    python benchmarks/stream_resume.py --shards 100 --samples 500 --kilobytes 20 --shuffle_buffer 1000

Writes WebDataset shards of random bytes into a temporary folder and stops at nine tenths of them, in one worker.
Nothing is decoded, as in a run that goes on.
"""

import argparse
import itertools
import json
import random
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

from modeling_cots.data.streaming.dataset import open_stream
from modeling_cots.data.streaming.reading import Consumer, EndlessReader
from modeling_cots.scripts.error_boundary import run_script


def write_shard(path: Path, num_samples: int, num_bytes: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(num_samples):
            for name, content in ((f"{number}.jpg", random.randbytes(num_bytes)), (f"{number}.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--samples", type=int, default=500, help="of a shard")
    parser.add_argument("--kilobytes", type=int, default=20, help="of an image")
    parser.add_argument("--shuffle_buffer", type=int, default=1000)
    args = parser.parse_args()
    place = args.shards * args.samples * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(args.shards):
            write_shard(Path(folder) / f"train-{shard:05d}.tar", args.samples, args.kilobytes * 1024)
        pairs = open_stream(folder, "train", shuffle_buffer=args.shuffle_buffer)
        start = time.process_time()
        reader = EndlessReader(pairs, Consumer(0, 1))
        for _ in itertools.islice(reader, place):
            pass
        again = time.process_time() - start
        state, expected = json.dumps(reader.state_dict()), next(reader)
        start = time.process_time()
        assert next(EndlessReader(pairs, Consumer(0, 1), json.loads(state))) == expected
        seconds = time.process_time() - start
    print(f"{place:,} samples read again: {again:.2f} s of CPU time")
    print(f"gone on from a state of {len(state):,} bytes: {seconds:.2f} s")


if __name__ == "__main__":
    run_script(main)
