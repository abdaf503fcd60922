"""What the tests say to the table behind a backend's back: plain SQL, spelled here for each vendor.

Nothing of it is shared with the package, so that the two can be compared.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from django.conf import settings
from django.db import DatabaseError, connection, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from distlock.backends.base import Backend, Claim, Grant

T = TypeVar("T")

TABLE = "distlock_distributedlock"
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MILLISECOND = 1_000
SECOND = 1_000_000
MINUTE = 60 * SECOND
FAR = 9_000_000_000_000_000
"""A token from the year 2255: as after a clock that stood far ahead."""
LIMIT = 20.0
"""Seconds after which a test's own thread counts as hung."""

MOMENTS = ("acquired_at", "expires_at", "lost_at")
OTHER_MOMENTS = ("wanted_until",)
NOW = {
    "postgresql": "clock_timestamp()",
    "mysql": "UTC_TIMESTAMP(6)",
    "sqlite": "strftime('%%Y-%%m-%%d %%H:%%M:%%f000', 'now')",
}
FROM_NOW = {
    "postgresql": "clock_timestamp() + %s * interval '1 microsecond'",
    "mysql": "UTC_TIMESTAMP(6) + INTERVAL %s MICROSECOND",
    "sqlite": "strftime('%%Y-%%m-%%d %%H:%%M:%%f000', 'now', (%s / 1000000.0) || ' seconds')",
}
MICROSECONDS = {
    "postgresql": "(extract(epoch FROM {}) * 1000000)::bigint",
    "mysql": "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {})",
    "sqlite": "CAST({} AS text)",
}


@dataclass
class Holding:
    """A lease as the backends see it."""

    name: str = "n"
    slot: int = 0
    owner: str = "me"
    token: int = 0
    expires_us: int = 0
    min_hold_us: int = 0


def claim(
    owner: str = "me", name: str = "n", ttl: int = MINUTE, slot: int = 0, **more: Any
) -> Claim:
    return Claim(name=name, slot=slot, owner=owner, ttl=ttl, **more)


def take(
    backend: Backend,
    owner: str = "me",
    name: str = "n",
    ttl: int = MINUTE,
    slot: int = 0,
    *,
    on: BaseDatabaseWrapper = connection,
    **more: Any,
) -> Holding:
    """Acquire a lock that must be free."""
    grant = backend.grant(on, claim(owner, name, ttl, slot, **more), 0)
    assert grant is not None, f"{name!r} was refused to {owner!r}"
    return Holding(name, slot, owner, grant.token, grant.expires_us, more.get("min_hold", 0))


def attempt(backend: Backend, on: BaseDatabaseWrapper, wanted: Claim) -> Grant | None:
    """Try once, as the library does: who meets other sessions' locks, or a deadlock, met busy."""
    try:
        return backend.grant(on, wanted, 0)
    except DatabaseError as error:
        if not backend.is_contention(error):
            raise
        return None


# -- the row -------------------------------------------------------------------------------------


def execute(sql: str, parameters: Sequence[Any] = (), on: BaseDatabaseWrapper = connection) -> int:
    with on.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.rowcount


def query(
    sql: str, parameters: Sequence[Any] = (), on: BaseDatabaseWrapper = connection
) -> list[Any]:
    with on.cursor() as cursor:
        cursor.execute(sql, parameters)
        return list(cursor.fetchall())


def stored(name: str = "n", slot: int = 0, on: BaseDatabaseWrapper = connection) -> Any:
    """The row, with its moments in microseconds since 1970; `None` if there is none."""
    moments = ", ".join(f"{MICROSECONDS[on.vendor].format(m)} AS {m}_us" for m in MOMENTS)
    with on.cursor() as cursor:
        cursor.execute(
            f"SELECT t.*, {moments} FROM {TABLE} t WHERE name = %s AND slot = %s", [name, slot]
        )
        found = cursor.fetchone()
        if found is None:
            return None
        row = dict(zip([column[0] for column in cursor.description], found, strict=True))
    for moment in MOMENTS:
        row[moment] = _as_microseconds(row.pop(f"{moment}_us"))
    return SimpleNamespace(**row)


def now(on: BaseDatabaseWrapper = connection) -> int:
    """The database's clock, in microseconds since 1970."""
    expression = MICROSECONDS[on.vendor].format(NOW[on.vendor])
    value = _as_microseconds(query(f"SELECT {expression}", on=on)[0][0])
    assert value is not None
    return value


