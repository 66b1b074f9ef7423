"""CPU time that ranking takes one process, and its share among several, on random embeddings.

    python benchmarks/rank_time.py --images 5000 --captions 25000 --processes 1 2 4 8

Both directions, one thread, without the sum over the processes at the end. What is printed for several processes is
the time of the one that has most to do.
"""

import argparse
import time

import torch
from torch.nn import functional as F

from modeling_cots.evaluation.retrieval_metrics import best_positive_ranks
from modeling_cots.scripts.error_boundary import run_script


def measure(num_images: int, num_captions: int, num_processes: int, dim: int = 256, rounds: int = 3) -> float:
    """Seconds of CPU time of the first process, which has most to do: the fastest of several rounds."""
    generator = torch.Generator().manual_seed(0)
    images, captions = (F.normalize(torch.randn(n, dim, generator=generator)) for n in (num_images, num_captions))
    image_ids, caption_ids = torch.arange(num_images), torch.arange(num_captions) % num_images
    times = []
    for _ in range(rounds):
        start = time.process_time()
        best_positive_ranks(images, captions, image_ids, caption_ids, num_processes=num_processes)
        best_positive_ranks(captions, images, caption_ids, image_ids, num_processes=num_processes)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--captions", type=int, default=25_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.images:,} images x {args.captions:,} captions, torch {torch.__version__}, one CPU thread each")
    for num_processes in args.processes:
        seconds = measure(args.images, args.captions, num_processes)
        print(f"processes: {num_processes}, CPU time of each: {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    run_script(main)
