"""The data loader of a stream for `COTSTrainer`: split once, by us, and resumed without doing the work again.

accelerate would read an iterable data set on the first process and send batches to the others, or let every process
read everything and keep its share; here each process reads its own part and nothing else.
"""

from collections.abc import Callable

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.streaming.dataset import EndlessPairs, SkippingCollator, StreamingPairs
from .arguments import COTSTrainingArguments


def build_stream_loader(pairs: StreamingPairs, args: COTSTrainingArguments, collate: Callable) -> DataLoader:
    """Endless batches of the part of this process, on its device; `EndlessPairs` is its `dataset`."""
    part = pairs.split_by_process(args.process_index, args.world_size)
    loader = DataLoader(
        EndlessPairs(part, args.train_batch_size),
        batch_size=args.train_batch_size,
        collate_fn=SkippingCollator(collate),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )
    # Told that there is one process alone, accelerate leaves the split to us; it still moves batches to the device.
    return prepare_data_loader(
        loader, device=args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def skip_trained_batches(loader, global_step: int, args: COTSTrainingArguments) -> None:
    """
    Before a run goes on from a checkpoint: the batches that the Trainer reads and throws away shall cost nothing.

    Samples are read and shuffled as before, so that the next batch is the one that would have come, but neither
    decoded nor tokenized.
    """
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, EndlessPairs) and not args.ignore_data_skip:
        dataset.skip(global_step * args.gradient_accumulation_steps)


def stream_counts(loader, accelerator) -> dict[str, int]:
    """What all processes had to leave out so far; all of them must call it together."""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, EndlessPairs):
        return {}
    report = dataset.pairs.report
    counts = torch.tensor([report.skipped_shards, report.skipped_samples], device=accelerator.device)
    return dict(zip(("skipped_shards", "skipped_samples"), accelerator.reduce(counts).tolist(), strict=True))
