"""The data loader of a stream for `COTSTrainer`: split once, by us, and resumed where it was.

accelerate would read an iterable data set on the first process and send batches to the others, or let every process
read everything and keep its share; here each process reads its own part and nothing else.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.atomic_write import atomic_write
from ..data.streaming.dataset import READER_STATE, EndlessPairs, PairStream, SkippingCollator
from .arguments import COTSTrainingArguments

PLACE = "stream_place_"  # in a checkpoint: a file of each process


def build_stream_loader(pairs: PairStream, args: COTSTrainingArguments, collate: Callable) -> DataLoader:
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


class StreamPlace:
    """
    Where this process is in a stream: the batches that it was given, and where each of its workers was behind them.

    Workers read ahead; their states come with the batches, so that it does not matter how far.

    Args:
        pairs: The stream.
        args: Of the run.
    """

    def __init__(self, pairs: PairStream, args: COTSTrainingArguments):
        self._process_index = args.process_index
        self._identity = {
            "processes": args.world_size,
            "dataloader_num_workers": args.dataloader_num_workers,
            **pairs.identity(),
        }
        self._num_given = 0
        self._states: dict[int, dict[str, Any]] = {}
        self._before = self._num_given, self._states

    def add(self, batches: list[dict]) -> None:
        """Take the states out of the batches of a step, which is about to be taken."""
        self._before = self._num_given, dict(self._states)
        for batch in batches:
            state = json.loads(batch.pop(READER_STATE))
            self._states[state["worker"]] = state
            self._num_given += 1

    def undo(self) -> None:
        """Go back behind the batches of the last step, which was refused."""
        self._num_given, self._states = self._before

    def save(self, folder: str) -> None:
        """Write the place of this process into a checkpoint."""
        states = {str(worker): state for worker, state in self._states.items()}
        place = {"identity": self._identity, "num_given": self._num_given, "states": states}
        with atomic_write(self._file(folder)) as partial:
            partial.write_text(json.dumps(place), encoding="utf-8")

    def load(self, folder: str) -> None:
        """
        Take the place that `save` wrote.

        Raises `ValueError` where the run cannot go on there: samples would be lost and others come twice.
        """
        way = "With ignore_data_skip the run begins the stream anew."
        try:
            place = json.loads(self._file(folder).read_text(encoding="utf-8"))
            saved = place["identity"]
            states = {int(worker): state for worker, state in place["states"].items()}
            self._num_given, self._states = int(place["num_given"]), states
        except FileNotFoundError:
            others = [name for name in os.listdir(folder) if name.startswith(PLACE)]
            if not others:
                raise ValueError(
                    f"{folder} does not say where its run was in the stream: an earlier version saved it, or it was "
                    f"not trained on one. {way}"
                ) from None
            saved = json.loads(Path(folder, others[0]).read_text(encoding="utf-8"))["identity"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._file(folder)} is damaged: {error!r}. {way}") from error
        if saved != self._identity:
            differences = "; ".join(_differences(saved, self._identity))
            raise ValueError(
                f"{folder} was saved in another part of the stream than this run would read, and pairs would be lost "
                f"or come twice: {differences}. Go on with the same, or add ignore_data_skip, and the run begins the "
                "stream anew."
            )

    def go_on(self, loader, num_skipped: int) -> None:
        """Make the next iteration of a loader go on from here, behind so many batches that the Trainer throws away."""
        loader.dataset.go_on(num_skipped, self._num_given, self._states)

    def _file(self, folder: str) -> Path:
        return Path(folder, f"{PLACE}{self._process_index}.json")


def _differences(saved: dict, present: dict, of: str = "") -> list[str]:
    found = []
    for name in {**saved, **present}:
        before, now = saved.get(name), present.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f" of {name}" if name != "sources" else of)
        elif isinstance(before, dict) or isinstance(now, dict):
            found.append(f"{name} {'is new' if before is None else 'is gone'}")
        elif before != now:
            found.append(f"{'other shards' if name == 'shards' else f'{name}{of} was {before} and is {now}'}")
    return found


def stream_counts(loader, accelerator) -> dict[str, int]:
    """What all processes had to leave out so far; all of them must call it together."""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, EndlessPairs):
        return {}
    report = dataset.pairs.report
    counts = torch.tensor([report.skipped_shards, report.skipped_samples], device=accelerator.device)
    return dict(zip(("skipped_shards", "skipped_samples"), accelerator.reduce(counts).tolist(), strict=True))
