"""What several test modules need: other threads and sessions, and what they see of a lock."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import DatabaseError, connection, connections

from distlock import lock
from distlock.backends.base import TABLE

T = TypeVar("T")

LIMIT = 30.0


def in_thread(function: Callable[[], T]) -> T:
    """Call a function in another thread, with connections of its own, and return its result."""
    result: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as caught:
            error.append(caught)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive(), "the other thread hangs"
    if error:
        raise error[0]
    return result[0]


def run_async(main: Callable[[], Coroutine[Any, Any, T]], within: float = 60.0) -> T:
    """Run a coroutine, and close the connections of the thread that its synchronous code had."""

    async def whole() -> T:
        try:
            return await asyncio.wait_for(main(), within)
        finally:
            await sync_to_async(connections.close_all)()

    return asyncio.run(whole())


def is_free(name: str) -> bool:
    """Whether another thread would be granted the lock now."""

    def probe() -> bool:
        lease = lock(name, renew=False).try_acquire()
        if lease is not None:
            lease.release()
        return lease is not None

    return in_thread(probe)


def becomes_free(name: str, within: float = 0.5) -> bool:
    """Whether another thread is granted the lock within that many seconds."""

    def probe() -> bool:
        with lock(name, wait=within, renew=False):
            return True

    return in_thread(probe)


@contextmanager
def other_session() -> Iterator[Any]:
    """A cursor of another session on the same database."""
    other = connections.create_connection("default")
    other.settings_dict = connection.settings_dict
    try:
        with other.cursor() as cursor:
            yield cursor
    finally:
        other.close()


def steal(name: str) -> None:
    """Let the lease of whoever holds the lock expire, and grant the lock to somebody else."""
    with other_session() as cursor:
        past = "1970-01-01 00:00:00.000000"
        cursor.execute(f"UPDATE {TABLE} SET expires_at = %s WHERE name = %s", [past, name])

    def take() -> None:
        lock(name, ttl=60, renew=False).try_acquire()._released = True  # type: ignore[union-attr]

    in_thread(take)


def kill_session() -> None:
    """End the session of this thread's connection, as an administrator or a crash would."""
    with other_session() as cursor:
        if connection.vendor == "postgresql":
            with connection.cursor() as mine:  # behind PgBouncer the driver does not know it
                mine.execute("SELECT pg_backend_pid()")
                pid = mine.fetchone()[0]
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        else:
            cursor.execute(f"KILL {connection.connection.thread_id()}")
    time.sleep(0.05)


def sessions() -> set[int]:
    """The server's sessions on the database under test, but for the one that asks."""
    with other_session() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        else:
            cursor.execute(
                "SELECT id FROM information_schema.processlist WHERE db = DATABASE() "
                "AND id <> CONNECTION_ID()"
            )
        return {found for (found,) in cursor.fetchall()}


def eventually(check: Callable[[], object], within: float = 5.0) -> bool:
    """Whether something becomes true within that many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.02)
    return bool(check())


def row(name: str) -> dict[str, Any]:
    """The row of a lock, as another session sees it."""
    with other_session() as cursor:
        cursor.execute(f"SELECT * FROM {TABLE} WHERE name = %s", [name])
        columns = [column[0] for column in cursor.description]
        return dict(zip(columns, cursor.fetchone(), strict=True))


__all__ = [
    "DatabaseError",
    "becomes_free",
    "eventually",
    "in_thread",
    "is_free",
    "kill_session",
    "other_session",
    "row",
    "run_async",
    "sessions",
    "steal",
]
