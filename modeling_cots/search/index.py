"""`SearchIndex`: embed images once, then find them by text, by image or by both.

An index is a folder (FAISS) or a collection of Milvus; `stores.py` chooses by its name. It stores the identity of the
model that it was made with and refuses any other model, whose embeddings cannot be compared with the stored ones.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..hub.identity import model_identity
from ..image_reading_cots import read_image
from .conditions import Condition, as_conditions
from .embedding import THUMBNAIL_SIDE, Embedder, check_text, entry_names, row_ids_of
from .rows import join_tables
from .stores import create_store, open_store

FORMAT = 2  # 2: the model's identity covers its configuration
ITEMS_PER_PART = 1_024  # a killed run loses at most one part in each process


class SearchIndex:
    """
    An index of images, with the model that embeds queries.

    Args:
        index: A folder, a Milvus Lite file (`photos.db`) or a Milvus server (`http://host:19530#photos`).
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
    def create(cls, index, model, processor, *, engine: str = "exact", model_name: str | None = None) -> "SearchIndex":
        """
        Make an empty index.

        Args:
            index, model, processor: See the class.
            engine: The index type: "exact", "hnsw", "ivfpq", "int8", or (FAISS alone) "binary". docs/search.md says
                when to use which.
            model_name: The folder or Hub id from which `cots-search` loads the model; by default the one from which
                this model was loaded.

        Raises `ValueError` for an index type that the store lacks and for a name in use.
        """
        name = model.name_or_path if model_name is None else model_name
        info = {
            "format": FORMAT,
            "model": os.path.abspath(name) if os.path.isdir(name) else name,
            # The commit of a Hub id, by which `cots-search` loads the same weights whatever is pushed later.
            "model_commit": getattr(model.config, "_commit_hash", None) if name == model.name_or_path else None,
            "model_identity": model_identity(model, processor),
            "dim": model.config.projection_dim,
        }
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
    ) -> int:
        """
        Embed the images of a data set that are not in the index yet; this also continues a killed run.

        Under `torchrun` or `accelerate launch` the processes share the images, each with its own copy of the model.

        Args:
            dataset: Items as `open_dataset` or `ImageFolder` give them.
            source: The `source` of these entries; by default the data set's `name`.
            batch_size: Images a forward pass.
            num_workers: Processes that decode images, beside each process that embeds.
            thumbnail_side: Pixels of the thumbnails that are stored, 0 for none.
            progress: Whether to show a bar.

        Returns how many entries were added, by all processes together.
        """
        state = process_state()
        source = getattr(dataset, "name", "data") if source is None else source
        names = entry_names(dataset, source)
        embedder = Embedder(
            self.model,
            self.processor,
            batch_size=batch_size,
            num_workers=num_workers,
            thumbnail_side=thumbnail_side,
        )
        self._check_model()
        with self._adding(state):
            todo = np.flatnonzero(~self.store.has(row_ids_of(names)))
            state.wait_for_everyone()  # no process writes before all have read
            parts, num_added = _local_parts(todo, state), 0
            total, hidden = sum(len(part) for part in parts), not (progress and state.is_main_process)
            with tqdm(total=total, desc="Embedding", unit="image", disable=hidden) as bar:
                if len(todo) < len(names) and state.is_main_process:
                    bar.write(f"{len(names) - len(todo):,} of {len(names):,} images are in the index already.")
                for part in parts:
                    tables = list(embedder.tables(dataset, part, names, source, bar))
                    if tables:
                        self.store.add(join_tables(tables))
                        num_added += sum(map(len, tables))
        embedder.report_skipped()
        return sum(gather_object([num_added]))

    @contextmanager
    def _adding(self, state: PartialState) -> Iterator[None]:
        """The time of adding in all processes; the main process begins before the others and ends after them."""
        if state.is_main_process:
            with self.store.adding():
                state.wait_for_everyone()
                yield
                state.wait_for_everyone()
        else:
            state.wait_for_everyone()
            self.store.refresh()
            yield
            state.wait_for_everyone()
        state.wait_for_everyone()

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
            pixels = self.processor.image_processor([read_image(image)], return_tensors="pt")["pixel_values"]
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

        Returns dictionaries with `name`, `source`, `captions`, `thumbnail`, the metadata, and `score`, the cosine.
        Raises `ValueError` for a query that `embed_query` refuses, a `top` below 1, and an invalid condition.
        """
        if top < 1:
            raise ValueError(f"`top` must be at least 1, got {top}.")
        query = self.embed_query(text, image, image_weight)
        self._check_model()
        return self.store.search(query[None], top, as_conditions(where))[0]

    def delete(self, names: Sequence[str] | None = None, where=None) -> int:
        """
        Remove entries from all results, by their names or by conditions; returns how many were removed.

        Raises `ValueError` unless either names or conditions are given.
        """
        return delete_entries(self.store, names, where)

    def rebuild(self, engine: str) -> None:
        """Change to another index type and free deleted entries; nothing is embedded again."""
        self.store.rebuild(engine)

    def close(self) -> None:
        """Close files and connections."""
        self.store.close()

    def __enter__(self) -> "SearchIndex":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def process_state() -> PartialState:
    """The rank of this process, the number of processes, and the device."""
    return PartialState(cpu=not torch.cuda.is_available())


def delete_entries(store, names: Sequence[str] | None = None, where=None) -> int:
    """Remove entries as `SearchIndex.delete` does; needs no model."""
    conditions = as_conditions(where)
    if bool(names) == bool(conditions):
        raise ValueError("Say what to delete: names, or conditions on the metadata, and not both.")
    return store.delete(row_ids_of(list(names)) if names else store.find(conditions))


def _local_parts(todo: np.ndarray, state: PartialState) -> list[np.ndarray]:
    """The parts of this process: every n-th of n processes, or an equal slice where there are fewer than 2n parts."""
    parts = [todo[start : start + ITEMS_PER_PART] for start in range(0, len(todo), ITEMS_PER_PART)]
    if state.num_processes == 1:
        return parts
    if len(parts) < 2 * state.num_processes:
        local = np.array_split(todo, state.num_processes)[state.process_index]
        return [local] if len(local) else []
    return parts[state.process_index :: state.num_processes]
