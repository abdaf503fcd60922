"""The limits: the least that a server can be asked for, with its bare driver and no Django.

A raw lease is two statements, each committed before it returns: a prepared upsert that takes an
expired row, and an UPDATE that frees it. It keeps an owner, a token and an expiry, as a lease must.
"""

from __future__ import annotations

import uuid
from typing import Any, ClassVar

from .base import ALONE, CONTENDED, PATIENCE, TTL, Contender, polled, server_at

POLL = 0.01


class RawPostgreSQL(Contender):
    server = "postgresql"

    @property
    def connection(self) -> Any:
        """This thread's own, in autocommit."""
        import psycopg

        if not hasattr(self.local, "connection"):
            at = server_at(self.url)
            at["dbname"] = at.pop("database")
            self.local.connection = psycopg.connect(**at, autocommit=True)
        return self.local.connection

    def execute(self, sql: str, *parameters: object) -> Any:
        return self.connection.execute(sql, parameters, prepare=True)


class RawLease(RawPostgreSQL):
    key = "pg-raw-lease"
    title = "raw lease (psycopg, prepared)"
    waits = "polls every 10 ms"
    workloads = (*ALONE, *CONTENDED, "churn", "million")
    table = "bench_lease"
    fill = (
        "INSERT INTO bench_lease SELECT 'filler:' || i, '', 1, {end} "
        "FROM generate_series(1, {rows}) i"
    )

    CREATE: ClassVar[str] = (
        'CREATE TABLE IF NOT EXISTS bench_lease (name varchar(255) COLLATE "C" PRIMARY KEY, '
        "owner varchar(64) NOT NULL, token bigint NOT NULL, expires_at timestamptz NOT NULL)"
    )
    ACQUIRE: ClassVar[str] = (
        "INSERT INTO bench_lease AS l VALUES "
        f"(%s, %s, 1, clock_timestamp() + interval '{TTL} s') "
        "ON CONFLICT (name) DO UPDATE SET owner = EXCLUDED.owner, token = l.token + 1, "
        "expires_at = EXCLUDED.expires_at WHERE l.expires_at <= clock_timestamp() RETURNING token"
    )
    # A failed upsert locks the row and writes WAL; this matches nothing and writes nothing.
    RETRY: ClassVar[str] = (
        "UPDATE bench_lease SET owner = %s, token = token + 1, "
        f"expires_at = clock_timestamp() + interval '{TTL} s' "
        "WHERE name = %s AND expires_at <= clock_timestamp() RETURNING token"
    )
    RELEASE: ClassVar[str] = (
        "UPDATE bench_lease SET owner = '', expires_at = clock_timestamp() "
        "WHERE name = %s AND owner = %s AND token = %s"
    )

    def prepare(self) -> None:
        self.connection.execute(self.CREATE)

    def acquire(self, name: str) -> tuple[str, int]:
        owner = uuid.uuid4().hex
        row = self.execute(self.ACQUIRE, name, owner).fetchone()
        if row is None:
            row = polled(lambda: self.execute(self.RETRY, owner, name).fetchone(), POLL)
        return owner, row[0]

    def release(self, name: str, held: tuple[str, int]) -> None:
        if self.execute(self.RELEASE, name, *held).rowcount != 1:
            raise RuntimeError(f"{name} was not held")


class RawAdvisory(RawPostgreSQL):
    key = "pg-raw-advisory"
    title = "raw advisory lock (psycopg, prepared)"
    waits = "in the server's queue"

    def acquire(self, name: str) -> None:
        self.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", name)

    def release(self, name: str, held: None) -> None:
        if not self.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", name).fetchone()[
            0
        ]:
            raise RuntimeError(f"{name} was not held")


class RawMariaDB(Contender):
    server = "mariadb"

    def execute(self, sql: str, *parameters: object) -> Any:
        import MySQLdb

        if not hasattr(self.local, "connection"):
            at = server_at(self.url)
            self.local.connection = MySQLdb.connect(**at, autocommit=True, charset="utf8mb4")
        cursor = self.local.connection.cursor()
        cursor.execute(sql, parameters or None)
        return cursor


class RawMariaDBLease(RawMariaDB):
    key = "mariadb-raw-lease"
    title = "raw lease (mysqlclient)"
    waits = "polls every 10 ms"
    workloads = (*ALONE, *CONTENDED, "churn", "million")
    table = "bench_lease"
    fill = (
        "INSERT INTO bench_lease SELECT CONCAT('filler:', seq), '', 1, {end} FROM seq_1_to_{rows}"
    )

    CREATE: ClassVar[str] = (
        "CREATE TABLE IF NOT EXISTS bench_lease (name varchar(255) COLLATE utf8mb4_bin "
        "PRIMARY KEY, owner varchar(64) NOT NULL, token bigint NOT NULL, "
        "expires_at datetime(6) NOT NULL) CHARACTER SET utf8mb4"
    )
    ACQUIRE: ClassVar[str] = (
        "INSERT INTO bench_lease VALUES "
        f"(%s, %s, 1, UTC_TIMESTAMP(6) + INTERVAL {TTL} SECOND) ON DUPLICATE KEY UPDATE "
        "owner = IF(expires_at <= UTC_TIMESTAMP(6), VALUES(owner), owner), "
        "token = IF(expires_at <= UTC_TIMESTAMP(6), token + 1, token), "
        "expires_at = IF(expires_at <= UTC_TIMESTAMP(6), VALUES(expires_at), expires_at) "
        "RETURNING owner, token"
    )
    RELEASE: ClassVar[str] = (
        "UPDATE bench_lease SET owner = '', expires_at = UTC_TIMESTAMP(6) "
        "WHERE name = %s AND owner = %s AND token = %s"
    )

    def prepare(self) -> None:
        self.execute(self.CREATE)

    def acquire(self, name: str) -> tuple[str, int]:
        owner = uuid.uuid4().hex

        def attempt() -> tuple[str, int] | None:
            found, token = self.execute(self.ACQUIRE, name, owner).fetchone()
            return (owner, token) if found == owner else None

        return attempt() or polled(attempt, POLL)

    def release(self, name: str, held: tuple[str, int]) -> None:
        if self.execute(self.RELEASE, name, *held).rowcount != 1:
            raise RuntimeError(f"{name} was not held")


class RawGetLock(RawMariaDB):
    key = "mariadb-raw-getlock"
    title = "raw GET_LOCK (mysqlclient)"
    waits = "in the server's queue"

    def acquire(self, name: str) -> None:
        if self.execute("SELECT GET_LOCK(%s, %s)", name, PATIENCE).fetchone()[0] != 1:
            raise TimeoutError("the lock did not come free")

    def release(self, name: str, held: None) -> None:
        if self.execute("SELECT RELEASE_LOCK(%s)", name).fetchone()[0] != 1:
            raise RuntimeError(f"{name} was not held")


CONTENDERS: list[type[Contender]] = [RawLease, RawAdvisory, RawMariaDBLease, RawGetLock]
