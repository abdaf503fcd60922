"""Which connection there is: the caller's, and one private connection per process and database.

The private connection serves lock statements from inside transactions, and renewals. It is made
from the alias's settings, without the pool, in autocommit, and is used by one thread at a time:
renewals go first. Every use of it has a limit in time; past that the socket is shut down, the
statement fails, and the next use opens a new connection.
"""

from __future__ import annotations

import copy
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from django.db import (
    DatabaseError,
    DataError,
    IntegrityError,
    InterfaceError,
    OperationalError,
    connections,
)
from django.db.backends.base.base import NO_DB_ALIAS, BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.utils import load_backend

from .backends import backend_for
from .background import after_fork

T = TypeVar("T")

LIMIT = 5.0
"""Seconds that a lock statement on a private connection may take."""


def in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Whether the caller has a transaction open. The blocks that `TestCase` opened do not count."""
    if connection.atomic_blocks:
        return any(not _is_testcase(block) for block in connection.atomic_blocks)
    if connection.in_atomic_block:
        return True
    if connection.connection is None:
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.get_autocommit()


def in_testcase(connection: BaseDatabaseWrapper) -> bool:
    """Whether `TestCase` keeps a transaction open that no other connection can see into."""
    return any(map(_is_testcase, connection.atomic_blocks))


def _is_testcase(block: object) -> bool:
    return bool(getattr(block, "_from_testcase", False))


def is_broken(connection: BaseDatabaseWrapper) -> bool:
    """Whether an error just came from a connection that is gone, and not from a statement."""
    if connection.connection is None:
        return True
    try:
        return not connection.is_usable()
    except DatabaseError:
        return True


class Private:
    """The private connection to one alias. Threads take turns; the keeper goes first."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._turn = threading.Condition()
        self._taken_by: int | None = None
        self._keeper_waits = False
        self._connection: BaseDatabaseWrapper | None = None
        self.identity: Any = None
        """The lock table that this connection reaches, once somebody has asked."""

    @contextmanager
    def use(self, limit: float = LIMIT, *, keeper: bool = False) -> Iterator[BaseDatabaseWrapper]:
        """Yield the connection, for lock statements that may take `limit` seconds together.

        Raises `OperationalError` if there is no turn or no answer in that time.
        """
        try:
            self._take(limit, keeper)
            connection = self._opened()
            backend = backend_for(connection)
            with cut_off_after(limit, connection), backend.bounded(connection, limit):
                yield connection
        except BaseException as error:
            if self._taken_by == threading.get_ident() and self._is_spoilt(error):
                self.close()
            raise
        finally:
            self._give()

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def close_if_unused(self) -> None:
        """Close the connection unless a statement runs on it."""
        try:
            self._take(0.0, keeper=False)
            self.close()
        except OperationalError:
            return
        finally:
            self._give()

    def forget(self) -> None:
        """Drop the connection in a forked child without a byte on the wire; see Note [Fork]."""
        connection, self._connection = self._connection, None
        physical = connection.connection if connection is not None else None
        if physical is not None:
            _inherited.append(physical)
            with suppress(Exception):
                nowhere = os.open(os.devnull, os.O_RDWR)
                os.dup2(nowhere, physical.fileno())
                os.close(nowhere)

    def _take(self, limit: float, keeper: bool) -> None:
        with self._turn:
            if keeper:
                self._keeper_waits = True
            try:
                mine = self._turn.wait_for(
                    lambda: self._taken_by is None and (keeper or not self._keeper_waits), limit
                )
            finally:
                if keeper:
                    self._keeper_waits = False
            if not mine:
                raise OperationalError(
                    f"distlock's connection to {self._alias!r} was busy for {limit:.1f} s."
                )
            self._taken_by = threading.get_ident()

    def _give(self) -> None:
        """End this thread's turn; harmless if an exception came before it had one."""
        with self._turn:
            if self._taken_by == threading.get_ident():
                self._taken_by = None
                self._turn.notify_all()

    def _is_spoilt(self, error: BaseException) -> bool:
        """Whether the connection may be out of step: an interrupt may stop between two messages."""
        if self._connection is None or isinstance(error, DataError | IntegrityError):
            return False
        if not isinstance(error, OperationalError | InterfaceError):
            return True
        return is_broken(self._connection)

    def _opened(self) -> BaseDatabaseWrapper:
        wanted = connections.settings[self._alias]
        current = self._connection
        if current is not None and current.settings_dict["NAME"] != wanted["NAME"]:
            self.close()  # the test runner has moved the alias to another database
            current = None
        if current is None:
            current = self._connection = open_private(self._alias)
        return current


def open_private(alias: str) -> BaseDatabaseWrapper:
    """Return a new connection to an alias that nothing else knows of. The caller closes it."""
    public = connections[alias]
    settings_dict: dict[str, Any] = copy.deepcopy(public.settings_dict)
    settings_dict["AUTOCOMMIT"] = True
    settings_dict["ATOMIC_REQUESTS"] = False
    backend_for(public).private_settings(settings_dict)
    connection = load_backend(settings_dict["ENGINE"]).DatabaseWrapper(settings_dict, alias)
    assert isinstance(connection, BaseDatabaseWrapper)
    connection.inc_thread_sharing()
    return connection


@contextmanager
def cut_off_after(limit: float, connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Shut the connection's socket down if the block takes longer than `limit` seconds.

    The server has a limit of its own, but a server that stands still, or a network that swallows
    packets, does not keep it.
    """
    connection.ensure_connection()
    if not hasattr(connection.connection, "fileno"):
        yield
        return
    wire = socket.socket(fileno=os.dup(connection.connection.fileno()))
    timer = threading.Timer(limit + 0.5, _shut_down, [wire])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        wire.close()


def _shut_down(wire: socket.socket) -> None:
    with suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)


_privates: dict[str, Private] = {}
_mutex = threading.Lock()
_inherited: list[Any] = []


def private(alias: str) -> Private:
    """Return this process's private connection to an alias."""
    with _mutex:
        return _privates.setdefault(alias, Private(alias))


def on_private(
    alias: str, statement: Callable[[BaseDatabaseWrapper], T], limit: float = LIMIT
) -> T:
    """Run a lock statement on the private connection: once more if that was gone."""
    try:
        with private(alias).use(limit) as connection:
            return statement(connection)
    except (OperationalError, InterfaceError) as error:
        if backend_for(connections[alias]).is_contention(error):
            raise
        with private(alias).use(limit) as connection:
            return statement(connection)


def close_private() -> None:
    """Close every private connection of this process that nobody is using."""
    for one in list(_privates.values()):
        one.close_if_unused()


def _make_way(connection: BaseDatabaseWrapper, **kwargs: object) -> None:
    """Let go of a database that is about to be dropped, as a test runner does at its end."""
    if connection.alias == NO_DB_ALIAS:
        close_private()


connection_created.connect(_make_way, dispatch_uid="distlock.connections")


def _forget() -> None:
    global _mutex
    _mutex = threading.Lock()
    for one in _privates.values():
        one.forget()
    _privates.clear()


after_fork(_forget)
