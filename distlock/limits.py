"""How long a private connection may take: to be opened, and to answer.

The drivers do not keep such a limit: a connect_timeout counts whole seconds, and a statement on a
network that swallows packets waits for ever. So a connection is opened in a thread of its own, for
which nobody waits longer than he can; and one thread per process shuts down the sockets whose
statement takes too long.
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from django.db import OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from .background import Background, after_fork
from .deadlines import Limit, real_clock

IDLE = 3600.0
PACE = 1.0
"""Seconds until another connection is tried, while one that was begun may still come."""


class Watch:
    """Shuts sockets down when their time is up."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._ends: dict[socket.socket, float] = {}
        self._planned = math.inf
        self._thread = Background("distlock-watch", self._step, lambda: None)

    @contextmanager
    def cut_off_after(self, limit: float, wire: socket.socket | None) -> Iterator[None]:
        """Shut the socket down if the block takes longer than `limit` seconds."""
        if wire is None:
            yield
            return
        end = real_clock() + limit
        with self._mutex:
            self._ends[wire] = end
            sooner = end < self._planned
            self._planned = min(end, self._planned)
        self._thread.ensure_started()
        if sooner:
            self._thread.wake()
        try:
            yield
        finally:
            with self._mutex:
                self._ends.pop(wire, None)

    def _step(self) -> float:
        """Cut off who is late. An end that was planned before stays planned: waking up costs."""
        with self._mutex:
            now = real_clock()
            for wire in [wire for wire, end in self._ends.items() if end <= now]:
                del self._ends[wire]
                with suppress(OSError):
                    wire.shutdown(socket.SHUT_RDWR)
            self._planned = min(self._ends.values(), default=math.inf)
            return min(IDLE, max(0.0, self._planned - now))


watch = Watch()


class Opener:
    """Opens connections. One that comes too late for who wanted it is there for the next."""

    def __init__(self, create: Callable[[], BaseDatabaseWrapper]) -> None:
        self._create = create
        self._arrival = threading.Condition()
        self._arrived: BaseDatabaseWrapper | None = None
        self._wanted = False
        self._under_way = 0
        self._next_start = -math.inf

    def open(self, limit: float) -> BaseDatabaseWrapper:
        """Return an open connection. Raises `OperationalError` if there is none in that time."""
        errors: list[BaseException] = []
        deadline = Limit(limit)
        with self._arrival:
            self._wanted = True
            while not (self._arrived or errors) and deadline.left > 0:
                pause = self._next_start - real_clock()
                if pause <= 0:
                    self._start(errors)
                else:
                    self._arrival.wait(min(pause, deadline.left))
            if connection := self._arrived:
                self._wanted, self._arrived = False, None
                return connection
        if errors:
            raise errors[0]
        raise OperationalError(f"distlock's connection was not open within {limit:.1f} s.")

    def close(self) -> None:
        """Close what has come and was not fetched, and whatever will still come."""
        with self._arrival:
            connection, self._arrived, self._wanted = self._arrived, None, False
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def forget(self) -> BaseDatabaseWrapper | None:
        """Return what has come and was not fetched: a forked child must not close it."""
        return self._arrived

    def _start(self, errors: list[BaseException]) -> None:
        self._under_way += 1
        self._next_start = real_clock() + PACE
        work = threading.Thread(
            target=self._open, args=(errors,), name="distlock-connect", daemon=True
        )
        try:
            work.start()
        except RuntimeError:  # no more threads, or the interpreter is ending
            self._open(errors)

    def _open(self, errors: list[BaseException]) -> None:
        try:
            connection = self._create()
            connection.ensure_connection()
        except BaseException as error:
            with self._arrival:
                self._has_ended()
                errors.append(error)
                self._arrival.notify_all()
            return
        with self._arrival:
            self._has_ended()
            if self._wanted and self._arrived is None:
                self._arrived = connection
                self._arrival.notify_all()
                return
        with suppress(Exception):
            connection.close()

    def _has_ended(self) -> None:
        self._under_way -= 1
        if not self._under_way:
            self._next_start = -math.inf


def _forget() -> None:
    watch.__init__()  # type: ignore[misc]


after_fork(_forget)
