"""Isolation levels: as OPTIONS give them to each new connection, and what they mean here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from django.db import DatabaseError, connection

from distlock import Lease
from distlock.backends import backend_for
from distlock.backends.base import TABLE
from distlock.signals import lock_lost
from tests.support import other_session

postgresql = pytest.mark.vendor("postgresql")
mysql = pytest.mark.vendor("mysql")

ABOVE = [
    "REPEATABLE READ",
    "SERIALIZABLE",
    pytest.param("REPEATABLE READ + snapshot", marks=mysql),
    pytest.param("SERIALIZABLE + snapshot", marks=mysql),
]
LEVELS = ["READ COMMITTED", *ABOVE]


def has_snapshot(level: str) -> bool:
    """Whether a transaction reads what was: MariaDB locks what it reads when it is SERIALIZABLE."""
    if level.startswith("SERIALIZABLE"):
        return connection.vendor == "postgresql"
    return level != "READ COMMITTED"


def options(level: str) -> dict[str, Any]:
    """Django's OPTIONS for a level; "+ snapshot": with MariaDB's `innodb_snapshot_isolation`."""
    level, _, snapshot = level.partition(" + ")
    if connection.vendor == "postgresql":
        from django.db.backends.postgresql.psycopg_any import IsolationLevel

        return {"isolation_level": IsolationLevel[level.replace(" ", "_")]}
    if not snapshot:
        return {"isolation_level": level.lower()}
    with other_session() as cursor:
        cursor.execute("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'")
        known = cursor.fetchone()
    setting = "SET SESSION innodb_snapshot_isolation = ON" if known else "SELECT 1"
    return {"isolation_level": level.lower(), "init_command": setting}


@contextmanager
def set_options(**given: Any) -> Iterator[None]:
    """Every connection that is opened in the block has these OPTIONS too."""
    settings = connection.settings_dict
    before = settings["OPTIONS"]
    settings["OPTIONS"] = {**before, **given}
    connection.close()
    try:
        yield
    finally:
        settings["OPTIONS"] = before
        connection.close()


@contextmanager
def set_level(level: str) -> Iterator[None]:
    """Every connection that is opened in the block has this level."""
    with set_options(**options(level)):
        yield


def snap() -> None:
    """Give the open transaction its snapshot, away from the lock table: a read may lock."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM django_migrations")


def mark(name: str) -> bool:
    """Let a waiter mark the row, as if the mark before had run out; whether that could be done.

    Where waiters write nothing, write a column that no grant depends on.
    """
    if connection.vendor != "postgresql":
        return _write_now(name, "note = 'somebody waits'")
    if not _write_now(name, "wanted_until = '1970-01-01'"):
        return False
    with suppress(DatabaseError), other_session() as cursor:
        seen = backend_for(connection).look(cursor.db, [(name, 0)])
        return seen[name, 0].wanted
    return False


def expire_now(name: str) -> bool:
    """Let the lease of whoever holds the lock have ended, if that can be written at once."""
    return _write_now(name, "expires_at = '1970-01-02'")


def _write_now(name: str, what: str) -> bool:
    with suppress(DatabaseError), other_session() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                f"UPDATE {TABLE} l SET {what} FROM (SELECT id FROM {TABLE} "
                "WHERE name = %s FOR NO KEY UPDATE SKIP LOCKED) free WHERE l.id = free.id",
                [name],
            )
        else:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 0")
            cursor.execute(f"UPDATE {TABLE} SET {what} WHERE name = %s", [name])
        return bool(cursor.rowcount)
    return False


def expire(name: str) -> None:
    """Let the lease of whoever holds the lock have ended, unknown to its holder."""
    with other_session() as cursor:
        cursor.execute(f"UPDATE {TABLE} SET expires_at = '1970-01-02' WHERE name = %s", [name])


def rows(name: str) -> list[tuple[Any, ...]]:
    """The row of a lock, as another session sees it, if there is one."""
    with other_session() as cursor:
        cursor.execute(f"SELECT * FROM {TABLE} WHERE name = %s", [name])
        return list(cursor.fetchall())


@contextmanager
def told_losses() -> Iterator[list[str]]:
    """The reasons of the losses that are told in the block, of leases that began in it.

    Whoever stole a lock in an earlier test loses it when its ttl is over, in the middle of a later.
    """
    told: list[str] = []
    since = backend_for(connection).clock(connection)

    def receive(lease: Lease, reason: str, **kwargs: Any) -> None:
        if lease.token >= since:
            told.append(reason)

    lock_lost.connect(receive)
    try:
        yield told
    finally:
        lock_lost.disconnect(receive)
