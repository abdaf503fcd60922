"""Which connection there is: the caller's, and this process's own, two per database at the most.

The private connection serves lock statements from inside transactions, renewals, and looks at locks
that somebody waits for; another one, only while somebody waits, listens. A private one is made
from the alias's settings, without the pool, in autocommit, and is used by one thread at a time:
renewals go first. Every use of it has a limit in time; past that the socket is shut down, the
statement fails, and the next use opens a new connection.
"""

from __future__ import annotations

import copy
import math
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
from .deadlines import Limit, real_clock
from .limits import Opener, watch

T = TypeVar("T")

SHORT = 1.0
"""Seconds after which a connection that had nothing to do may have been closed."""
LIMIT = 5.0
"""Seconds that a use of a private connection may take."""
SERVERS_SHARE = 0.8
"""Of that, what the server has for a statement: it shall give up before its client does."""


def in_transaction(connection: BaseDatabaseWrapper) -> bool:
    """Whether the caller has a transaction open. The blocks that `TestCase` opened do not count."""
    if connection.atomic_blocks:
        return any(not _is_testcase(block) for block in connection.atomic_blocks)
    if connection.in_atomic_block:
        return True
    if connection.connection is None:
        return not connection.settings_dict["AUTOCOMMIT"]
    return not connection.get_autocommit()


def refresh(connection: BaseDatabaseWrapper, idle: float = math.inf) -> None:
    """Close a connection that was idle for so many seconds, if somebody has closed it already.

    Without `idle` it may have been so for long.

    A server, or something in between, does so with what has nothing to do for long. In a
    transaction it is left alone.
    """
    if idle < SHORT or connection.connection is None or in_transaction(connection):
        return
    if not connection.is_usable():
        connection.close()


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


class TooSlow(OperationalError):
    """A private connection gave no turn, did not open or did not answer in time."""


