"""`SearchIndex`: embed images and videos once, then find them by text, by image or by both.

An index is a folder (FAISS), a table of PostgreSQL or a collection of Milvus; `stores.py` chooses by its name. It
stores the identity of the model that it was made with and refuses any other model, whose embeddings cannot be compared
with the stored ones.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.image_augmentation import AS_TENSORS, resize_for
from ..data.skip_report import and_more
from ..hub.identity import model_identity
from ..image_reading_cots import read_pixels
from ..processing_cots import TOKENIZER_LOCK
from .conditions import Condition, as_conditions
from .embedding import MAX_REPORTED, Embedder, ImageFolder, check_text, entry_names, row_ids_of
from .index_types import TUNED_QUERIES
from .options import THUMBNAIL_SIDE
from .rows import CONTENT, join_tables
from .stores import check_can_tune, create_store, open_store
from .waiting import FAILED, new_moments, tell, wait_for

logger = logging.get_logger(__name__)

FORMAT = 2  # 2: the model's identity covers its configuration
ITEMS_PER_PART = 1_024  # a killed run loses at most one part in each process
MIN_CAPTIONS = 50  # fewer say too little about the queries to come


class SearchIndex:
    """
    An index of images, with the model that embeds queries.

    Args:
        index: A folder, a table of PostgreSQL (`postgresql://user@host/database#photos`), a Milvus Lite file
            (`photos.db`) or a Milvus server (`http://host:19530#photos`).
        model ([`COTSModel`]): The model that the index was made with.
        processor ([`COTSProcessor`]): Its processor.

    Raises `ValueError` where there is no index, and for another model or processor.
    """

    def __init__(self, index: str | os.PathLike, model, processor):
        self.store = open_store(index)
        self.model, self.processor = model.eval(), processor
        self._name, self._identity = os.fspath(index), model_identity(model, processor)
        try:
            self._check_model()
        except ValueError:
            self.store.close()
            raise

    @classmethod
    def create(
        cls,
        index,
        model,
        processor,
        *,
        engine: str = "exact",
        model_name: str | None = None,
        target_recall: float | None = None,
    ) -> "SearchIndex":
        """
        Make an empty index.

        Args:
            index, model, processor: See the class.
            engine: The index type: "exact", "hnsw", "ivfpq", "int8", (FAISS alone) "binary" or (PostgreSQL alone)
                "halfvec". docs/search.md says when to use which.
            model_name: The folder or Hub id from which `cots-search` loads the model; by default the one from which
                this model was loaded.
            target_recall: Share of the ten best images that a search is to find, above 0 and at most 1; `add` then
                chooses nprobe and candidates, see `tune`. FAISS' "ivfpq", "int8" and "binary" alone.

        Raises `ValueError` for an index type that the store lacks or that cannot have the target, and for a name in
        use.
        """
        info = describe_model(model, processor, model_name)
        if target_recall is not None:
            check_can_tune(index, engine, target_recall)
            info["target_recall"] = target_recall
        create_store(index, info, engine).close()
        return cls(index, model, processor)

    def __len__(self) -> int:
        return len(self.store)

    def add(
        self,
        dataset,
        *,
        source: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        thumbnail_side: int = THUMBNAIL_SIDE,
        progress: bool = True,
        restore: bool = False,
    ) -> int:
        """
        Embed the images and videos of a data set that are not in the index yet; this also continues a stopped run.

        Of several processes the main one alone lists the images, and gives each other process the names of its share.
        It alone builds the index, while the others wait without a collective, so that no timeout ends them.

        What an exception such as Ctrl-C interrupts is kept as far as it is embedded, and can be searched. Under
        `torchrun` or `accelerate launch` the processes share the images, each with its own copy of the model.

        Args:
            dataset: Items as `open_dataset` or `ImageFolder` give them.
            source: The `source` of these entries; by default the data set's `name`.
            batch_size: Images a forward pass.
            num_workers: Processes that decode images, beside each process that embeds.
            thumbnail_side: Pixels of the thumbnails that are stored, 0 for none.
            progress: Whether to show a bar.
            restore: Whether to embed also what was deleted from the index, which otherwise stays deleted.

        Returns how many entries were added, by all processes together.
        """
        state = process_state()
        source = getattr(dataset, "name", "data") if source is None else source
        embedder = Embedder(
            self.model,
            self.processor,
            batch_size=batch_size,
            num_workers=num_workers,
            thumbnail_side=thumbnail_side,
        )
        self._check_model()
        with self._adding(dataset, source, restore, state) as share:
            dataset = dataset if share.dataset is None else share.dataset
            total, hidden = sum(len(part) for part in share.parts), not (progress and state.is_main_process)
            with tqdm(total=total, desc="Embedding", unit="image", disable=hidden) as bar:
                for note in share.notes:
                    bar.write(note)
                contents = [
                    self._add_part(embedder.tables(dataset, part, share.names, source, bar)) for part in share.parts
                ]
            embedder.report_skipped()
            # Here all processes wait for each other, before the main one builds the index alone.
            return _count_added(list(chain.from_iterable(contents)), state)

    def _present_and_deleted(self, row_ids: np.ndarray, restore: bool) -> tuple[np.ndarray, np.ndarray]:
        """Two (n,) booleans: which of these ids are in the index, and which were deleted and are to stay so."""
        is_in = self.store.has(row_ids)
        return is_in, np.zeros_like(is_in) if restore else self.store.was_deleted(row_ids)

    def _add_part(self, tables: Iterator[pa.Table]) -> list[str]:
        """Write the tables as one part, what there is of it also where an exception ends them; returns their contents.

        Args:
            tables: Embeds while it is read.
        """
        done: list[pa.Table] = []
        try:
            for table in tables:
                done.append(table)
        finally:
            if done:
                self.store.add(join_tables(done))
        return [content for table in done for content in table[CONTENT].to_pylist()]

    @contextmanager
    def _adding(self, dataset, source: str, restore: bool, state: PartialState) -> Iterator["Share"]:
        """The time of adding in all processes: it begins and ends in the others after it did in the main process."""
        if state.num_processes == 1:
            shares, run = self._shares(dataset, source, restore, 1)
            with self.store.adding({source: run}):
                yield shares[0]
            self._reach_target()
            return
        begun, ended = new_moments("begun", "ended")
        if not state.is_main_process:
            wait_for(begun)
            self.store.refresh()
            yield _scatter(None)
            wait_for(ended)
            return
        try:
            shares, run = self._shares(dataset, source, restore, state.num_processes)
            with self.store.adding({source: run}):
                tell(begun)
                yield _scatter(shares)
            self._reach_target()
            tell(ended)
        except BaseException:
            for moment in (begun, ended):
                tell(moment, FAILED)
            raise

    def _reach_target(self) -> None:
        """Reach the index's target of recall, if it has one and has not been tuned to it yet."""
        if (target := target_to_reach(self.store)) is not None:
            logger.warning(self.tune(target))

    def _shares(self, dataset, source: str, restore: bool, num: int) -> tuple[list["Share"], dict[str, int]]:
        """What each of `num` processes is to embed, and the numbers of the run, as `VectorStore.adding` takes them."""
        names = entry_names(dataset, source)
        row_ids = row_ids_of(names)
        is_in, is_gone = self._present_and_deleted(row_ids, restore)
        run = {
            "images": len(row_ids) - int(is_gone.sum()),
            "before": int(is_in.sum()),
            "entries": count_of(self.store, source),
        }
        todo = np.flatnonzero(~is_in & ~is_gone)
        parts = _parts_of_processes(todo, num)
        shares = [Share(parts[0], names)] if num == 1 else [_share(dataset, names, each) for each in parts]
        shares[0].notes = notes_before(int(is_in.sum()), int(is_gone.sum()), len(names))
        return shares, run

    def _check_model(self) -> None:
        """Raise `ValueError` unless the index was made with this model; others may have made it anew."""
        info = self.store.info
        if info.get("format") != FORMAT:
            raise ValueError(
                f"The index {self._name!r} was made by another version of modeling_cots (its format is "
                f"{info.get('format')}, and {FORMAT} here): make a new one, under another name, with "
                "`cots-search index`."
            )
        if info["model_identity"] != self._identity:
            raise ValueError(
                f"The index {self._name!r} was made with the model {info['model']!r} ({info['model_identity'][:12]}); "
                f"this is another one, or one with another configuration or processor ({self._identity[:12]}): its "
                "embeddings cannot be compared with the stored ones. If the model has changed on the Hub, name the "
                "commit that the index was made with by --revision."
            )

    def words_note(self, text: str) -> str | None:
        """
        What to say of a text with words that the tokenizer does not know; `None` where it knows all of them.

        A word that it can only spell is not known either: one of several word pieces with less than two letters each,
        on average, as d ##o ##g. Such a word was hardly in the texts that the vocabulary was made of.
        """
        tokenizer, words = self.processor.tokenizer, re.findall(r"\w+", text)
        if not words or tokenizer.unk_token_id is None:
            return None
        with TOKENIZER_LOCK:
            pieces = [
                tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(words, add_special_tokens=False)["input_ids"]
            ]
        unknown = [
            word
            for word, each in zip(words, pieces, strict=True)
            if tokenizer.unk_token in each or _is_only_spelled(word, each)
        ]
        if not unknown:
            return None
        verb = "is" if len(unknown) == 1 else "are"
        named = and_more(unknown, MAX_REPORTED)
        return f"{len(unknown)} of {len(words)} words {verb} unknown to this model: {named}."

    @torch.no_grad()
    def embed_query(self, text: str | None = None, image: Any = None, image_weight: float = 0.5) -> np.ndarray:
        """
        The unit-length embedding (d,) of a query.

        Args:
            text: Finds images that fit this text.
            image: A path, bytes or a PIL image; finds images like it.
            image_weight: w, used where both are given: the query is (1 - w) text + w image, at unit length, so that
                images are ranked by the weighted mean of their similarities with text and image.

        Raises `ValueError` without text and image, for a text that is a path, for an unreadable image, and for a
        weight outside 0 to 1.
        """
        if text is None and image is None:
            raise ValueError("Search for a text, an image or both: got neither.")
        if text is not None:
            check_text(text)
        if not 0 <= image_weight <= 1:
            raise ValueError(f"`image_weight` lies between 0 (the text alone) and 1; got {image_weight}.")
        parts = []
        if text is not None:
            inputs = self.processor(text=[text], truncation=True, return_tensors="pt").to(self.model.device)
            weight = 1.0 if image is None else 1 - image_weight
            parts.append(weight * self.model.encode_text(inputs["input_ids"], inputs["attention_mask"])[0])
        if image is not None:
            resized = resize_for(read_pixels(image), self.processor.image_processor)
            pixels = self.processor.image_processor([resized], **AS_TENSORS, return_tensors="pt")["pixel_values"]
            weight = 1.0 if text is None else image_weight
            parts.append(weight * self.model.encode_image(pixels.to(self.model.device))[0])
        return torch.nn.functional.normalize(sum(parts), dim=0).cpu().numpy()

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        *,
        image_weight: float = 0.5,
        top: int = 12,
        where: str | Condition | Sequence[str | Condition] | None = None,
    ) -> list[dict]:
        """
        The entries that fit a query best, best first.

        Args:
            text, image, image_weight: See `embed_query`.
            top: How many at most.
            where: Conditions on metadata, all of which must hold: "year >= 2020", ["place == Oslo", "year in [1, 2]"].

        Returns dictionaries with `name`, `source`, `captions`, `thumbnail`, the metadata, `score`, the cosine, and
        `copies`, the names of entries with the same pixels: of these only the first is a result of its own. Raises
        `ValueError` for a query that `embed_query` refuses, a `top` below 1, and an invalid condition.
        """
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        query, conditions = self.embed_query(text, image, image_weight), as_conditions(where)
        self._check_model()
        wanted = top + 1  # copies have the same score: with one more image, those of the last one are complete
        while True:
            found = self.store.search(query[None], wanted, conditions)[0]
            hits = _without_copies(found)
            if len(hits) > top or len(found) < wanted:
                return hits[:top]
            wanted *= 2

    def delete(self, names: Sequence[str] | None = None, where=None) -> int:
        """
        Remove entries from all results, by their names or by conditions; returns how many were removed.

        They stay deleted when their data set is added again, unless `restore` says otherwise. Raises `ValueError`
        unless either names or conditions are given.
        """
        return delete_entries(self.store, names, where)

    def rebuild(self, engine: str, target_recall: float | None = None) -> None:
        """Change to another index type and free deleted entries; nothing is embedded again.

        A target of recall, this one or the one that the index has, is reached anew by `tune`. Raises `ValueError` for
        an index type that cannot have it.
        """
        if target_recall is not None:
            check_can_tune(self._name, engine, target_recall)
        self.store.rebuild(engine)
        target = target_to_reach(self.store) if target_recall is None else target_recall
        if target is not None:
            logger.warning(self.tune(target))

    def tune(self, target_recall: float) -> str:
        """
        Choose nprobe and the number of candidates, and store both in the index, whose queries use them from then on.

        The cheapest pair wins that finds this share of the ten best images for about 200 captions of the index, which
        are compared with all vectors exactly. Where it has fewer than 50, its vectors take their place.

        Returns a sentence about the choice. Raises `ValueError` for an index that cannot be tuned or has no images.
        """
        check_can_tune(self._name, self.store.info["engine"], target_recall)
        captions = self.store.sample_captions(TUNED_QUERIES)
        if len(captions) < MIN_CAPTIONS:
            return tune_by_vectors(self.store, target_recall, f"the index has {len(captions)} different captions")
        tuned = self.store.tune(target_recall, self._embed_captions(captions))
        return _choice(tuned, f"{len(captions)} of its captions")

    @torch.no_grad()
    def _embed_captions(self, captions: list[str], batch_size: int = 32) -> np.ndarray:
        """(n, d) unit-length embeddings of texts."""
        embeds = []
        for start in range(0, len(captions), batch_size):
            texts = captions[start : start + batch_size]
            inputs = self.processor(text=texts, truncation=True, padding=True, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            embeds.append(self.model.encode_text(inputs["input_ids"], inputs["attention_mask"]).cpu())
        return torch.nn.functional.normalize(torch.cat(embeds), dim=1).float().numpy()

    def close(self) -> None:
        """Close files and connections."""
        self.store.close()

    def __enter__(self) -> "SearchIndex":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass
class Share:
    """
    What one process is to embed.

    Args:
        parts: Positions in the data set, for each part of the index that is to be written.
        names: The name of the entry at each of these positions.
        dataset: The images, where each process needs its own alone; `None` for the data set that all have opened.
        notes: What to say before embedding begins.
    """

    parts: list[np.ndarray]
    names: Sequence[str] | Mapping[int, str]
    dataset: Any = None
    notes: list[str] = field(default_factory=list)


def describe_model(model, processor, model_name: str | None = None) -> dict:
    """What an index, or a file of embeddings, stores of the model that it was made with; see `SearchIndex.create`."""
    name = model.name_or_path if model_name is None else model_name
    return {
        "format": FORMAT,
        "model": os.path.abspath(name) if os.path.isdir(name) else name,
        # The commit of a Hub id, by which `cots-search` loads the same weights whatever is pushed later.
        "model_commit": getattr(model.config, "_commit_hash", None) if name == model.name_or_path else None,
        "model_identity": model_identity(model, processor),
        "dim": model.config.projection_dim,
    }


def process_state() -> PartialState:
    """The rank of this process, the number of processes, and the device."""
    return PartialState(cpu=not torch.cuda.is_available())


def chosen_entries(store, names: Sequence[str] | None = None, where=None) -> np.ndarray:
    """The ids of the entries that names or conditions mean. Raises `ValueError` unless either is given."""
    conditions = as_conditions(where)
    if bool(names) == bool(conditions):
        raise ValueError("Say what to delete: names, or conditions on the metadata, and not both.")
    return row_ids_of(list(names)) if names else store.find(conditions)


def delete_entries(store, names: Sequence[str] | None = None, where=None) -> int:
    """Remove entries as `SearchIndex.delete` does; needs no model."""
    return store.delete(chosen_entries(store, names, where))


def target_to_reach(store) -> float | None:
    """The target of recall that an index with images has not been tuned to yet; `None` if there is none."""
    info = store.info
    return info.get("target_recall") if "candidates" not in info and len(store) else None


def tune_by_vectors(store, target_recall: float, reason: str) -> str:
    """Tune an index by stored vectors in place of captions, and say the reason; needs no model."""
    return _choice(store.tune(target_recall), f"its own vectors, as {reason}; texts may need more")


def _choice(tuned, sample: str) -> str:
    nprobe, candidates = tuned.effort
    lists = f"nprobe {nprobe:,} and " if nprobe else ""
    return f"Chosen: {lists}{candidates:,} candidates, with recall@10 {tuned.recall:.3f} on {sample}."


def state_notes(store, name: str) -> list[str]:
    """What a user should know of an index beside its results: that it is empty, or that runs have not ended.

    Args:
        store: The index.
        name: Its name, for the messages.
    """
    runs = store.unfinished
    notes = []
    for source, run in runs.items():
        # What else has this source, as of files that are gone, has been there at the run's begin already.
        num_in = min(max(run["before"] + count_of(store, source) - run["entries"], 0), run["images"])
        notes.append(f"{num_in:,} of {run['images']:,} are in; run the same command to go on (it adds {source}).")
    if len(store) == 0 and not runs:
        notes.append(f"{name} has no images: add some by `cots-search add {shlex.quote(name)} PHOTOS/`.")
    return notes


def count_of(store, source: str) -> int:
    """How many entries have this source."""
    return len(store) and store.count([Condition("source", "==", source)])


def notes_before(num_in: int, num_gone: int, num_names: int) -> list[str]:
    """What to say before embedding begins."""
    notes = []
    if num_in:
        notes.append(f"{num_in:,} of {num_names:,} images are in the index already.")
    if num_gone:
        notes.append(
            f"{num_gone:,} of {num_names:,} images were deleted from it and stay so; --restore brings them back."
        )
    return notes


def _count_added(contents: list[str], state: PartialState) -> int:
    """How many entries all processes have added; says how many of these are copies of others."""
    everyones = gather_object(contents)
    num_copies = len(everyones) - len(set(everyones))
    if num_copies and state.is_main_process:
        logger.warning(f"{num_copies:,} of the {len(everyones):,} added images are copies of others, and shown once.")
    return len(everyones)


def _without_copies(hits: list[dict]) -> list[dict]:
    """The first of all hits with the same content, each with the names of the others as `copies`."""
    first: dict[str, dict] = {}
    for hit in hits:
        content = hit.get(CONTENT) or hit["name"]  # an index of before has no contents
        if content in first:
            first[content]["copies"].append(hit["name"])
        else:
            first[content] = {**hit, "copies": []}
    return list(first.values())


def _parts_of_processes(todo: np.ndarray, num: int) -> list[list[np.ndarray]]:
    """The parts of each of `num` processes: every n-th of n, or an equal slice where there are fewer than 2n parts."""
    parts = [todo[start : start + ITEMS_PER_PART] for start in range(0, len(todo), ITEMS_PER_PART)]
    if num > 1 and len(parts) < 2 * num:
        return [[part] if len(part) else [] for part in np.array_split(todo, num)]
    return [parts[process::num] for process in range(num)]


def _share(dataset, names: list[str], parts: list[np.ndarray]) -> Share:
    """The share of a process. Of a folder it has the paths, so that the process does not list all of them again."""
    positions = [int(position) for part in parts for position in part]
    own = {position: names[position] for position in positions}
    return Share(parts, own, dataset.only(positions) if isinstance(dataset, ImageFolder) else None)


def _scatter(shares: list[Share] | None) -> Share:
    """In each process its own of the shares that the main process gives."""
    received: list[Share] = [None]  # type: ignore[list-item]
    torch.distributed.scatter_object_list(received, shares, src=0)
    return received[0]


def _is_only_spelled(word: str, pieces: list[str]) -> bool:
    """Whether word pieces are mostly single letters. The letters of languages without spaces have no "##"."""
    num_continuing = sum(piece.startswith("##") for piece in pieces)
    return word.isalpha() and num_continuing > 0 and len(word) < 2 * len(pieces)
