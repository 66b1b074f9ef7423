"""`PostgresStore`: a search index as a table of PostgreSQL with pgvector, for who runs such a database already.

An index is `postgresql://user@host/database#table`, in three tables: the entries (metadata as jsonb), `table_removed`
with the ids of deleted entries, and `table_info` with the model and the runs that have not ended. libpq takes the
password from PGPASSWORD or ~/.pgpass; an address that holds one is refused, and no message repeats it. A writer's
transaction happens as a whole or not at all, and many may write at once.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from .conditions import (
    MAX_INTEGER,
    MIN_INTEGER,
    TEXT,
    Condition,
    Kind,
    bind,
    check_kinds,
    kind_of_value,
    postgres_expression,
    without_nul,
)
from .index_types import FEW_ROWS, INDEX_TYPES, POSTGRES, PostgresIndex, check_index_type
from .rows import FIXED_COLUMNS, ROW_ID_DTYPE, as_hit

PASSWORD_VARIABLE = "PGPASSWORD"
DEFAULT_TABLE = "cots"
MAX_TABLE = 48  # bytes; PostgreSQL cuts a name at 63, and ours end in _removed or _embedding_hnsw
LOWEST_PGVECTOR = (0, 8)  # the first whose scan of a graph goes on until enough entries satisfy a filter
PATIENCE = 10  # seconds until a server that does not answer is given up
ROWS_PER_CALL = 10_000
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH, MAX_HNSW_SEARCH = 32, 100, 128, 1_000
TEXT_COLUMNS = ("name", "source")  # the columns of the table that conditions may name


class PostgresStore:
    """
    Entries in a table that `create` made; `stores.VectorStore` documents the methods.

    Args:
        index: postgresql://user@host:port/database#table; without a table it is "cots". Parameters of libpq may
            follow the database, as in ?host=/run/postgresql for a Unix socket.

    Raises `ValueError` where there is no such table, for one that was not made here, and where no server answers.
    """

    def __init__(self, index: str):
        self._uri, self.table = _split(index)
        self._lock = threading.RLock()  # threads share a connection, which has one transaction at a time
        self._kinds: dict[str, Kind] = {}
        self._connection = _connect(self._uri)
        try:
            if not self._has_table():
                raise ValueError(
                    f"There is no table {self.table!r} at {self._uri!r}: make an index with `cots-search index`."
                )
            self._dim = self.info["dim"]
            self._prepare()
        except BaseException:
            self.close()
            raise

    @classmethod
    def exists(cls, index: str) -> bool:
        """Whether there is such an index."""
        store = cls._connected(index)
        try:
            return store._has_table()
        finally:
            store.close()

    @classmethod
    def check_can_create(cls, index: str, index_type: str) -> None:
        """Raise `ValueError` for an index type that PostgreSQL lacks, and for a name that is too long."""
        check_index_type(index_type, POSTGRES)
        _, table = _split(index)
        if len(table.encode()) > MAX_TABLE:
            raise ValueError(f"The name of a table has at most {MAX_TABLE} bytes, and {table!r} has more.")

    @classmethod
    def create(cls, index: str, info: dict, index_type: str) -> "PostgresStore":
        """Make an empty index.

        Raises `ValueError` for an index type that PostgreSQL lacks, for more numbers than it can index, for a table
        that exists, and where pgvector is not installed.
        """
        cls.check_can_create(index, index_type)
        kind, dim = _kind(index_type), info["dim"]
        _check_dim(index_type, dim)
        store = cls._connected(index)
        try:
            store._make_extension()
            with store._transaction() as connection:
                if _exists(connection, store.table):
                    raise ValueError(
                        f"There is a table {store.table!r} at {store._uri!r} already: if it is an index, open it with "
                        "`SearchIndex` or add to it by `cots-search add`; else name another table after #."
                    )
                for suffix in ("_removed", "_info"):  # of an index that somebody has dropped
                    connection.execute(store._sql(f"DROP TABLE IF EXISTS {{table{suffix}}}"), ())
                for statement in _tables(kind.column, dim):
                    connection.execute(store._sql(statement), ())
                values = [("info", {**info, "engine": index_type}), ("unfinished", {})]
                for name, value in values:
                    connection.execute(
                        store._sql("INSERT INTO {table_info} VALUES (%s, %s::jsonb)"), (name, json.dumps(value))
                    )
        finally:
            store.close()
        return cls(index)

    @classmethod
    def _connected(cls, index: str) -> "PostgresStore":
        """A store of which only the connection is there."""
        store = cls.__new__(cls)
        store._uri, store.table = _split(index)
        store._lock, store._kinds = threading.RLock(), {}
        store._connection = _connect(store._uri)
        return store

    def __len__(self) -> int:
        return self.count([])

    def count(self, where: list[Condition]) -> int:
        """How many entries satisfy all conditions."""
        condition, values = self._filter(where)
        return self._value(f"SELECT count(*) FROM {{table}} {condition}", values)

    @property
    def info(self) -> dict:
        """The dictionary that `create` was given, and the present index type as `engine`."""
        return self._described("info")

    @property
    def unfinished(self) -> dict[str, dict[str, int]]:
        """The runs of `adding` that have not ended, by their sources."""
        return self._described("unfinished")

    @property
    def columns(self) -> list[str]:
        """The columns that conditions may name, collected from a thousand entries."""
        rows = self._rows(
            "SELECT DISTINCT jsonb_object_keys(metadata) FROM (SELECT metadata FROM {table} LIMIT 1000) AS entries"
        )
        return [*TEXT_COLUMNS, *sorted(name for (name,) in rows)]

    def has(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids are in the index."""
        return self._present("SELECT row_id::text FROM {table} WHERE row_id = ANY(%s::uuid[])", row_ids)

    def was_deleted(self, row_ids: np.ndarray) -> np.ndarray:
        """(n,) boolean: which of these ids `delete` has removed, and nobody has added again."""
        removed = self._present("SELECT row_id::text FROM {table_removed} WHERE row_id = ANY(%s::uuid[])", row_ids)
        return removed & ~self.has(row_ids)

    def names_of(self, row_ids: np.ndarray) -> list[str]:
        """The names of those of these entries that are in the index."""
        query = "SELECT name FROM {table} WHERE row_id = ANY(%s::uuid[])"
        return [name for ids in _chunks(row_ids) for (name,) in self._rows(query, (ids,))]

    def find(self, where: list[Condition]) -> np.ndarray:
        """Ids of the entries that satisfy all conditions."""
        condition, values = self._filter(where)
        rows = self._rows(f"SELECT replace(row_id::text, '-', '') FROM {{table}} {condition}", values)
        return np.array([row_id for (row_id,) in rows], ROW_ID_DTYPE)

    @contextmanager
    def adding(self, unfinished: Mapping[str, dict[str, int]] = MappingProxyType({})) -> Iterator[None]:
        """Announce a run, and build the index at its end, where there is none yet: a graph that grows with each entry
        takes longer than one that is made of all of them. What is added is found at once."""
        self.refresh()
        runs = json.dumps(dict(unfinished))
        self._run("UPDATE {table_info} SET value = value || %s::jsonb WHERE name = 'unfinished'", (runs,))
        yield
        self._build_index()
        self._run("UPDATE {table_info} SET value = value - %s::text[] WHERE name = 'unfinished'", (list(unfinished),))

    def refresh(self) -> None:
        """Take part in the adding of another process."""
        self._kinds = {}

    def add(self, rows: pa.Table) -> None:
        """Write entries by COPY; one with the same id is replaced."""
        metadata = [name for name in rows.column_names if name not in FIXED_COLUMNS]
        check_kinds(rows, metadata, self._kinds, self._kinds_of)
        columns = (*FIXED_COLUMNS, "metadata")
        column = _kind(self.info["engine"]).column
        changed = ", ".join(f"{name} = excluded.{name}" for name in columns if name != "row_id")
        with self._transaction() as connection:
            connection.execute(self._sql("CREATE TEMPORARY TABLE cots_new (LIKE {table}) ON COMMIT DROP"), ())
            copying = f"COPY cots_new ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)"
            with connection.cursor() as cursor, cursor.copy(copying) as copy:
                copy.set_types(["uuid", "text", "text", "text[]", "bytea", column, "jsonb"])
                for batch in rows.to_batches(max_chunksize=ROWS_PER_CALL):
                    vectors = _vectors(batch["embedding"])
                    names = [name for name in rows.column_names if name != "embedding"]
                    for row, vector in zip(batch.select(names).to_pylist(), vectors, strict=True):
                        copy.write_row(_as_stored(row, _as_vector(vector, column), metadata))
            connection.execute(
                self._sql(
                    f"INSERT INTO {{table}} ({', '.join(columns)}) SELECT DISTINCT ON (row_id) {', '.join(columns)} "
                    f"FROM cots_new ON CONFLICT (row_id) DO UPDATE SET {changed}"
                ),
                (),
            )

    def search(self, queries: np.ndarray, top: int, where: list[Condition]) -> list[list[dict]]:
        """The best entries for each query; where a filter leaves few, these are compared exactly."""
        if len(queries) == 0 or top == 0:
            return [[] for _ in queries]
        condition, values = self._filter(where)
        column = _kind(self.info["engine"]).column
        found = self._sql(
            "SELECT replace(row_id::text, '-', ''), name, source, captions, thumbnail, metadata::text, "
            f"-(embedding <#> %s::{column}) FROM {{table}} {condition} ORDER BY embedding <#> %s::{column} LIMIT %s"
        )
        results = []
        with self._transaction() as connection:
            if where:
                limited = self._sql(f"SELECT count(*) FROM (SELECT 1 FROM {{table}} {condition} LIMIT %s) AS few")
                (num_found,) = connection.execute(limited, (*values, FEW_ROWS + 1)).fetchone()
                if num_found <= max(FEW_ROWS, top):
                    connection.execute("SET LOCAL enable_indexscan = off")
            for name, setting in (
                ("hnsw.ef_search", min(max(HNSW_SEARCH, 2 * top), MAX_HNSW_SEARCH)),
                ("hnsw.iterative_scan", "strict_order"),  # until `top` entries satisfy the conditions
                ("hnsw.max_scan_tuples", 2**31 - 1),
            ):
                connection.execute("SELECT set_config(%s, %s, true)", (name, str(setting)))
            for query in queries:
                vector = _as_vector(np.ascontiguousarray(query, np.float32), column)
                rows = connection.execute(found, (vector, *values, vector, top), prepare=False)
                results.append([_as_found(row) for row in rows])
        return results

    def delete(self, row_ids: np.ndarray) -> int:
        """Remove entries; returns how many of these ids were in the index."""
        deleting = self._sql(
            "WITH gone AS (DELETE FROM {table} WHERE row_id = ANY(%s::uuid[]) RETURNING row_id), kept AS "
            "(INSERT INTO {table_removed} SELECT row_id FROM gone ON CONFLICT DO NOTHING) SELECT count(*) FROM gone"
        )
        with self._transaction() as connection:
            return sum(connection.execute(deleting, (ids,)).fetchone()[0] for ids in _chunks(row_ids))

    def rebuild(self, index_type: str) -> None:
        """Build the index again, with another index type, and free the room of deleted entries.

        The type halfvec rounds the stored embeddings to 16 bits, for good.
        """
        check_index_type(index_type, POSTGRES)
        _check_dim(index_type, self._dim)
        column = _kind(index_type).column
        with self._transaction() as connection:
            connection.execute(self._sql("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"), ())
            connection.execute(self._sql("DROP INDEX IF EXISTS {table_embedding_hnsw}"), ())
            if _kind(self.info["engine"]).column != column:
                connection.execute(
                    self._sql(f"ALTER TABLE {{table}} ALTER COLUMN embedding TYPE {column}({self._dim})"), ()
                )
            connection.execute(
                self._sql("UPDATE {table_info} SET value = value || %s::jsonb WHERE name = 'info'"),
                (json.dumps({"engine": index_type}),),
            )
            self._create_index(connection, _kind(index_type))
        self._run("VACUUM ANALYZE {table}")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _build_index(self) -> None:
        """Build the graph if the index type has one and it is not there yet; others wait at the lock meanwhile."""
        kind = _kind(self.info["engine"])
        if kind.operators is None or self._value(
            "SELECT to_regclass(%s) IS NOT NULL", (self._quoted("_embedding_hnsw"),)
        ):
            return
        with self._transaction() as connection:
            connection.execute(self._sql("LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE"), ())
            self._create_index(connection, kind)

    def _create_index(self, connection, kind: PostgresIndex) -> None:
        if kind.operators is not None:
            connection.execute(
                self._sql(
                    "CREATE INDEX IF NOT EXISTS {table_embedding_hnsw} ON {table} USING hnsw "
                    f"(embedding {kind.operators}) WITH (m = {HNSW_LINKS}, ef_construction = {HNSW_BUILD})"
                ),
                (),
            )

    def _filter(self, where: list[Condition]) -> tuple[str, list]:
        """The WHERE clause and its values. Raises `ValueError` for a missing column and a value of another kind."""
        bound = bind(where, self._kind_of, lambda: self.columns)
        return postgres_expression(bound, TEXT_COLUMNS)

    def _kind_of(self, column: str) -> Kind | None:
        """What a column holds, by one entry that has it; `None` if there is none."""
        if column in TEXT_COLUMNS:
            return TEXT if self._rows("SELECT 1 FROM {table} LIMIT 1") else None
        name = without_nul(column)
        query = "SELECT (metadata -> %s)::text FROM {table} WHERE metadata ? %s LIMIT 1"
        rows = self._rows(query, (name, name))
        return kind_of_value(_read_json(rows[0][0])) if rows else None

    def _kinds_of(self, columns: Sequence[str]) -> dict[str, Kind]:
        """What columns hold, without those that no entry has."""
        return {column: kind for column in columns if (kind := self._kind_of(column)) is not None}

    def _has_table(self) -> bool:
        with self._transaction() as connection:
            return _exists(connection, self.table)

    def _described(self, name: str) -> dict:
        if not self._value("SELECT to_regclass(%s) IS NOT NULL", (self._quoted("_info"),)):
            raise ValueError(f"The table {self.table!r} at {self._uri!r} was not made by `cots-search index`.")
        return json.loads(self._value("SELECT value::text FROM {table_info} WHERE name = %s", (name,)))

    def _make_extension(self) -> None:
        """Have pgvector in the database. Raises `ValueError` where it is not installed, or too old."""
        import psycopg

        try:
            with self._lock:
                self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except psycopg.Error as error:
            raise ValueError(
                f"The database at {self._uri!r} has no pgvector ({_first_line(error)}): install it there, and let an "
                "administrator run CREATE EXTENSION vector."
            ) from None

    def _prepare(self) -> None:
        """Let the connection take vectors. Raises `ValueError` for a pgvector that is too old."""
        from pgvector.psycopg import register_vector

        version = self._value("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        if tuple(int(number) for number in version.split(".")[:2]) < LOWEST_PGVECTOR:
            lowest = ".".join(str(number) for number in LOWEST_PGVECTOR)
            raise ValueError(
                f"The database at {self._uri!r} has pgvector {version}, and {lowest} is needed: update it there, and "
                "let an administrator run ALTER EXTENSION vector UPDATE."
            )
        register_vector(self._connection)

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """The connection in a transaction; after the server was restarted it is a new one. Raises `ValueError`."""
        import psycopg

        with self._lock:
            if self._connection.closed:
                self._connection = _connect(self._uri)
                self._prepare()
            try:
                with self._connection.transaction():
                    yield self._connection
            except psycopg.Error as error:
                raise self._refused(error) from None

    def _refused(self, error: Exception) -> ValueError:
        return ValueError(f"PostgreSQL refused a command on {self.table!r} at {self._uri!r}: {_first_line(error)}.")

    def _run(self, statement: str, values: tuple = ()) -> None:
        """Run a statement by itself, as VACUUM has to be."""
        import psycopg

        with self._lock:
            try:
                self._connection.execute(self._sql(statement), values)
            except psycopg.Error as error:
                raise self._refused(error) from None

    def _rows(self, query: str, values: Iterable = ()) -> list[tuple]:
        with self._transaction() as connection:
            return connection.execute(self._sql(query), tuple(values)).fetchall()

    def _value(self, query: str, values: Iterable = ()) -> Any:
        return self._rows(query, values)[0][0]

    def _present(self, query: str, row_ids: np.ndarray) -> np.ndarray:
        present = {row_id.replace("-", "") for ids in _chunks(row_ids) for (row_id,) in self._rows(query, (ids,))}
        return np.fromiter((row_id in present for row_id in row_ids.astype(str).tolist()), bool, len(row_ids))

    def _sql(self, statement: str) -> Any:
        """A statement with the quoted names of the tables in place of {table}, {table_info} and the others."""
        from psycopg import sql

        suffixes = ("", "_removed", "_info", "_embedding_hnsw")
        # psycopg looks for placeholders in names, too, in every statement that has values, as all of ours do.
        name = self.table.replace("%", "%%")
        return sql.SQL(statement).format(**{"table" + end: sql.Identifier(name + end) for end in suffixes})

    def _quoted(self, suffix: str) -> str:
        """The name of a table as `to_regclass` takes it."""
        return '"' + (self.table + suffix).replace('"', '""') + '"'


def _split(index: str) -> tuple[str, str]:
    uri, _, table = index.partition("#")
    return uri, table or DEFAULT_TABLE


def _connect(uri: str) -> Any:
    """A connection. Raises `ValueError` if nothing answers, or not as it should."""
    import psycopg

    try:
        parameters: dict[str, Any] = {**psycopg.conninfo.conninfo_to_dict(uri)}
        parameters.setdefault("connect_timeout", PATIENCE)
        return psycopg.connect(**parameters, autocommit=True)
    except psycopg.Error as error:
        raise ValueError(f"No PostgreSQL answers at {uri!r}: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    """What libpq or the server said, in one line without a dot at its end, and without the password."""
    line = str(error).strip().split("\n")[0].rstrip(".")
    password = os.environ.get(PASSWORD_VARIABLE)
    return line.replace(password, "***") if password else line


def _kind(index_type: str) -> PostgresIndex:
    kind = INDEX_TYPES[index_type].postgres
    assert kind is not None  # `check_index_type` has refused the others
    return kind


def _check_dim(index_type: str, dim: int) -> None:
    """Raise `ValueError` for embeddings with more numbers than the index type takes."""
    kind = _kind(index_type)
    if dim > kind.max_dim:
        raise ValueError(
            f"pgvector's index type {index_type!r} takes at most {kind.max_dim:,} numbers, and the embeddings have "
            f"{dim:,}: use 'exact'."
        )


def _tables(column: str, dim: int) -> list[str]:
    """The statements that make the three tables."""
    return [
        "CREATE TABLE {table} (row_id uuid PRIMARY KEY, name text NOT NULL, source text NOT NULL, "
        f"captions text[] NOT NULL, thumbnail bytea, embedding {column}({dim}) NOT NULL, metadata jsonb NOT NULL)",
        "CREATE TABLE {table_removed} (row_id uuid PRIMARY KEY)",
        "CREATE TABLE {table_info} (name text PRIMARY KEY, value jsonb NOT NULL)",
    ]


def _exists(connection, table: str) -> bool:
    """Whether there is a table of this name on the search path."""
    name = '"' + table.replace('"', '""') + '"'
    return connection.execute("SELECT to_regclass(%s) IS NOT NULL", (name,)).fetchone()[0]


def _chunks(row_ids: np.ndarray) -> Iterator[list[str]]:
    for start in range(0, len(row_ids), ROWS_PER_CALL):
        yield row_ids[start : start + ROWS_PER_CALL].astype(str).tolist()


def _vectors(column: pa.Array) -> np.ndarray:
    """(n, d) float32 of a column of lists of the same length."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32, copy=False)


def _as_vector(vector: np.ndarray, column: str) -> Any:
    from pgvector import HalfVector, Vector

    return (HalfVector if column == "halfvec" else Vector)(vector)


def _as_stored(row: dict, vector: Any, metadata: list[str]) -> tuple:
    """A row as the table has it: without NUL, which PostgreSQL holds in no text, and without missing values."""
    from uuid import UUID

    from psycopg.types.json import Jsonb

    thumbnail = row["thumbnail"]
    values = {without_nul(name): row[name] for name in metadata if row[name] is not None}
    kept = {name: without_nul(value) if isinstance(value, str) else value for name, value in values.items()}
    return (
        UUID(row["row_id"]),
        without_nul(row["name"]),
        without_nul(row["source"]),
        [without_nul(caption) for caption in row["captions"]],
        thumbnail["bytes"] if thumbnail else None,
        vector,
        Jsonb(kept),
    )


def _as_found(row: tuple) -> dict:
    """The hit that a row of the answer means."""
    row_id, name, source, captions, thumbnail, metadata, score = row
    entry = {
        **_read_json(metadata),
        "row_id": row_id,
        "name": name,
        "source": source,
        "captions": captions,
        "thumbnail": None if thumbnail is None else {"bytes": bytes(thumbnail), "path": None},
    }
    return as_hit(entry, float(score))


def _read_json(text: str) -> Any:
    """A value of jsonb, which writes a large float as an integer."""

    def read_integer(digits: str) -> int | float:
        number = int(digits)
        return number if MIN_INTEGER <= number <= MAX_INTEGER else float(digits)

    return json.loads(text, parse_int=read_integer)