def write(name: str = "n", slot: int = 0, **columns: Any) -> None:
    """Write columns of a row, making it if need be. A moment is given in microseconds from now."""
    if stored(name, slot) is None:
        execute(f"INSERT INTO {TABLE} (name, slot) VALUES (%s, %s)", [name, slot])
    values = [
        f"{column} = {FROM_NOW[connection.vendor] if column in MOMENTS + OTHER_MOMENTS else '%s'}"
        for column in columns
    ]
    execute(
        f"UPDATE {TABLE} SET {', '.join(values)} WHERE name = %s AND slot = %s",
        [*columns.values(), name, slot],
    )


def expire(name: str = "n", slot: int = 0, ago: int = SECOND) -> None:
    """Let a lease have ended that long ago."""
    write(name, slot, expires_at=-ago)


def clear() -> None:
    execute(f"DELETE FROM {TABLE}")


def purge(
    backend: Backend,
    older_than: int = 0,
    limit: int = 100,
    *,
    on: BaseDatabaseWrapper = connection,
) -> int:
    """Purge batch after batch, as the command does; return how many rows went."""
    total, after = 0, 0
    while (batch := backend.purge(on, older_than, after, limit)) is not None:
        count, last = batch
        assert last > after, "the next batch would be the same"
        total, after = total + count, last
    return total


def microseconds(moment: datetime) -> int:
    """What a moment of the API or the ORM is on the database's clock, with USE_TZ on or off."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(settings.TIME_ZONE))
    return (moment - EPOCH) // timedelta(microseconds=1)


def _as_microseconds(value: Any) -> int | None:
    if isinstance(value, str):  # SQLite
        return microseconds(datetime.fromisoformat(value).replace(tzinfo=timezone.utc))
    return value if value is None else int(value)


# -- other sessions ------------------------------------------------------------------------------


@contextmanager
def session() -> Iterator[BaseDatabaseWrapper]:
    """Another session on the same database, that any thread may use."""
    other = connections.create_connection("default")
    other.inc_thread_sharing()
    bounded(other)
    try:
        yield other
    finally:
        other.close()


def bounded(on: BaseDatabaseWrapper) -> None:
    """Let no statement of a session wait long, so that a test which should fail does not hang."""
    if on.vendor == "postgresql":
        execute("SET statement_timeout = '3s'", on=on)
    elif on.vendor == "mysql":
        execute("SET SESSION innodb_lock_wait_timeout = 3", on=on)


def unbounded(on: BaseDatabaseWrapper) -> None:
    """Undo `bounded`."""
    if on.vendor == "postgresql":
        execute("RESET statement_timeout", on=on)
    elif on.vendor == "mysql":
        execute("SET SESSION innodb_lock_wait_timeout = DEFAULT", on=on)


@contextmanager
def transaction(on: BaseDatabaseWrapper, isolation: str = "") -> Iterator[BaseDatabaseWrapper]:
    """A transaction of another session, rolled back at the end."""
    if isolation and on.vendor == "mysql":
        execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}", on=on)
    on.set_autocommit(False)
    try:
        if isolation and on.vendor == "postgresql":
            execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}", on=on)
        yield on
    finally:
        on.rollback()
        on.set_autocommit(True)


def isolate(on: BaseDatabaseWrapper, level: str) -> None:
    """Give a session that nothing has been asked of yet a level; "+ snapshot": MariaDB's option."""
    level, _, snapshot = level.partition(" + ")
    if on.vendor == "postgresql":
        execute(f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}", on=on)
    else:
        execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}", on=on)
    if snapshot and query("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'", on=on):
        execute("SET SESSION innodb_snapshot_isolation = ON", on=on)


@contextmanager
def pinned(
    name: str = "n", slot: int = 0, lock: str = "FOR UPDATE"
) -> Iterator[BaseDatabaseWrapper]:
    """Another session's open transaction that has the row locked."""
    with session() as other, transaction(other):
        sql = f"SELECT 1 FROM {TABLE} WHERE name = %s AND slot = %s {lock}"
        assert query(sql, [name, slot], on=other)
        yield other


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds, f"took {took:.3f} s"


def together(*functions: Callable[[], T]) -> list[T]:
    """Call the functions at the same moment, each in a thread of its own; return their results."""
    start = threading.Barrier(len(functions), timeout=LIMIT)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(index: int, function: Callable[[], T]) -> None:
        try:
            start.wait()
            results[index] = function()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(functions))]
