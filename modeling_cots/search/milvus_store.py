"""`MilvusStore`: a search index as a collection of Milvus, for what one machine does not hold.

The same client talks to an embedded Milvus Lite file (`photos.db`), to a server and to a cluster
(`https://host:19530#collection`). Everything lies in the collection, the metadata as its dynamic fields, so that any
machine with the model can query it. The token is read from the environment variable MILVUS_TOKEN and appears in no
message. What the vectors' index keeps of each vector is Milvus' business: it returns scores of its own.
"""

import base64
import json
import os
from collections import Counter
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from .conditions import Condition, milvus_expression, missing_column
from .rows import FIXED_COLUMNS

TOKEN_VARIABLE = "MILVUS_TOKEN"
DEFAULT_COLLECTION = "cots"
INFO_PROPERTY = "cots.info"
ENGINES = {
    "exact": ("FLAT", {}, {}),
    "hnsw": ("HNSW", {"M": 32, "efConstruction": 100}, {"ef": 128}),
    "ivfpq": ("IVF_PQ", {"nlist": 1024, "nbits": 8}, {"nprobe": 32}),
    "int8": ("IVF_SQ8", {"nlist": 1024}, {"nprobe": 32}),
}
MAX_TEXT = 65_535  # bytes of a VARCHAR
MAX_NAME = 4_096
ROWS_PER_CALL = 1_000  # a message of gRPC is bounded, and so is what a query may return
INFO_ROOM = 4_096

_open_clients: Counter[str] = Counter()


def is_milvus_uri(index: str) -> bool:
    """Whether the name of an index means Milvus: a server's address, or a file that ends in .db."""
    uri, _ = _split(index)
    return urlsplit(uri).scheme in ("http", "https") or uri.endswith(".db")


def connect(uri: str):
    """A client for a URI without #collection. Raises `ValueError` if it has a password, and if nothing answers."""
    from pymilvus import MilvusClient

    address = urlsplit(uri)
    if address.username or address.password:
        # It would stand in the shell's history, in process lists and in error messages.
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
    """Close a client of `connect`; with the last one a Milvus Lite file is free for other processes."""
    client.close()
    _open_clients[uri] -= 1
    if not urlsplit(uri).scheme and _open_clients[uri] == 0:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(uri)  # pymilvus would keep it to the end of this process


def _redact(message: str) -> str:
    token = os.environ.get(TOKEN_VARIABLE)
    return message.replace(token, "***") if token else message


