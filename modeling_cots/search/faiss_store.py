"""`FaissStore`: a search index in one local folder, rows as a `datasets` folder and vectors in FAISS.

The rows are authoritative, and the vectors' index is derived from them. The manifest, written last, makes both one
generation (`manifest.py`). Each call looks for a newer generation first. A writer holds the lock, starts from the
newest generation, and writes the next one whole or not at all. Rows that a killed run had written are taken up by the
next writer.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from ..data.atomic_write import PARTIAL_SUFFIX
from .conditions import Condition, matching_rows
from .faiss_vectors import FaissVectors
from .index_types import FAISS, INDEX_TYPES, TUNED_QUERIES, check_index_type, check_target_recall, effort_of
from .manifest import (
    EIGHT_DIGITS,
    MANIFEST,
    Manifest,
    MissingFileError,
    WrittenPart,
    checked_bytes,
    describe_file,
    holds_rows,
    parse_manifest,
    read_manifest,
)
from .rows import (
    DATASETS_FILES,
    METADATA,
    Part,
    Rows,
    are_among,
    as_hit,
    describe_for_datasets,
    files_of,
    groups_to_merge,
    remove_part,
    unify_metadata,
    unlisted_parts,
    write_deleted,
    write_part,
    write_removed,
)
from .tuning import Sample, Tuned, choose_effort

LOCK = "writer.lock"
TUNED = "nprobe", "candidates"  # what `tune` adds to `info` beside its target, in the order of `SearchEffort`
MAX_LOOKED_AT = 100  # entries, for each caption that is wanted
# What a writer may remove; it never touches any other file of the folder.
OWN_FILES = (
    f"data-{EIGHT_DIGITS}-*.arrow",
    f"{METADATA}/data-{EIGHT_DIGITS}-*.parquet",
    f"deleted-{EIGHT_DIGITS}.parquet",
    f"removed-{EIGHT_DIGITS}.parquet",
    f"vectors-{EIGHT_DIGITS}.faiss",
    f"thresholds-{EIGHT_DIGITS}.npy",
    MANIFEST,
    *DATASETS_FILES,
)


class Generation:
    """
    One generation of an index, with its rows and vectors; nothing in it changes, so that threads can share it.

    Args:
        folder: The index.
        manifest: The generation.
        known: Another generation, whose files are not read again.

    Raises `DamagedIndexError` for a file that is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest, known: "Generation | None" = None):
        self.folder, self.manifest = folder, manifest
        self.rows = Rows(folder, manifest, None if known is None else known.rows)
        self._vectors: FaissVectors | None = None
        if known is not None and known._vectors is not None and known._vector_files() == self._vector_files():
            self._vectors = known._vectors.over(self.rows.embeddings, effort_of(manifest.info))

    def vectors(self) -> FaissVectors:
        """The vectors' index, which is read at the first call. Raises `DamagedIndexError`."""
        if self._vectors is None:
            self._vectors = self.read_vectors()
        return self._vectors

    def read_vectors(self) -> FaissVectors:
        """The vectors' index as its files have it, to be changed. Raises `DamagedIndexError`."""
        info = self.manifest.info
        vectors = FaissVectors(info["engine"], info["dim"], self.rows.embeddings, effort_of(info))
        if self.manifest.vectors is None:
            return vectors
        for name, stored in self._vector_files():
            checked_bytes(self.folder, name, stored)
        paths = [self.folder / name for name, _ in self._vector_files()]
        try:
            vectors.load(*paths)
        except (RuntimeError, OSError) as error:  # removed since it was checked
            raise MissingFileError(f"{str(paths[0])!r} cannot be read: {error}") from error
        return vectors

    def _vector_files(self) -> list[tuple[str, tuple[int, int]]]:
        names = [name for name in (self.manifest.vectors, self.manifest.thresholds) if name is not None]
        return [(name, self.manifest.files[name]) for name in names]