class Private:
    """The private connection to one alias. Threads take turns; the keeper goes first."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        # Asked here and now: on MariaDB it may take a statement on the caller's own connection.
        self.backend = backend_for(connections[alias])
        self._opener = Opener(self._unopened)
        self._turn = threading.Condition()
        self._taken_by: int | None = None
        self._keeper_waits = False
        self._connection: BaseDatabaseWrapper | None = None
        self.wire: socket.socket | None = None
        """A handle on the socket, while there is one."""
        self._used = 0.0
        self.patience = LIMIT
        """Seconds that the keeper can wait for a thread that has its turn and no answer."""
        self.identity: Any = None
        """The lock table that this connection reaches, once somebody has asked."""

    @contextmanager
    def use(self, limit: float = LIMIT, *, keeper: bool = False) -> Iterator[BaseDatabaseWrapper]:
        """Yield the connection, for lock statements; it all may take `limit` seconds together.

        Raises `TooSlow` if there is no turn, no connection or no answer in that time.
        """
        deadline = Limit(limit)
        try:
            self._take(deadline, keeper)
            limit = deadline.left if keeper else min(deadline.left, self.patience)
            deadline = Limit(limit)
            with self._bounded(self._opened(deadline), deadline.left) as connection:
                yield connection
        except (OperationalError, InterfaceError) as error:
            if deadline.left > limit / 4 or self.backend.is_contention(error):
                raise
            raise TooSlow(
                f"No answer on distlock's connection to {self._alias!r} in {limit:.2g} s: {error}"
            ) from error
        finally:
            self._give()

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        connection, self._connection = self._connection, None
        wire, self.wire = self.wire, None
        self._opener.close()
        if connection is not None:
            with suppress(Exception):
                connection.close()
        if wire is not None:
            wire.close()

    def close_if_unused(self, seconds: float = 0.0) -> None:
        """Close the connection unless a statement runs on it, or did in the last `seconds`."""
        if real_clock() - self._used < seconds:
            return
        try:
            self._take(Limit(0.0), keeper=False)
            self.close()
        except OperationalError:
            return
        finally:
            self._give()

    def forget(self) -> None:
        """Drop the connection in a forked child without a byte on the wire; see Note [Fork]."""
        if self.wire is not None:
            self.wire.close()
        for connection in (self._connection, self._opener.forget()):
            physical = connection.connection if connection is not None else None
            if physical is not None:
                _inherited.append(physical)
                with suppress(Exception):
                    nowhere = os.open(os.devnull, os.O_RDWR)
                    os.dup2(nowhere, physical.fileno())
                    os.close(nowhere)
        self._connection = self.wire = None

    @contextmanager
    def _bounded(
        self, connection: BaseDatabaseWrapper, limit: float
    ) -> Iterator[BaseDatabaseWrapper]:
        on_server = backend_for(connection).bounded(connection, limit * SERVERS_SHARE)
        try:
            with watch.cut_off_after(limit, self.wire), on_server:
                yield connection
        except BaseException as error:
            # An interrupt may stop between two messages. After most errors of a statement the
            # connection would be fit for use, but to ask it may take for ever.
            if not isinstance(error, DataError | IntegrityError) and (
                not self.backend.is_contention(error)
            ):
                self.close()
            raise

    def _take(self, deadline: Limit, keeper: bool) -> None:
        with self._turn:
            if keeper:
                self._keeper_waits = True
            try:
                mine = self._turn.wait_for(
                    lambda: self._taken_by is None and (keeper or not self._keeper_waits),
                    deadline.left,
                )
            finally:
                if keeper:
                    self._keeper_waits = False
            if not mine:
                raise OperationalError("another thread was using it.")
            self._taken_by = threading.get_ident()

    def _give(self) -> None:
        """End this thread's turn; harmless if an exception came before it had one."""
        with self._turn:
            if self._taken_by == threading.get_ident():
                self._taken_by = None
                self._used = real_clock()
                self._turn.notify_all()

    def _opened(self, deadline: Limit) -> BaseDatabaseWrapper:
        current = self._connection
        if current is not None and (current.connection is None or self._is_moved(current)):
            self.close()
        if self._connection is None:
            opened = self._opener.open(deadline.left)
            self.wire, self.identity = _wire_of(opened), None
            self._connection = opened
        return self._connection

    def _is_moved(self, connection: BaseDatabaseWrapper) -> bool:
        """Whether the alias means another database now, as when a test runner begins and ends."""
        wanted = connections.settings[self._alias]["NAME"]
        return bool(connection.settings_dict["NAME"] != wanted)

    def _unopened(self) -> BaseDatabaseWrapper:
        """Return a connection that nothing else knows of, with the settings as they are now."""
        settings_dict: dict[str, Any] = copy.deepcopy(connections.settings[self._alias])
        settings_dict["AUTOCOMMIT"] = True
        settings_dict["ATOMIC_REQUESTS"] = False
        self.backend.private_settings(settings_dict)
        connection = load_backend(settings_dict["ENGINE"]).DatabaseWrapper(
            settings_dict, self._alias
        )
        assert isinstance(connection, BaseDatabaseWrapper)
        connection.inc_thread_sharing()
        return connection


def _wire_of(connection: BaseDatabaseWrapper) -> socket.socket | None:
    """Return another handle on the connection's socket, if it has one."""
    if not hasattr(connection.connection, "fileno"):
        return None
    return socket.socket(fileno=socket.dup(connection.connection.fileno()))


_privates: dict[tuple[str, bool], Private] = {}
_mutex = threading.Lock()
_inherited: list[Any] = []


def private(alias: str, *, to_listen: bool = False) -> Private:
    """Return this process's private connection to an alias, or the one that listens."""
    found = _privates.get((alias, to_listen))
    if found is None:
        made = Private(alias)
        with _mutex:
            found = _privates.setdefault((alias, to_listen), made)
    return found


def on_private(
    alias: str, statement: Callable[[BaseDatabaseWrapper], T], limit: float = LIMIT
) -> T:
    """Run a lock statement on the private connection; again if it was gone, or cut short."""
    one, deadline, tries = private(alias), Limit(limit), 0
    while True:
        tries += 1
        try:
            with one.use(limit) as connection:
                return statement(connection)
        except (OperationalError, InterfaceError) as error:
            in_time = isinstance(error, TooSlow) and deadline.left > 0
            if one.backend.is_contention(error) or not (tries == 1 or in_time):
                raise


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