class MilvusStore:
    """
    Entries in a collection that `create` made; see `vector_stores.VectorStore` for what the methods promise.

    Args:
        index: A Milvus Lite file, or the address of a server; "#name" at its end names the collection.

    Raises `ValueError` where there is no such collection, or one that was not made here.
    """

    def __init__(self, index: str):
        uri, self.collection = _split(index)
        self._uri = uri
        if not urlsplit(uri).scheme and not os.path.exists(uri):
            raise ValueError(f"There is no index in {index!r}: make one with `cots-search index`.")
        self._client = connect(uri)
        if not self._client.has_collection(self.collection):
            self.close()
            raise ValueError(
                f"There is no collection {self.collection!r} at {uri!r}: make one with `cots-search index`."
            )
        self.info = self._read_info(uri)
        self._client.load_collection(self.collection)
        self._columns: list[str] | None = None

    @classmethod
    def exists(cls, index: str) -> bool:
        """Whether there is such a collection."""
        uri, collection = _split(index)
        if not urlsplit(uri).scheme and not os.path.exists(uri):
            return False
        client = connect(uri)
        found = client.has_collection(collection)
        disconnect(client, uri)
        return found

    @classmethod
    def create(cls, index: str, info: dict, engine: str) -> "MilvusStore":
        """Make an empty collection. Raises `ValueError` for an engine that Milvus lacks, and if it is there."""
        from pymilvus import DataType, MilvusClient

        if engine not in ENGINES:
            raise ValueError(f"On Milvus the engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
        uri, collection = _split(index)
        _check_lite(uri, engine)
        text = json.dumps({**info, "engine": engine})
        if len(text) > INFO_ROOM:
            raise ValueError(f"The description of the index takes {len(text)} characters; {INFO_ROOM} are the most.")
        client = connect(uri)
        if client.has_collection(collection):
            disconnect(client, uri)
            raise ValueError(f"The collection {collection!r} is there already at {uri!r}.")
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("row_id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=info["dim"])
        schema.add_field("name", DataType.VARCHAR, max_length=MAX_NAME)
        schema.add_field("source", DataType.VARCHAR, max_length=MAX_NAME)
        schema.add_field("captions", DataType.VARCHAR, max_length=MAX_TEXT)
        schema.add_field("thumbnail", DataType.VARCHAR, max_length=MAX_TEXT)
        client.create_collection(
            collection,
            schema=schema,
            index_params=_index_params(client, engine, info["dim"]),
            # Whoever added an image finds it at once.
            consistency_level="Strong",
        )
        client.alter_collection_properties(collection, {INFO_PROPERTY: text})
        disconnect(client, uri)
        return cls(index)

    def __len__(self) -> int:
        return self._client.query(self.collection, filter="", output_fields=["count(*)"])[0]["count(*)"]

    @property
    def columns(self) -> list[str]:
        """What can be filtered by, as far as a thousand entries tell."""
        if self._columns is None:
            rows = self._client.query(self.collection, filter="", output_fields=["*"], limit=ROWS_PER_CALL)
            names = {name for row in rows for name in row}
            self._columns = ["name", "source", *sorted(names - set(FIXED_COLUMNS))]
        return self._columns

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""
        present = set()
        for start in range(0, len(row_ids), ROWS_PER_CALL):
            ids = row_ids[start : start + ROWS_PER_CALL].tolist()
            present.update(row["row_id"] for row in self._client.get(self.collection, ids, output_fields=["row_id"]))
        return np.fromiter((row_id in present for row_id in row_ids.tolist()), bool, len(row_ids))

    def begin(self) -> None:
        """Nothing to do: Milvus takes many writers, and an id is there once."""

    def add(self, rows: pa.Table) -> None:
        """Write entries; one with the same id is replaced."""
        names = [name for name in rows.column_names if name not in FIXED_COLUMNS]
        self._columns = None
        for start in range(0, len(rows), ROWS_PER_CALL):
            entities = [_entity(row, names) for row in rows.slice(start, ROWS_PER_CALL).to_pylist()]
            self._client.upsert(self.collection, entities)

    def finish(self) -> None:
        """Make what was added durable and indexed."""
        self._client.flush(self.collection)

    def refresh(self) -> None:
        """Nothing to do: every search asks the server."""

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        if len(queries) == 0 or top == 0:
            return [[] for _ in queries]
        self._check_columns(where)
        # "*" names the dynamic fields too; the vectors stay where they are.
        fields = [name for name in FIXED_COLUMNS if name != "embedding"]
        extra = [name for name in self.columns if name not in fields]
        found = self._client.search(
            self.collection,
            data=list(np.ascontiguousarray(queries, dtype=np.float32)),
            filter=milvus_expression(where),
            limit=top,
            output_fields=[*fields, *extra],
            search_params={"metric_type": "IP", "params": self._search_params(top)},
        )
        return [[{**_row(hit["entity"]), "score": float(hit["distance"])} for hit in hits] for hits in found]

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""
        self._check_columns(where)
        pages = self._client.query_iterator(
            self.collection, filter=milvus_expression(where), output_fields=["row_id"], batch_size=ROWS_PER_CALL
        )
        ids: list[int] = []
        while page := pages.next():
            ids.extend(row["row_id"] for row in page)
        pages.close()
        return np.array(ids, dtype=np.int64)

    def delete(self, row_ids: np.ndarray) -> int:
        present = row_ids[self.has(row_ids)]
        for start in range(0, len(present), ROWS_PER_CALL):
            self._client.delete(self.collection, ids=present[start : start + ROWS_PER_CALL].tolist())
        return len(present)

    def rebuild(self, engine: str) -> None:
        """Index the vectors anew, for an engine of this name."""
        if engine not in ENGINES:
            raise ValueError(f"On Milvus the engine must be one of {', '.join(ENGINES)}; got {engine!r}.")
        _check_lite(self._uri, engine)
        self._client.release_collection(self.collection)
        self._client.drop_index(self.collection, "embedding")
        self._client.create_index(self.collection, _index_params(self._client, engine, self.info["dim"]))
        self.info = {**self.info, "engine": engine}
        self._client.alter_collection_properties(self.collection, {INFO_PROPERTY: json.dumps(self.info)})
        self._client.load_collection(self.collection)

    def close(self) -> None:
        """Let go of the connection; a Milvus Lite file is free for others."""
        disconnect(self._client, self._uri)

    def _read_info(self, uri: str) -> dict:
        text = self._client.describe_collection(self.collection)["properties"].get(INFO_PROPERTY)
        if text is None:
            raise ValueError(f"The collection {self.collection!r} at {uri!r} was not made by `cots-search index`.")
        return json.loads(text)

    def _check_columns(self, where: list[Condition]) -> None:
        for condition in where:
            # A name that the first entries do not have may be one that later ones do.
            if condition.column not in self.columns and not self._client.query(
                self.collection, filter=f"{condition.column} is not null", output_fields=["row_id"], limit=1
            ):
                raise missing_column(condition.column, self.columns)

    def _search_params(self, top: int) -> dict:
        _, _, params = ENGINES[self.info["engine"]]
        return {**params, **({"ef": max(params["ef"], 2 * top)} if "ef" in params else {})}


def _check_lite(uri: str, engine: str) -> None:
    # Milvus Lite takes the name, finds by comparing all, and fails when the file is next opened.
    if engine == "ivfpq" and not urlsplit(uri).scheme:
        raise ValueError("Milvus Lite, the embedded file, has no 'ivfpq'; a Milvus server has. Use 'hnsw' or 'int8'.")


def _split(index: str) -> tuple[str, str]:
    uri, _, collection = index.partition("#")
    return uri, collection or DEFAULT_COLLECTION


def _index_params(client, engine: str, dim: int):
    kind, params, _ = ENGINES[engine]
    if engine == "ivfpq":
        params = {**params, "m": next(parts for parts in range(max(1, dim // 4), 0, -1) if dim % parts == 0)}
    prepared = client.prepare_index_params()
    prepared.add_index("embedding", index_type=kind, metric_type="IP", params=params)
    return prepared


def _entity(row: dict, metadata: list[str]) -> dict:
    """A row as Milvus stores it; texts are cut to what fits, a value that is missing is not written."""
    captions = list(row["captions"])
    while len(json.dumps(captions).encode()) > MAX_TEXT:
        captions = captions[:-1]
    thumbnail = row["thumbnail"]
    encoded = base64.b64encode(thumbnail["bytes"]).decode() if thumbnail and thumbnail["bytes"] else ""
    if len(row["name"].encode()) > MAX_NAME:
        raise ValueError(f"The name of an image takes more than {MAX_NAME} bytes: {row['name'][:80]!r}...")
    return {
        "row_id": row["row_id"],
        "embedding": row["embedding"],
        "name": row["name"],
        "source": row["source"],
        "captions": json.dumps(captions),
        "thumbnail": encoded if len(encoded) <= MAX_TEXT else "",
        **{name: row[name] for name in metadata if row[name] is not None},
    }


def _row(entity: dict) -> dict:
    """The row that an entity was made of."""
    thumbnail = base64.b64decode(entity["thumbnail"])
    return {
        **entity,
        "captions": json.loads(entity["captions"]),
        "thumbnail": {"bytes": thumbnail, "path": None} if thumbnail else None,
    }