class FaissStore:
    """
    Entries in a folder that `create` made; `stores.VectorStore` documents the methods.

    Args:
        folder: The index.

    Raises `ValueError` where there is no index, and `DamagedIndexError` for a damaged one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._loading = threading.Lock()
        self._raw = b""
        self._held: Generation | None = None
        # The held generation with the parts that unfinished runs have written for it.
        self._growing: Generation | None = None
        self._grown: dict[str, WrittenPart] = {}
        # The generation that `add` writes for, and the columns that it and these entries have.
        self._session: int | None = None
        self._written: list[WrittenPart] = []  # by this handle in this session, where not merged yet
        self._schema = pa.schema([])
        self._newest()

    @classmethod
    def create(cls, folder: str | os.PathLike, info: dict, index_type: str) -> "FaissStore":
        """Make an empty index that stores `info`, which must hold `dim`.

        Raises `ValueError` for an unknown index type and for a folder in use.
        """
        cls.check_can_create(folder, index_type)
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"The folder {str(folder)!r} cannot be made: {error}.") from error
        with _lock(folder):
            _check_is_free(folder)
            with _as_value_error(folder):
                Manifest(generation=1, info={**info, "engine": index_type}).write(folder)
        return cls(folder)

    @classmethod
    def check_can_create(cls, folder: str | os.PathLike, index_type: str) -> None:
        """Raise `ValueError` for an unknown index type and for a folder in use."""
        check_index_type(index_type, FAISS)
        _check_is_free(Path(folder))

    @property
    def info(self) -> dict:
        """The dictionary that `create` was given, and the present index type as `engine`."""
        return self._newest().manifest.info

    @property
    def unfinished(self) -> dict[str, dict[str, int]]:
        """The runs of `adding` that have not ended, by their sources."""
        return self._newest().manifest.unfinished

    def __len__(self) -> int:
        return int(self._visible().rows.is_alive.sum())

    @property
    def columns(self) -> list[str]:
        """The columns that conditions may name."""
        return self._visible().rows.filterable.column_names

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""
        rows = self._visible().rows
        return are_among(row_ids, rows.row_ids[rows.is_alive])

    def was_deleted(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids `delete` has removed, and nobody has added again."""
        return are_among(row_ids, self._newest().rows.removed) & ~self.has(row_ids)

    @contextmanager
    def adding(self, unfinished: Mapping[str, dict[str, int]] = MappingProxyType({})) -> Iterator[None]:
        """Be the only writer, and take up what a killed one had written; see `VectorStore`."""
        with self._writing() as newest:
            begun = replace(newest.manifest, unfinished={**newest.manifest.unfinished, **unfinished})
            self._commit(newest, begun)  # the next generation: late parts of older runs do not belong to it
            self.refresh()
            yield
            self._session = None
            newest = self._taken_up(self._newest())
            left = {source: run for source, run in newest.manifest.unfinished.items() if source not in unfinished}
            self._commit(newest, replace(newest.manifest, unfinished=left), is_whole=True)

    def refresh(self) -> None:
        """Take part in the adding of another process, which has begun: `add` writes for the newest generation."""
        newest = self._newest()
        self._session, self._schema = newest.manifest.generation, newest.rows.filterable.schema
        self._written = []

    def add(self, rows: pa.Table) -> None:
        """Write entries to the disk; they are found when `adding` ends."""
        newest = self._newest()
        if self._session != newest.manifest.generation:
            raise ValueError(
                f"Another process has written to {str(self.folder)!r} since this one began to add: repeat the "
                "command; it continues."
            )
        self._schema = unify_metadata(self._schema, rows.schema)
        if len(rows):
            with _as_value_error(self.folder):
                self._written.append(write_part(self.folder, [rows], newest.rows.dim, self._session))
                self._merge_written(newest.rows.dim)

    def _merge_written(self, dim: int) -> None:
        """Merge what this handle has written, so that a long run does not leave more parts than can be mapped."""
        assert self._session is not None  # as `add` has checked
        sizes = [(part.name, part.num_rows) for part in self._written]
        for group in groups_to_merge(sizes):
            files = {name: stored for part in self._written for name, stored in part.files.items()}
            parts = [Part(self.folder, name, num_rows, files) for name, num_rows in sizes if name in group]
            merged = write_part(self.folder, _tables_of(parts), dim, self._session, replaces=group)
            place = [part.name for part in self._written].index(group[0])
            self._written[place : place + len(group)] = [merged]
            for name in group:
                remove_part(self.folder, name)

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        """The best entries for each query; see `VectorStore`."""
        newest = self._visible(with_vectors=True)
        rows, vectors = newest.rows, newest.vectors()
        allowed = rows.is_alive
        if where:
            allowed = allowed & matching_rows(rows.filterable, where, allowed)
        if not allowed.any():
            return [[] for _ in queries]
        is_everything = not where and rows.are_all_alive and len(vectors) == len(rows)
        scores, positions = vectors.search(queries, top, None if is_everything else allowed)
        results = []
        for row_scores, row_positions in zip(scores, positions, strict=True):
            found = row_positions >= 0
            entries = rows.take(row_positions[found])
            results.append([as_hit(row, float(score)) for row, score in zip(entries, row_scores[found], strict=True)])
        return results

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""
        rows = self._visible().rows
        return rows.row_ids[rows.is_alive & matching_rows(rows.filterable, where, rows.is_alive)]

    def count(self, where: list[Condition]) -> int:
        """How many entries satisfy all conditions."""
        return len(self.find(where))

    def names_of(self, row_ids: np.ndarray) -> list[str]:
        """The names of those of these entries that are in the index."""
        rows = self._visible().rows
        return rows.filterable["name"].take(rows.positions_of(row_ids)).to_pylist()

    def delete(self, row_ids: np.ndarray) -> int:
        """Remove entries from all results; returns how many of these ids were in the index."""
        with self._writing() as newest, _as_value_error(self.folder):
            positions = newest.rows.positions_of(row_ids)
            if len(positions):
                is_alive = newest.rows.is_alive.copy()
                is_alive[positions] = False
                deleted, removed = (
                    f"{kind}-{newest.manifest.generation + 1:08d}.parquet" for kind in ("deleted", "removed")
                )
                ids = np.union1d(newest.rows.removed, newest.rows.row_ids[positions])
                files = {
                    deleted: write_deleted(self.folder, deleted, np.flatnonzero(~is_alive)),
                    removed: write_removed(self.folder, removed, ids),
                }
                self._commit(newest, newest.manifest.with_files(files, deleted=deleted, removed=removed))
        return len(positions)

    def rebuild(self, index_type: str) -> None:
        """Write all entries that are not deleted again, with another index type; nothing is embedded again.

        nprobe and candidates that `tune` has chosen are dropped, because they hold for the former lists.
        """
        check_index_type(index_type, FAISS)
        with self._writing() as newest, _as_value_error(self.folder):
            number, removed = newest.manifest.generation, newest.manifest.removed
            kept = Manifest(
                generation=number,
                info=_untuned(newest.manifest.info, index_type),
                files={} if removed is None else {removed: newest.manifest.files[removed]},
                removed=removed,
                unfinished=newest.manifest.unfinished,
            )
            # Written for the next generation: if this is killed, nobody takes these parts up for the present one.
            living = newest.rows.living_tables()
            parts = [write_part(self.folder, tables, newest.rows.dim, number + 1) for tables in living]
            self._commit(newest, kept.with_parts(parts), is_whole=True)

    def sample_captions(self, num: int) -> list[str]:
        """At most `num` different captions of the entries, drawn at random, one an entry; always the same ones."""
        rows = self._newest().rows
        rng = np.random.default_rng(0)
        drawn = rng.permutation(np.flatnonzero(rows.is_alive))[: MAX_LOOKED_AT * num]
        found: dict[str, None] = {}  # in order
        for captions in rows.captions(drawn):
            captions = [caption for caption in captions if caption.strip()]
            if captions:
                found.setdefault(captions[rng.integers(len(captions))])
            if len(found) == num:
                break
        return list(found)

    def tune(self, target: float, queries: np.ndarray | None = None) -> Tuned:
        """
        Choose what a search costs for a target of recall, and store it with the target; later queries use it.

        Args:
            target: Share of the ten best entries that are to be found, above 0 and at most 1.
            queries: (Q, d) unit-length embeddings of texts; by default 200 of the stored vectors.

        Raises `ValueError` for an index type that cannot be tuned, and for an index that has no codes yet.
        """
        with self._writing() as newest:
            info = newest.manifest.info
            check_target_recall(target, info["engine"])
            vectors = newest.vectors()
            if len(vectors) == 0:
                raise ValueError(f"{str(self.folder)!r} has no images yet: add some before tuning it.")
            own = np.full(0 if queries is None else len(queries), -1)
            if queries is None:
                own = _drawn(newest.rows.is_alive[: len(vectors)])
                queries = newest.rows.embeddings(own)
            tuned = choose_effort(vectors, Sample(queries, own), newest.rows.is_alive[: len(vectors)], target)
            chosen = dict(zip(TUNED, tuned.effort, strict=True))
            with _as_value_error(self.folder):
                self._commit(newest, replace(newest.manifest, info={**info, "target_recall": target, **chosen}))
        return tuned

    def close(self) -> None:
        """Nothing is held open."""

    def _newest(self, with_vectors: bool = False) -> Generation:
        """The newest generation, read where it is another than the one that is held."""
        with self._loading:
            while True:
                raw = read_manifest(self.folder)
                try:
                    newest = self._held
                    if newest is None or raw != self._raw:
                        newest = Generation(self.folder, parse_manifest(raw, self.folder), newest)
                        self._raw, self._held = raw, newest
                    if with_vectors:
                        newest.vectors()
                    return newest
                except MissingFileError:
                    if read_manifest(self.folder) == raw:  # else a newer generation has replaced the file
                        raise

    def _visible(self, with_vectors: bool = False) -> Generation:
        """The newest generation with the parts that runs which have not ended have written for it so far."""
        while True:
            newest = self._newest(with_vectors)
            if not newest.manifest.unfinished:
                return newest
            try:
                with self._loading:
                    return self._with_grown_parts(newest)
            except MissingFileError:
                # Else a newer generation, or a merged part, has replaced the file.
                if self._newest() is newest and all((self.folder / name).exists() for name in self._grown_files()):
                    raise

    def _grown_files(self) -> list[str]:
        """The files by which the parts that unfinished runs have written were found."""
        return [files_of(name)[1] for name in self._grown]

    def _with_grown_parts(self, newest: Generation) -> Generation:
        parts = unlisted_parts(self.folder, newest.manifest, self._grown)
        self._grown = {part.name: part for part in parts}
        manifest = newest.manifest.with_parts(parts)
        if self._growing is None or self._growing.manifest != manifest:
            try:
                self._growing = Generation(self.folder, manifest, newest if self._growing is None else self._growing)
            except pa.ArrowException:  # two processes have written columns of two kinds: the next writer refuses them
                return newest
        if self._growing._vectors is None and newest._vectors is not None:
            effort = effort_of(newest.manifest.info)
            self._growing._vectors = newest._vectors.over(self._growing.rows.embeddings, effort)
        return self._growing

    @contextmanager
    def _writing(self) -> Iterator[Generation]:
        """Hold the lock; gives the newest generation with the parts that a killed writer of it had written."""
        with _lock(self.folder):
            self._remove_unlisted()
            try:
                yield self._taken_up(self._newest())
            finally:
                self._session = None
                self._remove_unlisted()

    def _taken_up(self, newest: Generation) -> Generation:
        """This generation with the parts that were written for it; the manifest on the disk does not list them yet."""
        parts = unlisted_parts(self.folder, newest.manifest)
        schema = newest.rows.filterable.schema
        for part in parts:
            try:
                schema = unify_metadata(schema, part.looked_at)
            except ValueError:  # of another process than the part before: neither could know
                for name in part.files:
                    (self.folder / name).unlink()
                raise
        return Generation(self.folder, newest.manifest.with_parts(parts), newest) if parts else newest

    def _commit(self, newest: Generation, manifest: Manifest, is_whole: bool = False) -> None:
        """Write the next generation: the vectors of new rows, then the manifest.

        Args:
            newest: The generation before it, whose loaded parts are kept.
            manifest: The next one but for its number and its vectors; its rows are on the disk.
            is_whole: Whether all rows are there, so that codes can be trained on them.
        """
        number = manifest.generation + 1
        manifest = replace(manifest, generation=number)
        if is_whole:
            with _as_value_error(self.folder):
                manifest = self._with_merged_parts(manifest)
        following = Generation(self.folder, manifest, newest)
        needs_training = manifest.vectors is None and INDEX_TYPES[manifest.info["engine"]].candidates is not None
        with _as_value_error(self.folder):
            if manifest.num_vectors < manifest.num_rows and (is_whole or not needs_training):
                vectors = following.read_vectors()
                vectors.grow(manifest.num_rows)
                names = f"vectors-{number:08d}.faiss", f"thresholds-{number:08d}.npy"
                written = vectors.save(*(self.folder / name for name in names))
                manifest = manifest.with_files(
                    {path.name: describe_file(path) for path in written},
                    vectors=names[0],
                    thresholds=names[1] if len(written) > 1 else None,
                    num_vectors=manifest.num_rows,
                )
                following.manifest, following._vectors = manifest, vectors
            describe_for_datasets(self.folder, manifest)
            manifest.write(self.folder)
        with self._loading:
            self._raw, self._held = read_manifest(self.folder), following

    def _with_merged_parts(self, manifest: Manifest) -> Manifest:
        """The manifest with one part in place of many small ones; it is the next one, and not on the disk yet."""
        for group in groups_to_merge(manifest.parts):
            parts = [Part(self.folder, name, num, manifest.files) for name, num in manifest.parts if name in group]
            dim = manifest.info["dim"]
            merged = write_part(self.folder, _tables_of(parts), dim, manifest.generation, replaces=group)
            manifest = manifest.with_merged(merged)
        return manifest

    def _remove_unlisted(self) -> None:
        """Remove the files of older generations and of killed writers, as the only writer."""
        manifest = parse_manifest(read_manifest(self.folder), self.folder)
        unlisted = unlisted_parts(self.folder, manifest)
        kept = {MANIFEST, *DATASETS_FILES, *manifest.files, *(name for part in unlisted for name in part.files)}
        for pattern in OWN_FILES:
            for path in (*self.folder.glob(pattern), *self.folder.glob(pattern + PARTIAL_SUFFIX)):
                if path.relative_to(self.folder).as_posix() not in kept:
                    path.unlink(missing_ok=True)


