"""`MilvusStore`: a search index as a collection of Milvus, for an index that is too large for one machine.

The same client talks to an embedded Milvus Lite file (`photos.db`), to a server and to a cluster
(`https://host:19530#collection`). Everything lies in the collection, the metadata as its dynamic fields, so that any
machine with the model can query it. The token is read from the environment variable MILVUS_TOKEN and appears in no
message. Scores are Milvus' own, and only Milvus determines whether candidates are rescored.
"""

import base64
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from .conditions import (
    TEXT,
    Condition,
    Kind,
    bind,
    check_kinds,
    kind_of_value,
    milvus_column,
    milvus_expression,
)
from .index_types import INDEX_TYPES, MILVUS_LITE, MILVUS_SERVER, check_index_type
from .rows import FIXED_COLUMNS, ROW_ID_DTYPE, as_hit

TOKEN_VARIABLE = "MILVUS_TOKEN"
DEFAULT_COLLECTION = "cots"
INFO_PROPERTY, UNFINISHED_PROPERTY = "cots.info", "cots.unfinished"
REMOVED_SUFFIX = "_removed"  # of the collection that holds the ids of deleted entries
REMOVED_DIM = 2  # the fewest numbers that a vector of Milvus may have
MAX_TEXT = 65_535  # bytes of a VARCHAR
MAX_NAME = 4_096
ROWS_PER_CALL = 1_000  # gRPC limits the size of a message, and Milvus the rows that a query may return
IDS_PER_CALL = 10_000  # without anything else; each call of a server waits for its next tick
MAX_INFO = 4_096  # characters of the description
ROWS_TO_FLUSH = 10_000  # of a run; fewer are compared one by one until the server itself ends their segment
ENTITY_FIELDS = ("row_id", "name", "source", "captions", "thumbnail")  # the fields of the collection that hold texts
TEXT_FIELDS = ("name", "source")  # the fields of the collection that conditions may name
RUNNING_IMPORTS = (0, 2, 5)  # pending, started, persisted: numbers of Milvus' protocol
METADATA = "$meta"  # the dynamic field, which has the metadata as its keys

_open_clients: Counter[str] = Counter()


def is_milvus_uri(index: str) -> bool:
    """Whether the name of an index is one of Milvus: a server's address, or a file that ends in .db."""
    uri, _ = _split(index)
    return urlsplit(uri).scheme in ("http", "https") or uri.endswith(".db")


def is_milvus_server(index: str) -> bool:
    """Whether the name of an index is the address of a Milvus server."""
    return is_milvus_uri(index) and not _is_lite(_split(index)[0])


def connect(uri: str):
    """A client for a URI without #collection. Raises `ValueError` if it has a password, and if nothing answers."""
    from pymilvus import MilvusClient

    address = urlsplit(uri)
    if address.username or address.password:
        # A password here would show in the shell's history, in process lists and in error messages.
        raise ValueError(
            f"Name the server without user and password, and put them into {TOKEN_VARIABLE} (user:password)."
        )
    try:
        client = MilvusClient(uri=uri, token=os.environ.get(TOKEN_VARIABLE, ""))
        _open_clients[uri] += 1
        return client
    except Exception as error:
        raise ValueError(f"No Milvus answers at {uri!r}: {type(error).__name__}: {_redact(str(error))}") from None


def disconnect(client, uri: str) -> None:
    """Close a client of `connect`; closing the last one frees a Milvus Lite file for other processes."""
    client.close()
    _open_clients[uri] -= 1
    if _is_lite(uri) and _open_clients[uri] == 0:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(uri)  # pymilvus would hold it until this process ends


@contextmanager
def _connected(uri: str) -> Iterator[Any]:
    """A client, which is closed at the end of the block."""
    client = connect(uri)
    try:
        yield client
    finally:
        disconnect(client, uri)


def _redact(message: str) -> str:
    token = os.environ.get(TOKEN_VARIABLE)
    return message.replace(token, "***") if token else message


class ImportRefused(ValueError):
    """The server takes no bulk import, or not this one."""


