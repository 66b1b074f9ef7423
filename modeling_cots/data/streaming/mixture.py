"""Mixes several streams by weights: `mix.yaml` names the data sets, and each pair is drawn from one of them.

Which stream gives the next pair is drawn by torchdata (`MultiNodeWeightedSampler`), whose state is kept with those of
the streams; docs/data.md says why it is neither `megatron-energon` nor `datasets.interleave_datasets`.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import yaml

from ..rows import TOKEN_SOURCE
from ..skip_report import StreamReport
from .dataset import PairStream, StreamingPairs, consumer_of, open_stream
from .reading import Consumer

SUFFIXES = (".yaml", ".yml")
OPTIONS = {
    "dataset": "dataset",
    "split": "split",
    "image_column": "image_column",
    "caption_column": "caption_column",
    "dataset_config": "dataset_config",
    "dataset_revision": "revision",
    "image_tokens": "image_tokens",
}


class MixedPairs(PairStream):
    """
    Several streams without an end, mixed by weights.

    Each stream begins its next pass by itself, so that a small one is repeated and none ends the others.

    Args:
        sources: The streams by name.
        weights: By the same names: how often a stream gives a pair, relative to the others.
        seed: Seed of the draws.

    Raises `ValueError` for names that differ, a weight that is no positive number, and where some streams have cached
    image tokens and others have none.
    """

    def __init__(self, sources: Mapping[str, StreamingPairs], weights: Mapping[str, float], *, seed: int = 0):
        if len(sources) == 0 or sources.keys() != weights.keys():
            raise ValueError(f"Every source needs a weight: got {', '.join(sources)} and {', '.join(weights)}.")
        _check_weights(weights)
        self.sources, self.weights, self.seed = dict(sources), dict(weights), seed
        self.name = " + ".join(sources)
        self.report = StreamReport()
        self._share_report()
        have_tokens = {name: TOKEN_SOURCE in source.first_item() for name, source in sources.items()}
        if len(set(have_tokens.values())) > 1:
            without = ", ".join(name for name, has in have_tokens.items() if not has)
            raise ValueError(
                f"Some sources have cached image tokens, and {without} has none: give them to all, or none."
            )

    @property
    def num_shards(self) -> int:
        return sum(source.num_shards for source in self.sources.values())

    def split_by_process(self, process_index: int, num_processes: int) -> "MixedPairs":
        part = super().split_by_process(process_index, num_processes)
        assert isinstance(part, MixedPairs)
        part.sources = {
            name: source.split_by_process(process_index, num_processes) for name, source in self.sources.items()
        }
        part._share_report()
        return part

    def _share_report(self) -> None:
        for source in self.sources.values():
            source.report = self.report

    def __iter__(self) -> Iterator[dict]:
        return self.read_endless(consumer_of(self))

    def iter_captions(self) -> Iterator[str]:
        """All captions of all sources, one source after the other. This reads all shards to their end."""
        for source in self.sources.values():
            yield from source.iter_captions()

    def first_item(self) -> dict:
        return next(iter(self.sources.values())).first_item()

    def read_endless(self, consumer: Consumer, state: dict[str, Any] | None = None) -> "MixedReader":
        return MixedReader(self, consumer, state)

    def identity(self) -> dict[str, Any]:
        sources = {name: {**source.identity(), "weight": self.weights[name]} for name, source in self.sources.items()}
        return {"sources": sources, "data_seed": self.seed}


class MixedReader:
    """
    The items of a consumer of [`MixedPairs`].

    Args:
        pairs: The mixture.
        consumer: Whose part it is.
        state: Of an earlier reader, to go on where it was.
    """

    def __init__(self, pairs: MixedPairs, consumer: Consumer, state: dict[str, Any] | None = None):
        nodes = _nodes()
        sources = {name: _Source(source, consumer) for name, source in pairs.sources.items()}
        self._sampler = nodes.MultiNodeWeightedSampler(
            sources,
            {name: float(weight) for name, weight in pairs.weights.items()},
            stop_criteria=nodes.StopCriteria.CYCLE_FOREVER,
            rank=consumer.number,
            world_size=consumer.count,
            seed=pairs.seed,
        )
        if state is not None:
            drawn = state["weighted_sampler_state"]
            generator = torch.frombuffer(bytearray.fromhex(drawn["g_state"]), dtype=torch.uint8)
            state = {**state, "weighted_sampler_state": {**drawn, "g_state": generator}}
        self._sampler.reset(state)

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        return next(self._sampler)

    def state_dict(self) -> dict[str, Any]:
        """Where the reader is, in plain lists, texts and numbers."""
        state = self._sampler.state_dict()
        drawn = state["weighted_sampler_state"]
        generator = drawn["g_state"].numpy().tobytes().hex()
        return {**state, "weighted_sampler_state": {**drawn, "g_state": generator}}


def _nodes():
    try:
        import torchdata.nodes
    except ImportError as error:
        raise ValueError("A mixture needs torchdata: pip install 'modeling-cots[mixtures]'.") from error
    return torchdata.nodes


class _Source:
    """A stream by the calls that torchdata makes of a node: it asks for its items and for its state."""

    def __init__(self, pairs: StreamingPairs, consumer: Consumer):
        self._pairs, self._consumer = pairs, consumer
        self.reset()

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        self._reader = self._pairs.read_endless(self._consumer, initial_state)

    def __next__(self) -> dict:
        return next(self._reader)

    def state_dict(self) -> dict[str, Any]:
        return self._reader.state_dict()


def _check_weights(weights: Mapping[str, Any], where: str = "") -> None:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{where}the weight of {name} must be a number above 0, got {weight!r}.")


def is_mixture(dataset: str) -> bool:
    """Whether `dataset` names a file of several sources, see `open_mixture`."""
    return dataset.lower().endswith(SUFFIXES)


def open_mixture(file: str, split: str, *, shuffle_buffer: int = 1000, seed: int = 0) -> MixedPairs:
    """
    Open the streams that a YAML file lists: a name, and below it `weight`, `dataset` and options of `open_stream`.

    Args:
        file: The YAML file. Paths in it start from the working directory, as on the command line.
        split: Of the sources that name none.
        shuffle_buffer: Samples that each worker keeps in memory, of all sources together: by their weights.
        seed: Seed of the order and of all draws.

    Raises `ValueError` for a file that is missing or no such list, and as `open_stream` does, with the source's name.
    """
    _nodes()
    listed = _read(file)
    weights = {name: options.pop("weight", None) for name, options in listed.items()}
    _check_weights(weights, f"{file}: ")
    sources = {}
    for name, options in listed.items():
        share = round(shuffle_buffer * weights[name] / sum(weights.values()))
        named = {OPTIONS[option]: value for option, value in options.items()}
        # Sources of equal shards and keys would draw alike otherwise.
        own_seed = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
        try:
            sources[name] = open_stream(
                **{"split": split, **named}, shuffle_buffer=max(share, min(1, shuffle_buffer)), seed=own_seed
            )
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return MixedPairs(sources, weights, seed=seed)


def _read(file: str) -> dict[str, dict]:
    """The options of each source, checked for their names."""
    form = "a name for each source, and below it weight, dataset and further options"
    try:
        with open(file, encoding="utf-8") as text:
            node = yaml.compose(text, yaml.SafeLoader)
        _refuse_repeated(file, node)
        listed = yaml.SafeLoader("").construct_document(node) if node is not None else None
    except OSError as error:
        raise ValueError(f"There is no mixture {file}: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(listed, dict) or not listed or not all(isinstance(each, dict) for each in listed.values()):
        raise ValueError(f"{file} must hold {form}.")
    for name, options in listed.items():
        if unknown := [str(option) for option in options if option not in OPTIONS and option != "weight"]:
            raise ValueError(f"{file}: {name} has no option {unknown[0]}; there are weight, {', '.join(OPTIONS)}.")
        if "dataset" not in options:
            raise ValueError(f"{file}: {name} has no dataset.")
        for option, value in options.items():
            if option != "weight" and not isinstance(value, str):
                raise ValueError(f"{file}: {option} of {name} must be a text, got {value!r}: quote it.")
    return {str(name): options for name, options in listed.items()}


def _refuse_repeated(file: str, node: yaml.Node | None) -> None:
    """YAML itself would keep the last of several sources, or options, of one name."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            raise ValueError(f"{file}, line {key.start_mark.line + 1}: {name} is there twice.")
        seen.add(name)
        _refuse_repeated(file, value)
