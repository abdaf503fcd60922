"""Threads that wait for locks, and what they and the lookout send meanwhile."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from django.db import connection, connections
from django.db.backends.utils import CursorWrapper

from distlock import Lease, lock
from distlock.backends import backend_for
from distlock.lookout import lookout
from tests.support import eventually, other_session
from tests.torture.conftest import ROOT, environment

LIMIT = 30.0

_numbers = itertools.count()


class Waiter(threading.Thread):
    """A thread that waits for a lock, holds it for a moment, and gives it back."""

    def __init__(self, name: str, *, wait: float | None = LIMIT, hold: float = 0, **more: Any):
        super().__init__(name=f"waiter {next(_numbers)}", daemon=True)
        self._lock = lock(name, wait=wait, **more)
        self._hold = hold
        self.began = time.monotonic()
        self.granted = self.ended = 0.0
        self.error: BaseException | None = None
        self._connection: Any = None
        self.start()

    @property
    def is_connected(self) -> bool:
        """Whether its own connection to the database is open."""
        return self._connection is not None and self._connection.connection is not None

    def run(self) -> None:
        self._connection = connections["default"]
        try:
            with self._lock.acquire():
                self.granted = time.monotonic()
                time.sleep(self._hold)
        except BaseException as error:
            self.error = error
        finally:
            self.ended = time.monotonic()
            connections.close_all()

    def result(self, limit: float = LIMIT) -> float:
        """When it was granted the lock, on the monotonic clock."""
        self.join(limit)
        assert not self.is_alive(), f"not served within {limit} s"
        if self.error:
            raise self.error
        return self.granted


class Deaf:
    """A waiter that is woken and does nothing."""

    is_well = True

    def wake(self) -> bool:
        return True

    def ticket(self) -> None:
        return None


def in_line(name: str) -> int:
    """How many of this process stand in line for a name."""
    queue = lookout("default")._queues.get((name, 0))
    return len(queue.waiters) if queue else 0


def line_up(name: str, count: int, **more: Any) -> list[Waiter]:
    """Waiters for one name, in the order in which they stand in line."""
    waiters = []
    for _ in range(count):
        before = in_line(name)
        waiters.append(Waiter(name, **more))
        assert eventually(lambda: in_line(name) > before)  # noqa: B023
    return waiters


def is_marked(name: str) -> bool:
    """Whether a release would notify: see Note [Wanted]."""
    with other_session() as cursor:
        cursor.execute(
            "SELECT wanted_until >= expires_at FROM distlock_distributedlock WHERE name = %s",
            [name],
        )
        return bool(cursor.fetchone()[0])


def settle(*names: str) -> None:
    """Return when the lookout has nothing more to do for the names but to wait."""
    if connection.vendor == "postgresql" and lookout("default")._ears.open:
        for name in names:
            assert eventually(lambda: is_marked(name))  # noqa: B023
    time.sleep(0.5)


def listens() -> bool:
    """Whether the lookout has begun to listen, or need not."""
    one = lookout("default")
    ears, one._listen_at = one._ears, 0.0
    one._thread.wake()
    return eventually(lambda: ears.open) if backend_for(connection).notifies else True


@contextmanager
def held(*names: str, **more: Any) -> Iterator[list[Lease]]:
    """Hold locks; what was not released meanwhile is at the end."""
    with ExitStack() as stack:
        leases = []
        for name in names:
            leases.append(lock(name, **{"ttl": 300, **more}).acquire())
            stack.callback(leases[-1].release)
        yield leases


@contextmanager
def statements() -> Iterator[list[str]]:
    """Yield what every connection of this process sends from now on, whichever thread's it is."""
    said: list[str] = []
    real = CursorWrapper.execute

    def execute(self: Any, sql: Any, params: Any = None) -> Any:
        said.append(str(sql))
        return real(self, sql, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CursorWrapper, "execute", execute)
        yield said


@contextmanager
def instead_of(verb: str, answer: Callable[..., Any]) -> Iterator[list[str]]:
    """Replace a verb of the backend; `answer` gets the real one. Yields who has called it."""
    calls: list[str] = []
    backend = backend_for(connection)
    real = getattr(backend, verb)

    def replaced(*arguments: Any, **more: Any) -> Any:
        calls.append(threading.current_thread().name)
        return answer(real, *arguments, **more)

    backend.__dict__[verb] = replaced
    try:
        yield calls
    finally:
        del backend.__dict__[verb]


def calls_of(verb: str) -> Any:
    """Yield the names of the threads that call a verb of the backend."""
    return instead_of(verb, lambda real, *arguments, **more: real(*arguments, **more))


def last_words() -> dict[int, Any]:
    """When each session on the database last began a statement, by the server (PostgreSQL)."""
    with other_session() as cursor:
        cursor.execute(
            "SELECT pid, query_start FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return dict(cursor.fetchall())


def own_sessions() -> list[int]:
    """The sessions of distlock's private connections (PostgreSQL)."""
    with other_session() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND application_name = 'distlock'"
        )
        return [pid for (pid,) in cursor.fetchall()]


def kill_own_sessions() -> int:
    """End them, as an administrator would; return how many there were."""
    pids = own_sessions()
    with other_session() as cursor:
        for pid in pids:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
    return len(pids)


@contextmanager
def running(
    code: str, *arguments: object, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that runs some code on the database under test; it is killed at the end."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | (environ or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], say: str | None = None, limit: float = 60) -> str:
    """Wait for the end of a process, which must be a good one; return what it printed."""
    said, complaints = process.communicate(say, timeout=limit)
    assert process.returncode == 0, complaints[-3000:]
    return said


def output_of(code: str, *arguments: object, environ: dict[str, str] | None = None) -> str:
    """Run some code in a process of its own; return what it printed."""
    with running(code, *arguments, environ=environ) as process:
        return ended(process)