def _untuned(info: dict, index_type: str) -> dict:
    """The `info` of a rebuilt index. Its target of recall stays where the type can have one."""
    is_dropped = set(TUNED) if INDEX_TYPES[index_type].is_tunable else {*TUNED, "target_recall"}
    return {**{key: value for key, value in info.items() if key not in is_dropped}, "engine": index_type}


def _drawn(is_alive: np.ndarray) -> np.ndarray:
    """The positions of at most 200 entries that are there, drawn at random; always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(np.flatnonzero(is_alive))[:TUNED_QUERIES])


def _tables_of(parts: Iterable[Part]) -> Iterator[pa.Table]:
    return (table for part in parts for table in part.tables())


def _check_is_free(folder: Path) -> None:
    """Raise `ValueError` unless an index can be made in the folder; a killed `create` may have begun there."""
    if holds_rows(folder) and not (folder / MANIFEST).exists():
        read_manifest(folder)  # says that it is missing
    if (folder / MANIFEST).is_file():
        raise ValueError(
            f"{str(folder)!r} is an index already: open it with `SearchIndex`, add to it by `cots-search add`, or "
            "name a new folder for another one."
        )
    of_killed_create = {LOCK, MANIFEST + PARTIAL_SUFFIX}
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - of_killed_create):
        raise ValueError(f"{str(folder)!r} exists and is not an empty folder: name a new folder for the index.")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder's only writer. Raises `ValueError` if another holds it."""
    try:
        held = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another process is writing to {str(folder)!r}: wait for its end.") from error
    except OSError as error:
        raise ValueError(f"{str(folder)!r} cannot be written to: {error}.") from error
    with held:
        yield


@contextmanager
def _as_value_error(folder: Path) -> Iterator[None]:
    """Turn what a full or missing disk raises into a sentence; FAISS raises `RuntimeError` for it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"Writing to {str(folder)!r} failed, and the index is as it was: {error}; repeat the command when it can "
            "be written to."
        ) from error