class MilvusStore:
    """
    Entries in a collection that `create` made; `stores.VectorStore` documents the methods.

    Args:
        index: A Milvus Lite file, or the address of a server; "#name" at its end names the collection.

    Raises `ValueError` where there is no such collection, or one that was not made here.
    """

    def __init__(self, index: str):
        uri, self.collection = _split(index)
        self._uri = uri
        if _is_lite(uri) and not os.path.exists(uri):
            raise ValueError(f"There is no index in {index!r}: make one with `cots-search index`.")
        self._removed = self.collection + REMOVED_SUFFIX
        self._kinds: dict[str, Kind] = {}
        self._client = connect(uri)
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, ValueError) or not isinstance(error, Exception):
                raise
            raise ValueError(
                f"The collection {self.collection!r} at {uri!r} cannot be opened: {_redact(str(error))}"
            ) from None

    @classmethod
    def exists(cls, index: str) -> bool:
        """Whether there is such a collection."""
        uri, collection = _split(index)
        if _is_lite(uri) and not os.path.exists(uri):
            return False
        with _connected(uri) as client:
            return client.has_collection(collection)

    @classmethod
    def check_can_create(cls, index: str, index_type: str) -> None:
        """Raise `ValueError` for an index type that Milvus lacks."""
        check_index_type(index_type, _store_of(_split(index)[0]))

    @classmethod
    def create(cls, index: str, info: dict, index_type: str) -> "MilvusStore":
        """Make an empty collection.

        Raises `ValueError` for an index type that Milvus lacks and for a collection that exists.
        """
        cls.check_can_create(index, index_type)
        uri, collection = _split(index)
        text = json.dumps({**info, "engine": index_type})
        if len(text) > MAX_INFO:
            raise ValueError(f"The description of the index takes {len(text)} characters; at most {MAX_INFO} fit.")
        with _connected(uri) as client:
            if client.has_collection(collection):
                raise ValueError(
                    f"There is a collection {collection!r} at {uri!r} already: if it is an index, open it with "
                    "`SearchIndex` or add to it by `cots-search add`; else name another collection after #."
                )
            if client.has_collection(collection + REMOVED_SUFFIX):  # of an index that somebody has dropped
                client.drop_collection(collection + REMOVED_SUFFIX)
            client.create_collection(
                collection,
                schema=_schema(info["dim"]),
                index_params=_index_params(client, index_type, info["dim"]),
                # An image is found as soon as it was added.
                consistency_level="Strong",
                # Together with the collection: a killed process leaves none without it.
                properties={INFO_PROPERTY: text},
            )
        return cls(index)

    def __len__(self) -> int:
        return self.count([])

    def count(self, where: list[Condition]) -> int:
        """How many entries satisfy all conditions."""
        found = self._client.query(self.collection, filter=self._filter(where), output_fields=["count(*)"])
        return found[0]["count(*)"]

    @property
    def is_embedded(self) -> bool:
        """Whether this is Milvus Lite, which lacks what a server has."""
        return _is_lite(self._uri)

    @property
    def info(self) -> dict:
        """The dictionary that `create` was given, and the present index type as `engine`."""
        text = self._client.describe_collection(self.collection)["properties"].get(INFO_PROPERTY)
        if text is None:
            raise ValueError(
                f"The collection {self.collection!r} at {self._uri!r} was not made by `cots-search index`."
            )
        info = json.loads(text)
        # What Milvus has built counts: a rebuild may have been killed before it changed the property.
        index = self._client.describe_index(self.collection, "embedding") or {}
        built = [
            name for name, kind in INDEX_TYPES.items() if kind.milvus and kind.milvus.name == index.get("index_type")
        ]
        return {**info, "engine": built[0]} if built else info

    @property
    def columns(self) -> list[str]:
        """The columns that conditions may name, collected from a thousand entries."""
        names = {name for row in self._sample() for name in row}
        return [*TEXT_FIELDS, *sorted(names - set(FIXED_COLUMNS))]

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""
        return self._present(self.collection, row_ids)

    def _present(self, collection: str, row_ids: np.ndarray) -> np.ndarray:
        present = {row["row_id"] for row in self._get(collection, row_ids, "row_id", IDS_PER_CALL)}
        return np.fromiter((row_id in present for row_id in row_ids.astype(str).tolist()), bool, len(row_ids))

    def _get(
        self, collection: str, row_ids: np.ndarray, field: str, num_per_call: int = ROWS_PER_CALL
    ) -> Iterator[dict]:
        for start in range(0, len(row_ids), num_per_call):
            ids = row_ids[start : start + num_per_call].astype(str).tolist()
            yield from self._client.get(collection, ids, output_fields=[field])

    def names_of(self, row_ids: np.ndarray) -> list[str]:
        """The names of those of these entries that are in the index."""
        return [row["name"] for row in self._get(self.collection, row_ids, "name")]

    def was_deleted(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids `delete` has removed, and nobody has added again."""
        if not self._client.has_collection(self._removed):
            return np.zeros(len(row_ids), dtype=bool)
        if not self._client.list_indexes(self._removed):
            parameters = _index_params(self._client, "exact", REMOVED_DIM)
            self._client.create_index(self._removed, parameters, sync=False)  # of no use, but needed to load
        self._client.load_collection(self._removed)
        return self._present(self._removed, row_ids) & ~self.has(row_ids)

    @property
    def unfinished(self) -> dict[str, dict[str, int]]:
        """The runs of `adding` that have not ended, by their sources."""
        return json.loads(
            self._client.describe_collection(self.collection)["properties"].get(UNFINISHED_PROPERTY, "{}")
        )

    @contextmanager
    def adding(self, unfinished: Mapping[str, dict[str, int]] = MappingProxyType({})) -> Iterator[None]:
        """Announce a run, and have a large one indexed from its end on. Milvus takes many writers, and stores each id
        once. What a call has added is durable and found when it returns. Raises `ValueError` while an import goes on.

        A flush ends the segment that grows, which the server does by itself in time. It takes seconds, each makes a
        segment of its own, and newer servers allow one in ten seconds. The embedded file is flushed always.
        """
        self.refresh()
        if not self.is_embedded and not all(self.imports().values()):
            raise ValueError(
                f"The server is importing into {self.collection!r} what `load --bulk_import` has left to it, and "
                "would have images twice: wait for its end, or repeat that command, which does."
            )
        if unfinished:
            self._write_unfinished({**self.unfinished, **unfinished})
        yield
        num_new = sum(run.get("images", 0) - run.get("before", 0) for run in unfinished.values())
        if self.is_embedded or num_new >= ROWS_TO_FLUSH:
            self._client.flush(self.collection)
        if unfinished:
            self._write_unfinished({name: run for name, run in self.unfinished.items() if name not in unfinished})

    def _write_unfinished(self, runs: dict[str, dict[str, int]]) -> None:
        self._client.alter_collection_properties(self.collection, {UNFINISHED_PROPERTY: json.dumps(runs)})

    def refresh(self) -> None:
        """Take part in the adding of another process."""
        self._kinds = {}

    def add(self, rows: pa.Table) -> None:
        """Write entries; one with the same id is replaced."""
        self.check_metadata(rows)
        for start in range(0, len(rows), ROWS_PER_CALL):
            some = rows.slice(start, ROWS_PER_CALL)
            vectors = some["embedding"].to_pylist()
            entities = [
                {**entity, "embedding": vector} for entity, vector in zip(as_entities(some), vectors, strict=True)
            ]
            self._client.upsert(self.collection, entities)

    def check_metadata(self, rows: pa.Table) -> None:
        """Raise `ValueError` if a column of metadata holds another kind of values than in the index."""
        names = [name for name in rows.column_names if name not in FIXED_COLUMNS]
        check_kinds(rows, names, self._kinds, self._kinds_of)

    # pymilvus has bulk imports in functions that it will remove, and in calls by HTTP that Milvus 2.3 does not answer.
    # Below both are messages of gRPC, which all versions know; test_milvus_import.py sends them to a server.
    def start_import(self, file: str) -> int:
        """
        Have the server import a file, by its name in the server's storage; returns the number of the job.

        Raises `ImportRefused` where the server takes no such job. A message whose answer is lost is not sent again:
        the server may have begun.
        """
        try:
            return self._messages.do_bulk_insert(
                self.collection, "", [file], context=self._client._generate_call_context(), retry_times=0
            )
        except Exception as error:
            raise ImportRefused(_redact(str(error))) from None

    def import_state(self, job: int) -> tuple[bool, str | None]:
        """Whether a job has ended, and why it has failed if it has. Raises `ValueError` if the server does not say."""
        try:
            state = self._messages.get_bulk_insert_state(job, context=self._client._generate_call_context())
        except Exception as error:
            raise ValueError(f"How far the import {job} is cannot be told: {_redact(str(error))}") from None
        if state.state in (state.ImportFailed, state.ImportFailedAndCleaned):
            return True, _redact(state.failed_reason)
        return state.state == state.ImportCompleted, None

    def imports(self) -> dict[int, bool]:
        """The jobs of this collection that the server remembers, and whether each has ended.

        A server that does not tell, as one without imports, has none.
        """
        context = self._client._generate_call_context()
        try:
            jobs = self._messages.list_bulk_insert_tasks(0, self.collection, context=context)
        except Exception:  # several kinds, by the server's version
            return {}
        return {job.task_id: job.state not in RUNNING_IMPORTS for job in jobs}

    @property
    def address_digest(self) -> str:
        """Eight digits that tell the server and its database from others."""
        return hashlib.sha256(self._uri.encode()).hexdigest()[:8]

    @property
    def _messages(self):
        return self._client._get_connection()

    def find_imported(self) -> None:
        """Have found what jobs have imported that have ended."""
        self._client.refresh_load(self.collection)

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        """The best entries for each query; see `VectorStore`."""
        if len(queries) == 0 or top == 0:
            return [[] for _ in queries]
        # All fields but the vectors.
        fields = [*(name for name in FIXED_COLUMNS if name != "embedding"), METADATA]
        found = self._client.search(
            self.collection,
            data=list(np.ascontiguousarray(queries, dtype=np.float32)),
            filter=self._filter(where),
            limit=top,
            output_fields=fields,
            search_params={"metric_type": "IP", "params": self._search_params(top)},
        )
        return [[as_hit(_row(hit["entity"]), float(hit["distance"])) for hit in hits] for hits in found]

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""
        pages = self._client.query_iterator(
            self.collection, filter=self._filter(where), output_fields=["row_id"], batch_size=ROWS_PER_CALL
        )
        ids: list[str] = []
        while page := pages.next():
            ids.extend(row["row_id"] for row in page)
        pages.close()
        return np.array(ids, ROW_ID_DTYPE)

    def delete(self, row_ids: np.ndarray) -> int:
        """Remove entries; returns how many of these ids were in the index."""
        present = row_ids[self.has(row_ids)]
        if len(present) and not self._client.has_collection(self._removed):
            # `was_deleted` loads it, which takes seconds that a deletion can do without.
            self._client.create_collection(self._removed, schema=_removed_schema(), consistency_level="Strong")
        for start in range(0, len(present), ROWS_PER_CALL):
            ids = present[start : start + ROWS_PER_CALL].astype(str).tolist()
            self._client.upsert(self._removed, [{"row_id": row_id, "embedding": [1.0, 0.0]} for row_id in ids])
            self._client.delete(self.collection, ids=ids)
        return len(present)

    def rebuild(self, index_type: str) -> None:
        """Index the vectors again, with another index type."""
        check_index_type(index_type, _store_of(self._uri))
        info = {**self.info, "engine": index_type}
        # First: whoever opens the collection after a kill builds the index that this names.
        self._client.alter_collection_properties(self.collection, {INFO_PROPERTY: json.dumps(info)})
        self._client.release_collection(self.collection)
        self._client.drop_index(self.collection, "embedding")
        self._build_index(info)

    def close(self) -> None:
        """Close the connection, and free a Milvus Lite file for other processes."""
        disconnect(self._client, self._uri)

    def _open(self) -> None:
        if not self._client.has_collection(self.collection):
            raise ValueError(
                f"There is no collection {self.collection!r} at {self._uri!r}: make one with `cots-search index`."
            )
        info = self.info
        self._check_row_ids()
        if "embedding" in self._client.list_indexes(self.collection):
            self._client.load_collection(self.collection)
        else:  # a rebuild was killed
            self._build_index(info)

    def _check_row_ids(self) -> None:
        """Raise `ValueError` for a collection of an older version, whose ids are integers."""
        from pymilvus import DataType

        fields = self._client.describe_collection(self.collection)["fields"]
        if any(field["name"] == "row_id" and field["type"] != DataType.VARCHAR for field in fields):
            raise ValueError(
                f"The collection {self.collection!r} at {self._uri!r} was made by an older version, whose ids of two "
                "images could be the same: make a new one, under another name, with `cots-search index`."
            )

    def _build_index(self, info: dict) -> None:
        parameters = _index_params(self._client, info["engine"], info["dim"])
        self._client.create_index(self.collection, parameters)
        self._client.load_collection(self.collection)

    def _filter(self, where: list[Condition]) -> str:
        """The filter for Milvus. Raises `ValueError` for a missing column and for a value of another kind."""
        bound = bind(where, self._kind_of, lambda: self.columns)
        return milvus_expression(bound, TEXT_FIELDS)

    def _kind_of(self, column: str) -> Kind | None:
        """What a column holds, by one entry that has it; `None` if there is none."""
        if not column:  # a server has no words for a key without a name
            return None
        is_field = column in TEXT_FIELDS
        has_it = "" if is_field else f"exists {milvus_column(column)}"
        rows = self._client.query(self.collection, filter=has_it, output_fields=[METADATA], limit=1)
        if not rows:
            return None
        return TEXT if is_field else kind_of_value(rows[0][column])

    def _kinds_of(self, columns: Sequence[str]) -> dict[str, Kind]:
        """What columns of metadata hold, without those that no entry has.

        A thousand entries show most of them by one query. Milvus 2.3 does not parse `exists` of several columns.
        """
        rows = self._sample()
        kinds = {column: kind_of_value(row[column]) for row in rows for column in columns if column in row}
        if len(rows) < ROWS_PER_CALL:  # these are all
            return kinds
        left = [column for column in columns if column not in kinds]
        return kinds | {column: kind for column in left if (kind := self._kind_of(column)) is not None}

    def _sample(self) -> list[dict]:
        """The metadata of a thousand entries, or of all where there are fewer."""
        return self._client.query(self.collection, filter="", output_fields=[METADATA], limit=ROWS_PER_CALL)

    def _search_params(self, top: int) -> dict:
        params = INDEX_TYPES[self.info["engine"]].milvus.search_params
        return {**params, **({"ef": max(params["ef"], 2 * top)} if "ef" in params else {})}


def _is_lite(uri: str) -> bool:
    return not urlsplit(uri).scheme


def _store_of(uri: str) -> str:
    return MILVUS_LITE if _is_lite(uri) else MILVUS_SERVER


def _split(index: str) -> tuple[str, str]:
    uri, _, collection = index.partition("#")
    return uri, collection or DEFAULT_COLLECTION


def _schema(dim: int):
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("row_id", DataType.VARCHAR, is_primary=True, max_length=ROW_ID_DTYPE.itemsize)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    schema.add_field("name", DataType.VARCHAR, max_length=MAX_NAME)
    schema.add_field("source", DataType.VARCHAR, max_length=MAX_NAME)
    schema.add_field("captions", DataType.VARCHAR, max_length=MAX_TEXT)
    schema.add_field("thumbnail", DataType.VARCHAR, max_length=MAX_TEXT)
    return schema


def _removed_schema():
    """Ids alone; Milvus makes no collection without a vector."""
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("row_id", DataType.VARCHAR, is_primary=True, max_length=ROW_ID_DTYPE.itemsize)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=REMOVED_DIM)
    return schema


def _index_params(client, index_type: str, dim: int):
    index = INDEX_TYPES[index_type].milvus
    params = dict(index.build_params)
    if index_type == "ivfpq":  # parts of about four numbers, all of the same size
        params["m"] = next(parts for parts in range(max(1, dim // 4), 0, -1) if dim % parts == 0)
    prepared = client.prepare_index_params()
    prepared.add_index("embedding", index_type=index.name, metric_type="IP", params=params)
    return prepared


def as_entities(rows: pa.Table) -> list[dict]:
    """The rows as Milvus stores them, without their embeddings: the values of `ENTITY_FIELDS`, and the metadata.

    Texts that are too long lose their end. Missing values are not written, nor are NaN and infinity, which JSON lacks.
    Raises `ValueError` for a name that is too long.
    """
    metadata = [name for name in rows.column_names if name not in FIXED_COLUMNS]
    return [_entity(row, metadata) for row in rows.drop_columns("embedding").to_pylist()]


def _entity(row: dict, metadata: list[str]) -> dict:
    captions = list(row["captions"])
    while len(json.dumps(captions).encode()) > MAX_TEXT:
        captions = captions[:-1]
    thumbnail = row["thumbnail"]
    encoded = base64.b64encode(thumbnail["bytes"]).decode() if thumbnail and thumbnail["bytes"] else ""
    if len(row["name"].encode()) > MAX_NAME:
        raise ValueError(f"The name of an image takes more than {MAX_NAME} bytes: {row['name'][:80]!r}...")
    return {
        "row_id": row["row_id"],
        "name": row["name"],
        "source": row["source"],
        "captions": json.dumps(captions),
        "thumbnail": encoded if len(encoded) <= MAX_TEXT else "",
        **{name: row[name] for name in metadata if row[name] is not None and not _is_unwritable(row[name])},
    }


def _is_unwritable(value: str | int | float | bool) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _row(entity: dict) -> dict:
    """The row that `_entity` turned into this entity."""
    thumbnail = base64.b64decode(entity["thumbnail"])
    return {
        **entity,
        "captions": json.loads(entity["captions"]),
        "thumbnail": {"bytes": thumbnail, "path": None} if thumbnail else None,
    }
